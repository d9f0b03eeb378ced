"""What a memory says of the model that makes it, so that it can be asked without naming that model again."""

from typing import Any

from fot.fingerprint import MADE_WITH, Fingerprint, tokenizer_fingerprint
from fot.names import lasting_name


def origin(model: Any, made_with: Fingerprint) -> dict[str, Any]:
    """For the metadata of a memory.

    Args:
        model: a ``FoTForCausalLM``.
        made_with: its fingerprint.

    Returns:
        ``model``: the name that loads it, if it was loaded by name; ``tokenizer``: fingerprint, if it has one;
        ``memory``: its settings; ``made_with``: samples of its weights.
    """
    found: dict[str, Any] = {"memory": model.memory_config.to_dict(), MADE_WITH: made_with.to_dict()}
    name = model.loaded_as or model.name_or_path  # the latter of a plain model to which memory was attached
    if name:
        found["model"] = lasting_name(name)
    if model.tokenizer is not None:
        found["tokenizer"] = tokenizer_fingerprint(model.tokenizer)
    return found
