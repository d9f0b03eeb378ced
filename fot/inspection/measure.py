"""What queries find in their memories: the top slots with their scores, and where the attention mass lies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memory import LayerMemory, Memory
from memory.index import DEFAULT_TOP_K

# A hit's focus score is its attention among itself and this many neighbours on each side (arXiv 2307.03170).
NEIGHBOURS = 32

# Numbers of one step: 2**22 float32 numbers are 16 MiB, whatever the size of the memory.
STEP_NUMBERS = 1 << 22
BLOCK = 16384


@dataclass(frozen=True)
class Hits:
    """Retrieved slots, best first, each (H, T, K) on the CPU.

    Attributes:
        memory: number of the memory, int64; -1 where fewer than K were found.
        slot: in that memory, int64; -1 there.
        score: inner product times scale, float32; -inf there.
        knn_score: share of the attention to all memories, 0 there.
        share: share of all attention, local window and memories, 0 there.
        focus_score: attention among the slot's neighbours, 0 there.
    """

    memory: Tensor
    slot: Tensor
    score: Tensor
    knn_score: Tensor
    share: Tensor
    focus_score: Tensor


def find_hits(
    memories: Sequence[Memory], layer: int, queries: Tensor, memory_lse: Tensor, lse: Tensor, *, scale: float, top: int
) -> Hits:
    """The slots that queries attend to most, by what the backends retrieve.

    Args:
        memories: what the queries read.
        layer: index of the memory layer.
        queries: (H, T, D), rotated as in the attention.
        memory_lse: (H, T) log-sum-exp over all memories.
        lse: (H, T) log-sum-exp over local window and memories.
        scale: factor on inner products.
        top: K.
    """
    H, T, _ = queries.shape  # noqa: N806
    scores, slots, numbers, focus = [], [], [], []
    for number, memory in enumerate(memories):
        if not len(memory):
            continue
        folded = queries.reshape(memory.num_key_value_heads, -1, queries.shape[-1])  # (G, H / G * T, D)
        products, found = memory[layer].search(folded, min(top, memory.top_k or top))
        near = focus_scores(memory[layer], folded, found, scale=scale)
        scores.append(scale * products.reshape(H, T, -1))
        slots.append(found.reshape(H, T, -1))
        focus.append(near.reshape(H, T, -1))
        numbers.append(torch.where(slots[-1] < 0, -1, number))
    none = queries.new_empty(H, T, 0)
    padding = none.float().new_full((H, T, top), -torch.inf)  # so that there are always K
    score, order = torch.cat([*scores, padding], dim=-1).topk(top, dim=-1)
    missing = torch.full_like(order, -1)

    def best(parts: list[Tensor], fill: Tensor) -> Tensor:
        return torch.cat([*parts, fill], dim=-1).gather(-1, order)

    return Hits(
        best(numbers, missing).cpu(),
        best(slots, missing).cpu(),
        score.cpu(),
        _share(score, memory_lse).cpu(),
        _share(score, lse).cpu(),
        best(focus, torch.zeros_like(score)).cpu(),
    )


def focus_scores(layer: LayerMemory, queries: Tensor, slots: Tensor, *, scale: float) -> Tensor:
    """A hit's attention among itself and its 32 neighbours on each side, by the stored keys.

    Args:
        layer: keys of one memory layer.
        queries: (G, R, D).
        slots: (G, R, K); -1 for none.
        scale: factor on inner products.

    Returns:
        (G, R, K) float32 in 0..1, 0 for slot -1.
    """
    offsets = torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, device=slots.device)
    rows = max(1, STEP_NUMBERS // max(1, slots.shape[0] * slots.shape[2] * len(offsets) * queries.shape[-1]))
    parts = []
    for some, asked in zip(slots.split(rows, dim=1), queries.split(rows, dim=1), strict=True):
        near = some.unsqueeze(-1) + offsets  # (G, r, K, 65)
        inside = (near >= 0) & (near < len(layer))
        keys = layer.keys(near.clamp(0, len(layer) - 1)).to(queries.device)  # (G, r, K, 65, D)
        logits = scale * torch.einsum("grkod,grd->grko", keys, asked.float())
        focus = logits.masked_fill(~inside, -torch.inf).softmax(-1)[..., NEIGHBOURS]
        parts.append(focus.masked_fill(some < 0, 0.0))
    return torch.cat(parts, dim=1)


def slot_masses(
    memory: Memory, layer: int, queries: Tensor, lse: Tensor, *, scale: float
) -> Iterator[tuple[int, Tensor]]:
    """Attention to every slot, summed over heads and queries, block by block.

    Args:
        memory: what is attended to.
        layer: index of the memory layer.
        queries: (H, R, D).
        lse: (H, R) log-sum-exp over everything that the queries attend to.
        scale: factor on inner products.

    Yields:
        first slot of the block, masses (n,) float64 on the CPU.
    """
    groups = memory.num_key_value_heads
    folded = queries.float().reshape(groups, -1, queries.shape[-1])  # (G, M, D)
    total = lse.reshape(groups, -1, 1)
    rows = max(1, STEP_NUMBERS // (groups * BLOCK))
    for start in range(0, len(memory), BLOCK):
        keys = memory[layer].keys(slice(start, start + BLOCK)).to(queries.device)  # (G, n, D)
        mass = torch.zeros(keys.shape[1], dtype=torch.float64, device=queries.device)
        for some, some_total in zip(folded.split(rows, dim=1), total.split(rows, dim=1), strict=True):
            mass += (scale * (some @ keys.mT) - some_total).exp().sum((0, 1))
        yield start, mass.cpu()


def retrieved_masses(
    memory: Memory, layer: int, queries: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the slots that an approximate backend retrieves.

    Args and dtypes as ``slot_masses``.

    Returns:
        slots (n,) int64, not distinct, and their masses (n,) float64, on the CPU.
    """
    folded = queries.reshape(memory.num_key_value_heads, -1, queries.shape[-1])
    products, slots = memory[layer].search(folded, memory.top_k or DEFAULT_TOP_K)
    masses = _share(scale * products.reshape(*lse.shape, -1), lse)
    found = slots.flatten() >= 0
    return slots.flatten()[found].cpu(), masses.flatten()[found].double().cpu()


def _share(score: Tensor, lse: Tensor) -> Tensor:
    # Attention may have run in bfloat16, so that a share of nearly everything comes out a little above 1.
    return (score - lse.float().unsqueeze(-1)).exp().nan_to_num(0.0).clamp(max=1.0)
