"""transformers' Auto class loads a checkpoint with memory settings as the plain model it also is, and says so here.

Importing this module, as ``import fot`` does, adds the warning. What is loaded stays the same.
"""

import functools
import warnings
from typing import Any

from transformers import AutoModelForCausalLM

from fot.config import CONFIG_KEY

# As transformers has it, for those who attach the memory next.
load_plain = AutoModelForCausalLM.from_pretrained


@functools.wraps(load_plain)
def _load_and_warn(cls: Any, *args: Any, **kwargs: Any) -> Any:
    model = load_plain.__func__(cls, *args, **kwargs)
    if getattr(model.config, CONFIG_KEY, None) is not None:
        warnings.warn(
            f"this {type(model).__name__} was saved with a memory, and is loaded without it: load it with "
            "fot.FoTForCausalLM.from_pretrained, or call fot.attach_memory(model)",
            stacklevel=2,
        )
    return model


AutoModelForCausalLM.from_pretrained = classmethod(_load_and_warn)
