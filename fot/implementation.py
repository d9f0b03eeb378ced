"""Which attention implementation a model uses, set for every family."""

import types
from typing import Any

from transformers import PreTrainedModel

from fot.families import attention_modules


def set_attention(model: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """As transformers' ``set_attn_implementation``, and for Falcon, too, which that leaves as it is.

    Args:
        model: a causal language model of a supported family, with or without a memory.
        name: an implementation, registered or one of the family.
        args, kwargs: of ``set_attn_implementation``.

    Raises:
        ValueError: transformers does not know it, or not for this family.
    """
    if model.config.model_type != "falcon":
        PreTrainedModel.set_attn_implementation(model, name, *args, **kwargs)
        return
    from fot.falcon import attention_class

    model.config._attn_implementation = model.get_correct_attn_implementation(name)
    for attention in attention_modules(model):
        attention.__class__ = attention_class(name)
        bind_wrapped(attention)


def bind_wrapped(module: Any) -> None:
    """Where accelerate's device_map has put a wrapper around ``forward``, let it wrap that of the module's class."""
    if hasattr(module, "_old_forward"):
        module._old_forward = types.MethodType(type(module).forward, module)
        module.forward.__wrapped__ = module._old_forward  # generate() looks at the signature
