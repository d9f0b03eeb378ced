"""Frequencies of each method against numbers worked out from its source: d = 8, b = 10000, f = 1, 0.1, 0.01, 0.001."""

import math

import pytest
import torch
from conftest import ModelMaker

from fot.compare import frequencies, patterns, rope
from fot.compare.methods import Setting, ntk_alpha, self_extend

DIM, BASE = 8, 10_000.0
NAMES = ["interpolation", "ntk_aware", "ntk_by_parts", "yarn", "longrope", "llama3", "giraffe_power",
         "giraffe_truncated", "no_positions"]  # fmt: skip


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9)


def test_plain() -> None:
    close(frequencies.plain(DIM, BASE), [1, 0.1, 0.01, 0.001])


def test_ntk_divides_the_lowest_frequency_by_alpha_and_leaves_the_highest() -> None:
    # b' = 10000 * 4^(8/6) = 63496.04; b'^(-2i/8) = 1, 0.0629961, 0.00396850, 0.00025
    assert frequencies.ntk_base(DIM, BASE, 4) == pytest.approx(63_496.04, rel=1e-6)
    close(frequencies.ntk(DIM, BASE, 4), [1, 0.0629961, 0.00396850, 0.00025])


def test_dynamic_ntk() -> None:
    # 6000 tokens, trained on 2000, factor 2: alpha = 2 * 3 - 1 = 5; the lowest is 0.001 / 5
    found = frequencies.dynamic_ntk(DIM, BASE, 2.0, 6000, 2000)
    close(found, [1, 0.1 * 5 ** (-1 / 3), 0.01 * 5 ** (-2 / 3), 0.0002])
    close(frequencies.dynamic_ntk(DIM, BASE, 2.0, 500, 2000), [1, 0.1, 0.01, 0.001])
    assert ntk_alpha(3.0) == 5
    assert ntk_alpha(1.0) == 1


def test_where_a_ramp_begins_and_ends() -> None:
    # i(r) = 8 ln(2048 / (2 pi r)) / (2 ln 10000); 32 rotations: 8 * 2.32106 / 18.42068 = 1.00801; 1: 2.51316
    assert frequencies.dimension_of(32, DIM, BASE, 2048) == pytest.approx(1.00801, abs=1e-4)
    assert frequencies.dimension_of(1, DIM, BASE, 2048) == pytest.approx(2.51316, abs=1e-4)
    close(frequencies.ramp((32, 1), DIM, BASE, 2048), [0, 0, 0.5, 1])  # from floor 1 to ceil 3


def test_yarn() -> None:
    # by the ramp 0, 0, 1/2, 1 and s = 4: 0.01 (1/2 + 1/8) = 0.00625, 0.001 / 4
    close(frequencies.yarn(DIM, BASE, 4, 2048), [1, 0.1, 0.00625, 0.00025])
    assert frequencies.yarn_factor(4) == pytest.approx(1.1386294)
    assert frequencies.yarn_factor(0.5) == 1
    close(torch.tensor(frequencies.yarn_lambdas(DIM, BASE, 4, 2048)), [1, 1, 1.6, 4])


def test_ntk_by_parts() -> None:
    # i(1.25) = 2.41625, i(0.75) = 2.63811: the blend with interpolation goes from 2 to 3: 0, 0, 0, 1.
    # i(16) = 1.30904, i(2) = 2.21213: that with plain from 1 to 3: 0, 0, 1/2, 1.
    # 0.01: half of 0.01 * 4^(-2/3) = 0.00396850 and half of itself; 0.001: interpolated
    close(frequencies.ntk_by_parts(DIM, BASE, 4, 2048), [1, 0.1, 0.00698425, 0.00025])
    close(frequencies.ntk_by_parts(DIM, BASE, 1, 2048), [1, 0.1, 0.01, 0.001])


def test_giraffe() -> None:
    close(frequencies.giraffe_power(DIM, BASE), [1, 0.1 * math.sqrt(0.75), 0.01 * math.sqrt(0.5), 0.001 * 0.5])
    # t = 2 pi / 400 = 0.015708: 0.01 is below it and becomes t / 16; t / 8 = 0.0019635: 0.001 is below that
    close(frequencies.giraffe_truncated(DIM, BASE, 400), [1, 0.1, 0.00098175, 0])
    close(frequencies.giraffe_truncated(DIM, BASE, 100_000), [1, 0.1, 0.01, 0.001])


