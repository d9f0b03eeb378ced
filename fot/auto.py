"""transformers' Auto class loads a checkpoint with memory settings as the plain model it also is, and says so here.

Importing this module, as ``import fot`` does, adds the warning. What is loaded stays the same.

This wraps a method of transformers, because transformers 5.24 has no supported way to the same. A ``model_type`` of our
own in config.json would keep plain transformers from loading the folder. An ``auto_map`` there is passed over for types
that transformers knows, unless code from the checkpoint is trusted. A class registered for a known configuration would
be loaded in place of the plain one, by ``from_config`` as well. And nobody is told of fields that a configuration does
not know.
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
