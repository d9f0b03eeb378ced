"""What is checked before vectors are stored or searched for."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from memory.content import Content, LayerContent
from memory.vectors import VECTOR_DTYPES, as_stored


def check_shape(layer: LayerContent, tensor: Tensor, what: str) -> None:
    """Raise ValueError if ``what`` is not (G, tokens, D)."""
    heads, dim = layer.keys.num_heads, layer.keys.head_dim
    if tensor.ndim != 3 or tensor.shape[0] != heads or tensor.shape[2] != dim:
        raise ValueError(f"{what} have shape {tuple(tensor.shape)}; this memory takes ({heads}, tokens, {dim})")


def check_pairs(
    content: Content, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], token_ids: Tensor | Sequence[int]
) -> np.ndarray:
    """The ids (T,) on the host, if tokens with these keys and values, by layer, can be appended.

    Raises:
        ValueError: they cannot.
    """
    finite, count = [], len(token_ids)
    for what, vectors, dtype in (("keys", keys, content.key_dtype), ("values", values, content.value_dtype)):
        if set(vectors) != set(content.layers):
            raise ValueError(
                f"{what} belong to layers {sorted(vectors)}, but this memory has layers {sorted(content.layers)}"
            )
        for number, tensor in vectors.items():
            check_shape(content.layers[number], tensor, f"{what} of layer {number}")
            if tensor.shape[1] != count:
                raise ValueError(
                    f"{what} of layer {number} have {tensor.shape[1]} tokens, but there are {count} token ids"
                )
            finite.append(torch.isfinite(as_stored(tensor, VECTOR_DTYPES[dtype])).all())
    flags = torch.stack([flag.to(finite[0].device) for flag in finite])
    # One transfer to the host for a whole window, ids included: a GPU is waited for once.
    if isinstance(token_ids, Tensor) and token_ids.device == flags.device:
        together = torch.cat([flags.to(token_ids.dtype), token_ids]).cpu().numpy()
        fits, ids = bool(together[: len(flags)].all()), together[len(flags) :].astype(np.int32)
    else:
        on_host = token_ids.cpu() if isinstance(token_ids, Tensor) else token_ids
        fits, ids = all(flags.tolist()), np.asarray(on_host, dtype=np.int32)
    if not fits:
        raise ValueError(_not_finite(content, keys, values))
    return ids


def _not_finite(content: Content, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> str:
    """Why vectors cannot be stored of which one is NaN or infinite, or would be in the dtype that stores it."""
    kinds = (("key", keys, "key_dtype", content.key_dtype), ("value", values, "value_dtype", content.value_dtype))
    for what, vectors, setting, dtype in kinds:
        for number, tensor in vectors.items():
            lost = torch.isfinite(tensor) & ~torch.isfinite(as_stored(tensor, VECTOR_DTYPES[dtype]))
            if lost.any():
                return (
                    f"a {what} of layer {number} is {tensor[lost][0].item():.4g}, more than {dtype} can hold, so "
                    f"nothing was stored: use a memory with {setting}='bfloat16' or 'float32'"
                )
    return (
        "a key or value is NaN or infinite, so nothing was stored: the model overflows in this dtype or its "
        "weights are damaged; try dtype float32 or check the checkpoint"
    )
