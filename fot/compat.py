"""Where releases of transformers differ.

What a decoder keeps of earlier tokens was the argument and output ``past_key_values`` up to transformers 5.23; it has
been ``cache`` since 5.24, which drops the old name in 5.40.
"""

import inspect
from typing import Any

from transformers.models.llama.modeling_llama import LlamaAttention

CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among keyword arguments, by any of its names (``layer_past`` is Falcon's); None without one."""
    return next((kwargs[name] for name in (CACHE, "past_key_values", "layer_past") if name in kwargs), None)
