"""What a memory's index loses of the attention to it, measured on the memory itself.

Windows of the memory's own text are read by its model, as if they were new: what they stored is left out of the memory
that they ask. By layer and KV head, the answers of the index and of a top-k are compared with exact attention.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from memory import ExactIndex, Memory, VectorBlocks
from memory.index import attend_hits


class Listening(ExactIndex):
    """The exact backend, which notes what it is asked.

    Attributes:
        asked: queries (G, T, D) float32 of each call.
        scale: factor on inner products of the last call.
    """

    def __init__(self, keys: VectorBlocks, values: VectorBlocks) -> None:
        super().__init__(keys, values)
        self.asked: list[Tensor] = []
        self.scale = 1.0

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """As ``ExactIndex.attend``."""
        self.asked.append(queries.float())
        self.scale = scale
        return super().attend(queries, scale=scale)

    def attend_to_best(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Attention to the exact top-k alone."""
        scores, slots = self.search(queries, min(k, len(self._keys)))
        return attend_hits(queries, scores, slots, self._values, scale=self.scale)


@dataclass(frozen=True)
class HeadLoss:
    """What is lost in one KV head, each a mean over the queries.

    Attributes:
        layer: of the model.
        head: KV head of the layer.
        mass: share of the exact attention that the exact top-k carries.
        top_k_error: relative error of the output if the top-k alone is attended to.
        index_error: relative error of the output by the memory's index.
    """

    layer: int
    head: int
    mass: float
    top_k_error: float
    index_error: float


@torch.no_grad()
def check(model: Any, memory: Memory, *, places: int = 4, queries: int = 64, top_k: int = 128) -> dict[str, Any]:
    """Measure what the index of a memory loses.

    Args:
        model: that made the memory.
        memory: with the index in question.
        places: windows of the memory's text that ask, evenly spread.
        queries: tokens of each window whose queries count; each has those of all heads.
        top_k: pairs of the top-k.

    Returns:
        ``{"tokens", "index", "top_k", "queries", "heads": [{...}, ...]}``, heads as ``HeadLoss`` has them.

    Raises:
        ValueError: the memory is too small.
    """
    window = model.memory_config.window
    least = 2 * places * window
    if len(memory) < least:
        raise ValueError(
            f"the memory holds {len(memory):,} tokens; {places} windows of {window} that ask the rest of it take at "
            f"least {least:,}: read more into it, or choose a smaller --places"
        )
    starts = [(2 * place + 1) * (len(memory) - window) // (2 * places) for place in range(places)]
    ids = torch.from_numpy(memory.token_ids().copy()).long()
    asking = torch.zeros(len(memory), dtype=torch.bool)
    for start in starts:
        asking[start : start + window] = True
    made: list[Listening] = []

    def listen(keys: VectorBlocks, values: VectorBlocks) -> Listening:
        made.append(Listening(keys, values))
        return made[-1]

    rest = (~asking).nonzero().flatten()
    exact, indexed = memory.kept(rest, index=listen), memory.kept(rest)
    exact.prepare()
    for start in starts:
        model(ids[start : start + window][None].to(model.device), memory=exact, use_cache=False)
    heads = [
        loss
        for layer, one in zip(exact.layers, made, strict=True)
        for loss in _losses(layer, one, indexed, queries, top_k, window)
    ]
    return {
        "tokens": len(exact),
        "index": indexed[indexed.layers[0]].describe(),
        "top_k": top_k,
        "queries": places * queries,
        "heads": [asdict(head) for head in heads],
    }


def _losses(layer: int, exact: Listening, indexed: Memory, queries: int, top_k: int, window: int) -> list[HeadLoss]:
    # (G, heads of a KV head * tokens, D), heads side by side: the same tokens of each.
    chosen = [
        asked.unflatten(1, (-1, window))[:, :, :: max(1, window // queries)].flatten(1, 2) for asked in exact.asked
    ]
    one_each = []
    for asked in chosen:
        output, lse = ExactIndex.attend(exact, asked, scale=exact.scale)
        best, best_lse = exact.attend_to_best(asked, top_k)
        # As while a model generates: a token asks with its query heads alone.
        tokens = asked.unflatten(1, (-1, len(range(0, window, max(1, window // queries))))).unbind(2)
        found = torch.stack([indexed[layer].attend(token, scale=exact.scale)[0] for token in tokens], dim=2)
        one_each.append(
            torch.stack(
                [(best_lse - lse).exp().mean(1), _error(best, output), _error(found.flatten(1, 2), output)], dim=1
            )
        )
    means = torch.stack(one_each).mean(0)  # (G, 3)
    return [HeadLoss(layer, head, *row) for head, row in enumerate(means.tolist())]


def _error(output: Tensor, exact: Tensor) -> Tensor:
    """Mean relative error (G,) of outputs (G, T, D)."""
    return ((output - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-12)).mean(1)
