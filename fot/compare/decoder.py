"""A small decoder over bytes whose positions are a choice."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fot.compare import positions

BYTES = 256
# Queries that attend at once: their scores are all that grows with the text.
QUERIES = 512
# Windows from which on a larger memory weighs no more: fot's default ``full_weight_tokens``.
FULL_WEIGHT_WINDOWS = 4


@dataclass(frozen=True)
class Size:
    """Of a decoder.

    Attributes:
        trained: bytes of a training text; ``learnt`` positions end there.
        longest: largest position that ``randomised`` draws, and so the longest text it reads.
        width: of hidden states.
        layers: number of layers.
        heads: of each.
    """

    trained: int = 512
    longest: int = 16384
    width: int = 128
    layers: int = 4
    heads: int = 4


class Layer(nn.Module):
    """Attention and a feed-forward part, each with a norm before it."""

    def __init__(self, kind: str, size: Size) -> None:
        super().__init__()
        self.kind, self.heads = kind, size.heads
        self.first, self.second = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.mixed = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)
        with torch.no_grad():
            for last in (self.out, self.down):  # as in GPT-2, so that the sum of all layers does not drown the bytes
                last.weight /= (2 * size.layers) ** 0.5

    def forward(self, hidden: Tensor, places: Tensor, table: Tensor | None, remembered: Tensor | None = None) -> Tensor:
        """(B, T, width) -> the same.

        Args:
            hidden: states.
            places: (B, T).
            table: (buckets, H) of T5.
            remembered: (N, T, width), this layer's input for earlier windows of the only row; None for no memory. Their
                keys stand at the window's first place, as in LongLLaMA.
        """
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mixed(self.first(hidden)).chunk(3, -1)
        )  # (B, H, T, D)
        if self.kind in ("rotary", "xpos"):
            queries, keys = positions.rotated(queries, places), positions.rotated(keys, places)
        if self.kind == "xpos":
            # From the middle of the text, so that neither power leaves float32's range.
            scale = positions.xpos_scale(places - places.shape[1] // 2, queries.shape[-1]).repeat(1, 1, 2).unsqueeze(1)
            queries, keys = queries * scale, keys / scale
        memory = None if remembered is None else self._stored(remembered)
        parts = [
            self._attend(queries[:, :, start : start + QUERIES], keys, values, start, table, memory)
            for start in range(0, queries.shape[2], QUERIES)
        ]
        hidden = hidden + self.out(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.second(hidden))))

    def _stored(self, remembered: Tensor) -> tuple[Tensor, Tensor]:
        """Keys as at a window's first place, and values, of earlier windows: (1, H, N * T, D) each."""
        _, keys, values = self.mixed(self.first(remembered)).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).unbind(1)
        if self.kind == "xpos":
            keys = keys / positions.xpos_scale(torch.tensor(-(remembered.shape[1] // 2)), keys.shape[-1]).repeat(2)
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        table: Tensor | None,
        memory: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        stop = start + queries.shape[2]
        keys, values = keys[:, :, :stop], values[:, :, :stop]
        distances = torch.arange(start, stop).unsqueeze(1) - torch.arange(stop)  # (T, S)
        discount = torch.zeros(stop)
        if memory is not None:
            count = memory[0].shape[2]
            keys, values = (torch.cat(pair, dim=2) for pair in zip(memory, (keys, values), strict=True))
            distances = torch.cat([distances[:, :1].expand(-1, count), distances], dim=1)
            weight = math.log(max(1.0, count / (FULL_WEIGHT_WINDOWS * queries.shape[2])))
            discount = torch.cat([torch.full((count,), -weight), discount])
        bias = torch.zeros(1, *distances.shape)
        if self.kind == "alibi":
            bias = -torch.tensor(positions.alibi_slopes(self.heads))[:, None, None] * distances
        elif table is not None:
            bias = table[positions.t5_buckets(distances.clamp(min=0))].permute(2, 0, 1)
        # (1, H or 1, T, S): torch is fast on a CPU with all four dimensions alone.
        bias = (bias + discount).masked_fill(distances < 0, -torch.inf).unsqueeze(0)
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)


class Decoder(nn.Module):
    """A causal language model over bytes.

    Args:
        kind: one of ``positions.KINDS``.
        size: of it.
    """

    def __init__(self, kind: str, size: Size) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.embedding = nn.Embedding(BYTES, size.width)
        # Times sqrt(width) they are as large as sinusoidal positions (arXiv 1706.03762, section 3.4).
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)
        self.learnt = nn.Parameter(torch.randn(size.trained, size.width) * 0.5) if kind == "learnt" else None
        # One table for all layers, as in T5.
        self.table = nn.Parameter(torch.zeros(positions.BUCKETS, size.heads)) if kind == "t5" else None
        self.layers = nn.ModuleList([Layer(kind, size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor, generator: torch.Generator, keep: int = 0) -> Tensor:
        """Logits (B, T, 256) of bytes (B, T), or of the last ``keep``; ``generator`` draws random positions.

        Raises:
            ValueError: there are not so many positions; see ``reach``.
        """
        if ids.shape[1] > self.reach():
            raise ValueError(f"{self.kind} positions end at {self.reach()}; the text has {ids.shape[1]} bytes")
        (hidden, places), table = self._embedded(ids, generator), self._scaled_table()
        for layer in self.layers:
            hidden = layer(hidden, places, table)
        return self._logits(hidden[:, -keep:])

    def read(self, ids: Tensor, generator: torch.Generator, keep: int) -> Tensor:
        """Logits (1, keep, 256) after a text (1, T) by a memory that was not trained for.

        The text is read in windows as long as the trained texts, the last of which ends with it; bytes before the first
        whole window are left out. The middle layer of the last window sees the keys of all others, too.
        """
        windows = ids[0, ids.shape[1] % self.size.trained :].unflatten(0, (-1, self.size.trained))
        (hidden, places), table = self._embedded(windows, generator), self._scaled_table()
        middle = len(self.layers) // 2
        for layer in self.layers[:middle]:
            hidden = layer(hidden, places, table)
        remembered, last, places = hidden[:-1], hidden[-1:], places[-1:]
        for number, layer in enumerate(self.layers[middle:]):
            last = layer(last, places, table, remembered if number == 0 else None)
        return self._logits(last[:, -keep:])

    def _embedded(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States before the first layer, and places."""
        places = self._places(ids.shape[0], ids.shape[1], generator).to(ids.device)
        hidden = self.embedding(ids) * self.size.width**0.5
        if self.learnt is not None:
            hidden = hidden + self.learnt[places]
        elif self.kind in ("sinusoidal", "shape", "randomised"):
            hidden = hidden + positions.sinusoidal(places, self.size.width)
        return hidden, places

    def _scaled_table(self) -> Tensor | None:
        """(buckets, H) of T5, times sqrt(width) as the embeddings are: the steps of AdamW are small beside scores."""
        return None if self.table is None else self.table * self.size.width**0.5

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.norm(hidden) @ self.embedding.weight.T
        return logits

    def reach(self) -> float:
        """Bytes of the longest text that it has positions for."""
        return {"learnt": self.size.trained, "randomised": self.size.longest}.get(self.kind, float("inf"))

    def _places(self, rows: int, count: int, generator: torch.Generator) -> Tensor:
        """(rows, count) positions; in training a shorter text is a stretch of one of ``size.trained`` bytes."""
        whole = max(count, self.size.trained) if self.training else count
        if self.kind == "randomised":  # its authors' code draws them when it is read, too
            places = positions.random_positions(rows, whole, self.size.longest, generator)
        elif self.kind == "shape":
            places = positions.shifted_positions(rows, whole, generator if self.training else None)
        else:
            places = torch.arange(whole, device="cpu").expand(rows, whole)
        start = int(torch.randint(whole - count + 1, (1,), generator=generator, device="cpu")) if whole > count else 0
        return places[:, start : start + count]
