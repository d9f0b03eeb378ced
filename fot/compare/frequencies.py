"""Frequencies of rotary positions, by method: pure formulae.

Everywhere d is the number of dimensions that are rotated, b the base (``rope_theta``), L the trained length and s the
factor by which texts are longer. Each function gives (d / 2,) float32 frequencies; plain ones are f_i = b^(-2i/d).
"""

import math

import torch
from torch import Tensor

# Of NTK-by-parts, found by trial on LLaMA by its authors: (from, to) rotations within the trained length.
PARTS_NTK = (1.25, 0.75)  # between the NTK-aware base and interpolation
PARTS_PLAIN = (16, 2)  # between plain frequencies and the former
YARN_PLAIN = (32, 1)

# Of Giraffe's truncated basis, as parts of 2 pi / L: the one low frequency that is left, and below what there is none.
TRUNCATED_KEPT = 16
TRUNCATED_ZERO = 8


def plain(dim: int, base: float) -> Tensor:
    """f_i = b^(-2i/d) (RoFormer, arXiv 2104.09864)."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def ntk_base(dim: int, base: float, alpha: float) -> float:
    """b' = b alpha^(d / (d - 2)): the lowest frequency is divided by alpha, the highest stays."""
    return base * alpha ** (dim / (dim - 2))


def ntk(dim: int, base: float, alpha: float) -> Tensor:
    """NTK-aware scaling (bloc97 2023; jquesnelle/yarn, ``LlamaNTKScaledRotaryEmbedding``)."""
    return plain(dim, ntk_base(dim, base, alpha))


def dynamic_ntk(dim: int, base: float, factor: float, tokens: int, trained: int) -> Tensor:
    """Dynamic NTK: alpha = s n / L - (s - 1) for a text of n tokens; plain up to n = L.

    Source: emozilla 2023; jquesnelle/yarn, ``LlamaDynamicScaledRotaryEmbedding``, as ``dynamic`` in transformers.
    """
    return ntk(dim, base, max(1.0, factor * tokens / trained - (factor - 1)))


def dimension_of(rotations: float, dim: int, base: float, trained: int) -> float:
    """The index i, not rounded, whose frequency makes so many rotations within the trained length."""
    return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))


def ramp(rotations: tuple[float, float], dim: int, base: float, trained: int) -> Tensor:
    """(d / 2,) from 0, at many rotations, to 1, at few (YaRN, arXiv 2309.00071, section 3.2)."""
    low = max(math.floor(dimension_of(rotations[0], dim, base, trained)), 0)
    high: float = min(math.ceil(dimension_of(rotations[1], dim, base, trained)), dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def blend(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """``one`` where ``share`` is 0, ``other`` where it is 1."""
    return one * (1 - share) + other * share


def ntk_by_parts(dim: int, base: float, factor: float, trained: int) -> Tensor:
    """NTK-by-parts: interpolation at few rotations, the NTK-aware base at more, plain at many.

    Source: jquesnelle/yarn, ``LlamaPartNTKScaledRotaryEmbedding``. At s = 1 it is plain.
    """
    slow = blend(ntk(dim, base, factor), plain(dim, base) / factor, ramp(PARTS_NTK, dim, base, trained))
    return blend(plain(dim, base), slow, ramp(PARTS_PLAIN, dim, base, trained))


def yarn(dim: int, base: float, factor: float, trained: int) -> Tensor:
    """YaRN (arXiv 2309.00071): interpolation below 1 rotation, plain above 32; as ``yarn`` in transformers."""
    one = plain(dim, base)
    return blend(one, one / factor, ramp(YARN_PLAIN, dim, base, trained))


def yarn_factor(factor: float) -> float:
    """0.1 ln s + 1, on cosine and sine (eq. 22); 1 up to s = 1."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def giraffe_power(dim: int, base: float, power: float = 0.5) -> Tensor:
    """f_i (1 - i / (d / 2))^p (Giraffe, arXiv 2308.10882; abacusai/Long-Context, ``scale_power``). Never plain."""
    half = dim // 2
    return plain(dim, base) * (1 - torch.arange(half, dtype=torch.float32) / half) ** power


def giraffe_truncated(dim: int, base: float, trained: int) -> Tensor:
    """Giraffe's truncated basis: with t = 2 pi / L, frequencies below t are t / 16, those below t / 8 are 0.

    Source: abacusai/Long-Context, ``truncate_frequency``. Never plain where a model has such frequencies.
    """
    one, cutoff = plain(dim, base), 2 * math.pi / trained
    kept = torch.where(one < cutoff, cutoff / TRUNCATED_KEPT, one)
    return torch.where(one < cutoff / TRUNCATED_ZERO, 0.0, kept)


def yarn_lambdas(dim: int, base: float, factor: float, trained: int) -> list[float]:
    """YaRN's frequencies as LongRoPE's factors lambda_i, f_i / lambda_i: where a search for them begins."""
    return (plain(dim, base) / yarn(dim, base, factor, trained)).tolist()
