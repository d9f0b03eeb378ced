"""Positions to train a decoder with: formulae (``fot.compare.decoder`` uses them)."""

import math

import torch
from torch import Tensor

from fot.compare.frequencies import plain

KINDS = ("sinusoidal", "learnt", "rotary", "t5", "alibi", "none", "randomised", "shape", "xpos")

BASE = 10_000.0
# T5's buckets: half for distances one by one, half growing up to this distance.
BUCKETS, FARTHEST = 32, 128
# SHAPE's largest offset, and xPos's scale base and gamma.
OFFSETS = 500
XPOS_BASE, XPOS_GAMMA = 512, 0.4


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """(..., width): sines, then cosines, of p / 10000^(2i/d) (arXiv 1706.03762); positions (...)."""
    angles = positions.unsqueeze(-1).float() * plain(width, BASE)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotated(vectors: Tensor, positions: Tensor) -> Tensor:
    """Queries or keys (B, H, T, D) turned by positions (B, T) (RoFormer, arXiv 2104.09864)."""
    angles = (positions.unsqueeze(-1).float() * plain(vectors.shape[-1], BASE)).unsqueeze(1)
    one, other = vectors.chunk(2, dim=-1)
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], dim=-1)


def xpos_scale(positions: Tensor, width: int) -> Tensor:
    """(..., width / 2) zeta_i^(p / 512), zeta_i = (2i/d + 0.4) / 1.4, on queries; its inverse on keys (xPos, arXiv
    2212.10554)."""
    zeta = (torch.arange(0, width, 2, dtype=torch.float32) / width + XPOS_GAMMA) / (1 + XPOS_GAMMA)
    return zeta ** (positions.unsqueeze(-1).float() / XPOS_BASE)


def alibi_slopes(heads: int) -> list[float]:
    """m_h = 2^(-8h/H), h from 1 (ALiBi, arXiv 2108.12409). If H is no power of two: those of the power below it, then
    every second of twice that."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[0::2][: heads - power]


def t5_buckets(distances: Tensor) -> Tensor:
    """Buckets of distances back, at least 0: 0..15 one by one, then by the logarithm up to 128 (arXiv 1910.10683)."""
    exact = BUCKETS // 2
    far = exact + (distances.clamp(min=1).float() / exact).log() / math.log(FARTHEST / exact) * (BUCKETS - exact)
    return torch.where(distances < exact, distances, far.long().clamp(max=BUCKETS - 1))


def random_positions(rows: int, count: int, largest: int, generator: torch.Generator) -> Tensor:
    """(rows, count) positions drawn from 0..largest-1 without replacement, sorted (arXiv 2305.16843).

    Raises:
        ValueError: there are fewer positions than tokens.
    """
    if count > largest:
        raise ValueError(f"{count} tokens have no {count} different positions below {largest}")
    drawn = [torch.randperm(largest, generator=generator, device="cpu")[:count].sort().values for _ in range(rows)]
    return torch.stack(drawn)


def shifted_positions(rows: int, count: int, generator: torch.Generator | None) -> Tensor:
    """(rows, count) from an offset of 0..499 drawn for each row, in training; from 500 on without a generator (SHAPE,
    arXiv 2109.05644)."""
    offsets = torch.full((rows, 1), OFFSETS, device="cpu")
    if generator is not None:
        offsets = torch.randint(OFFSETS, (rows, 1), generator=generator, device="cpu")
    return offsets + torch.arange(count, device="cpu")
