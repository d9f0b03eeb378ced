"""How a model turns keys by their positions, so that a key in the window can become one at another position."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fot.families import decoder_of


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of every layer.

    Attributes:
        frequencies: for each layer, (R / 2,) by which the first R numbers of a head are turned; None: not at all.
        interleaved: whether neighbours are turned together (Cohere, Llama 4), or numbers half of R apart (Llama).
    """

    frequencies: tuple[Tensor | None, ...]
    interleaved: bool = False

    def back(self, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys moved back by so many positions: R(p - n) k = R(-n) R(p) k.

        Moved back by their own position, keys are at position 0, with the factor that YaRN and LongRoPE put on them.

        Args:
            layer: theirs.
            keys: (..., G, T, D).
            positions: (..., T) int64.

        Returns:
            (..., G, T, D) of the same dtype. Differentiable in ``keys``.
        """
        frequencies = self.frequencies[layer]
        if frequencies is None:
            return keys
        angle = -positions.to(keys.device, torch.float32).unsqueeze(-1) * frequencies.to(keys.device, torch.float32)
        return turned_by_angles(keys, angle.cos().unsqueeze(-3), angle.sin().unsqueeze(-3), self.interleaved)


def turned_by_angles(vectors: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Queries or keys with their first R numbers turned.

    Args:
        vectors: (..., G, T, D).
        cos: float32 (..., 1, T, R / 2) or (T, R / 2), of the angles.
        sin: likewise.
        interleaved: see ``Rotary``.

    Returns:
        (..., G, T, D) of the same dtype.
    """
    size = 2 * cos.shape[-1]
    turned = vectors[..., :size].float()  # float32: the rotation must not add to bfloat16's rounding
    if interleaved:
        one, other = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack([one * cos - other * sin, other * cos + one * sin], dim=-1).flatten(-2)
    else:
        one, other = turned.chunk(2, dim=-1)
        pair = torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
    return torch.cat([pair.to(vectors.dtype), vectors[..., size:]], dim=-1)


def rotary_of(model: Any, without: Collection[int] = ()) -> Rotary:
    """The rotary positions of a causal language model.

    Args:
        model: of a supported family.
        without: layers that are not rotated, besides those that the model does not rotate.
    """
    config, rotary = model.config, decoder_of(model).rotary_emb
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    rotated = getattr(config, "no_rope_layers", None) or [True] * config.num_hidden_layers
    if config.model_type == "cohere2":
        rotated = [kind == "sliding_attention" for kind in kinds]
    frequencies = tuple(
        # Gemma 3 has frequencies for each kind of layer.
        getattr(rotary, f"{kind}_inv_freq", None) if not hasattr(rotary, "inv_freq") else rotary.inv_freq
        for kind in kinds
    )
    return Rotary(
        tuple(
            frequency if rotated[layer] and layer not in without else None
            for layer, frequency in enumerate(frequencies)
        ),
        interleaved=config.model_type in ("cohere", "cohere2", "llama4_text"),
    )
