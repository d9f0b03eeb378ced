"""A model with other rotary positions for a while: by transformers' ``rope_parameters``, with the missing kinds added.

Every kind here has frequencies that stay the same for a whole text, so keys in a cache stay right. Kinds that change
with the text are in ``fot.compare.patterns``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fot.compare import frequencies

# Kinds that transformers does not have, in its table under these names.
NTK, BY_PARTS, POWER, TRUNCATED, NONE = "ntk", "ntk_by_parts", "giraffe_power", "giraffe_truncated", "no_positions"

# Of Llama 3.1.
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0


def check_rotary(model: Any) -> None:
    """Raise ValueError if a model's positions are not plain rotary ones, the same in all layers and not stretched."""
    kind = type(model).__name__
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None or not hasattr(rotary, "inv_freq"):
        raise ValueError(f"{kind} has no rotary positions that are the same in all layers: choose a Llama-like model")
    stretched = model.config.rope_parameters.get("rope_type", "default")
    if stretched != "default":
        raise ValueError(f"the positions of this {kind} are stretched already (rope_type {stretched!r}): "
                         "compare methods on the checkpoint before that")  # fmt: skip
    sliding = getattr(model.config, "sliding_window", None)
    if sliding and "sliding_attention" in (getattr(model.config, "layer_types", None) or ["sliding_attention"]):
        raise ValueError(f"{kind} has layers with a sliding window of {sliding} tokens: choose a model without")


def shape_of(model: Any) -> tuple[int, float, int]:
    """Dimensions that are rotated, base and trained length of a checked model."""
    config = model.config
    return 2 * len(model.base_model.rotary_emb.inv_freq), config.rope_parameters["rope_theta"], trained_length(model)


def trained_length(model: Any) -> int:
    """Tokens of the longest text that a model was trained on, as far as its configuration tells."""
    return int(model.config.max_position_embeddings)


def interpolation(model: Any, factor: float) -> dict[str, Any]:
    """f_i / s: position interpolation (arXiv 2306.15595; SuperHOT)."""
    return {"rope_type": "linear", "factor": factor}


def ntk_aware(model: Any, factor: float) -> dict[str, Any]:
    return {"rope_type": NTK, "factor": factor}


def ntk_by_parts(model: Any, factor: float) -> dict[str, Any]:
    return {"rope_type": BY_PARTS, "factor": factor}


def yarn(model: Any, factor: float) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained_length(model)}


def llama3(model: Any, factor: float) -> dict[str, Any]:
    """As Llama 3.1, for this factor and trained length."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": trained_length(model),
    }


def longrope(model: Any, factor: float, lambdas: Sequence[float] | None = None) -> dict[str, Any]:
    """The same factors for short texts as for long ones: transformers would change over within a text that grows, and
    keys in the cache would stay as they were.

    Args:
        model: checked.
        factor: s.
        lambdas: for each frequency; None for YaRN's.

    Raises:
        ValueError: another number of factors.
    """
    dim, base, trained = shape_of(model)
    lambdas = frequencies.yarn_lambdas(dim, base, factor, trained) if lambdas is None else list(lambdas)
    if len(lambdas) != dim // 2:
        raise ValueError(f"{len(lambdas)} LongRoPE factors are given; this model takes {dim // 2}")
    return {
        "rope_type": "longrope",
        "short_factor": lambdas,
        "long_factor": lambdas,
        "factor": factor,
        "original_max_position_embeddings": trained,
    }


def giraffe_power(model: Any, factor: float) -> dict[str, Any]:
    return {"rope_type": POWER}


def giraffe_truncated(model: Any, factor: float) -> dict[str, Any]:
    return {"rope_type": TRUNCATED}


def no_positions(model: Any, factor: float) -> dict[str, Any]:
    """Nothing is rotated (DroPE, arXiv 2512.12167, before it is trained again)."""
    return {"rope_type": NONE}


@contextmanager
def rotated(model: Any, parameters: dict[str, Any]) -> Iterator[None]:
    """Within, a model's positions are these; see ``rotate``."""
    before, rotary = model.config.rope_parameters, model.base_model.rotary_emb
    try:
        rotate(model, parameters)
        yield
    finally:
        model.config.rope_parameters = before
        model.base_model.rotary_emb = rotary


def rotate(model: Any, parameters: dict[str, Any]) -> None:
    """Give a model other positions, in its configuration, too.

    Args:
        model: checked.
        parameters: as ``rope_parameters`` of its configuration; the base and the rotated share are kept.
    """
    config, decoder = model.config, model.base_model
    before, rotary = config.rope_parameters, decoder.rotary_emb
    kept = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if before.get(name) is not None}
    config.rope_parameters = kept | parameters
    decoder.rotary_emb = type(rotary)(config).to(rotary.inv_freq.device)


def _added(formula: Callable[[int, float, dict[str, Any], int], Tensor]) -> Callable[..., tuple[Tensor, float]]:
    """A formula of (d, b, ``rope_parameters``, L) as transformers calls it."""

    def frequencies_and_factor(
        config: Any, device: Any = None, seq_len: int | None = None, layer_type: str | None = None
    ) -> tuple[Tensor, float]:
        parameters = config.rope_parameters
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head * parameters.get("partial_rotary_factor", 1.0))
        found = formula(dim, parameters["rope_theta"], parameters, config.max_position_embeddings)
        return found.to(device), 1.0

    return frequencies_and_factor


ROPE_INIT_FUNCTIONS.update({
    NTK: _added(lambda dim, base, given, trained: frequencies.ntk(dim, base, given["factor"])),
    BY_PARTS: _added(lambda dim, base, given, trained: frequencies.ntk_by_parts(dim, base, given["factor"], trained)),
    POWER: _added(lambda dim, base, given, trained: frequencies.giraffe_power(dim, base)),
    TRUNCATED: _added(lambda dim, base, given, trained: frequencies.giraffe_truncated(dim, base, trained)),
    NONE: _added(lambda dim, base, given, trained: torch.zeros(dim // 2)),
})  # fmt: skip