def longrope(dim: int, base: float, lambdas: list[float]) -> torch.Tensor:
    """f_i / lambda_i (LongRoPE, arXiv 2402.13753)."""
    return frequencies.plain(dim, base) / torch.tensor(lambdas)


def longrope_factor(factor: float, trained: int) -> float:
    """sqrt(1 + ln s / ln L), on cosine and sine; 1 up to s = 1."""
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


def test_longrope() -> None:
    close(longrope(DIM, BASE, [1, 2, 4, 5]), [1, 0.05, 0.0025, 0.0002])
    # sqrt(1 + ln 8 / ln 4096) = sqrt(1.25)
    assert longrope_factor(8, 4096) == pytest.approx(math.sqrt(1.25))
    assert longrope_factor(1, 4096) == 1


def test_log_n() -> None:
    # Position 15 is token 16: ln 16 / ln 4 = 2
    close(patterns.log_n(4)(torch.tensor([0, 1, 3, 15])), [1, 1, 1, 2])
    close(patterns.ssmax(0.5)(torch.tensor([0, 15])), [0, 0.5 * math.log(16)])
    close(patterns.ssmax(1 / math.log(64))(torch.tensor([63])), [1])


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same(name: str, make_plain: ModelMaker) -> None:
    """What a model gets by its ``rope_parameters``, and that it has its own positions again afterwards."""
    model = make_plain()
    before, own = model.model.rotary_emb.inv_freq.clone(), model.config.rope_parameters
    dim, base, trained = rope.shape_of(model)
    assert (dim, base, trained) == (8, 10_000.0, 64)
    lambdas = frequencies.yarn_lambdas(dim, base, 4.0, trained)
    expected = {
        "interpolation": (before / 4, 1.0),
        "ntk_aware": (frequencies.ntk(dim, base, 4), 1.0),
        "ntk_by_parts": (frequencies.ntk_by_parts(dim, base, 4, trained), 1.0),
        "yarn": (frequencies.yarn(dim, base, 4, trained), frequencies.yarn_factor(4)),
        "longrope": (longrope(dim, base, lambdas), longrope_factor(4, trained)),
        # 64 / 4 < 2 pi / f for 0.1 and below; 2 pi < 64 / 4 for 1: kept. 2 pi / 0.1 = 62.8 lies between 16 and 64:
        # smooth = (64 / 62.83 - 1) / 3 = 0.0061972: 0.1 ((1 - smooth) / 4 + smooth)
        "llama3": (torch.tensor([1, 0.0254648, 0.0025, 0.00025]), 1.0),
        "giraffe_power": (frequencies.giraffe_power(dim, base), 1.0),
        "giraffe_truncated": (frequencies.giraffe_truncated(dim, base, trained), 1.0),
        "no_positions": (torch.zeros(4), 1.0),
    }[name]
    with rope.rotated(model, getattr(rope, name)(model, 4.0)):
        rotary = model.model.rotary_emb
        torch.testing.assert_close(rotary.inv_freq, expected[0], rtol=1e-4, atol=1e-9)
        assert rotary.attention_scaling == pytest.approx(expected[1])
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.config.rope_parameters == own


def test_dynamic_formulae_are_transformers_own(make_plain: ModelMaker) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = make_plain()
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": BASE}
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, seq_len=320)
    torch.testing.assert_close(frequencies.dynamic_ntk(DIM, BASE, 2.0, 320, 64), theirs)


def test_longrope_takes_a_factor_for_each_frequency(make_plain: ModelMaker) -> None:
    with pytest.raises(ValueError, match="3 LongRoPE factors are given; this model takes 4"):
        rope.longrope(make_plain(), 2.0, [1, 2, 3])


def test_stretched_models_are_refused(make_plain: ModelMaker) -> None:
    model = make_plain()
    with rope.rotated(model, rope.yarn(model, 2.0)), pytest.raises(ValueError, match=r"stretched already .*'yarn'"):
        rope.check_rotary(model)


def test_self_extend_stays_within_half_of_what_was_trained(make_plain: ModelMaker) -> None:
    for longest in (32, 100, 1000):
        found = self_extend(make_plain(), Setting(longest))
        assert found.neighbours == 16
        assert found.neighbours + (longest - found.neighbours) / found.group <= 32
