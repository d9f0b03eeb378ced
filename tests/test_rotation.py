"""Keys that stay in the window when it overflows, turned back to their new positions."""

import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from fot.rotary import Rotary

# Half a unit in the last place of the dtype that the result is rounded to.
HALF_PLACE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


@pytest.mark.parametrize("dtype", HALF_PLACE)
@pytest.mark.parametrize("distance", [1, 255, 1537])
def test_turning_back_rounds_once(dtype: torch.dtype, distance: int) -> None:
    """The angle and the products are float32: only the result is rounded. In bfloat16 1,537 radians are 1,536."""
    generator = torch.Generator().manual_seed(distance)
    keys = torch.randn(2, 3, 5, 16, generator=generator).to(dtype)
    shift = torch.full((2, 5), distance)
    inv_freq = 1.0 / 10_000 ** (torch.arange(0, 16, 2) / 16)
    angle = (-shift.double()[..., None] * inv_freq.double()).repeat(1, 1, 2).unsqueeze(1)  # (B, 1, S, D)
    exact = keys.double() * angle.cos() + rotate_half(keys.double()) * angle.sin()
    turned = Rotary((inv_freq,)).back(0, keys, shift)
    assert turned.dtype == dtype
    # float32 angles of 1,537 are off by up to 1e-4, of numbers up to 4
    bound = 1.01 * HALF_PLACE[dtype] * 2 * exact.abs() + 1e-3
    assert ((turned.double() - exact).abs() <= bound).all()
