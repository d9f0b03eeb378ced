"""Which kernel is chosen for every device, and that it gets what it takes.

The CUDA operators are replaced by reference ones that refuse what the real ones refuse (torch's
``sdp_utils_cpp.cpp`` and ``attention.cu``): so padding and cutting are tested where there is no GPU. ``-m gpu`` runs
the real ones.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from memory import attend, kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CAPABILITIES = ((3, 7), (5, 2), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0))
HEAD_DIMS = (5, 64, 100, 128, 250, 320)
T, N = 33, 45


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = scale * (q.double() @ k.double().mT)
    if causal:
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    if bias is not None:
        scores = scores + bias.double()
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


class Device:
    """A CUDA device of some capability, with operators that enforce what the real ones do."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.calls: list[str] = []

    def flash(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float) -> Any:
        assert self.capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer"
        assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16"
        assert q.shape[-1] % 8 == 0, "head_size should be a multiple of 8, this is ensured by padding!"
        assert q.shape[-1] <= 256
        assert (dropout, debug) == (0.0, False)
        self.calls.append("flash")
        output, lse = reference(q, k, v, scale, causal, None)
        return output, lse, None, None, 0, 0, None, None, None

    def efficient(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, dropout: float, causal: bool, *,
        scale: float,
    ) -> Any:  # fmt: skip
        assert self.capability >= (5, 0)
        assert q.dtype in (torch.float32, torch.float16) or (q.dtype == torch.bfloat16 and self.capability >= (8, 0))
        assert q.shape[-1] * q.element_size() % 16 == 0, "query is not correctly aligned"
        assert with_lse
        assert dropout == 0.0
        if bias is not None:
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.dtype == q.dtype
            assert bias.stride(-2) % 16 == 0, "attn_bias is not correctly aligned"
        self.calls.append("efficient")
        output, lse = reference(q, k, v, scale, causal, bias)
        return output, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None, None


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_case_gets_a_kernel_that_takes_it(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(capability)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", device.flash)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", device.efficient)
    for dtype, head_dim, masked in itertools.product(DTYPES, HEAD_DIMS, (False, True)):
        kernel = kernels.choose("cuda", capability, dtype, head_dim, masked)
        if kernel is None:
            too_old = capability < (5, 0) or (capability < (8, 0) and dtype == torch.bfloat16)
            assert too_old or dtype == torch.float64
            continue
        q, k, v = (
            torch.randn(2, 3, count, head_dim, generator=torch.Generator().manual_seed(count)).to(dtype)
            for count in (T, N, N)
        )
        causal, bias = not masked, None
        if masked:
            seen = torch.rand(2, 1, T, N, generator=torch.Generator().manual_seed(0)) > 0.5
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~(seen | (torch.arange(N) == 0)), -torch.inf)
        else:
            k, v = k[:, :, :T], v[:, :, :T]
        scale = head_dim**-0.5
        found = kernels.run(kernel, q, k, v, scale=scale, causal=causal, bias=bias)
        assert device.calls.pop() == kernel
        expected = reference(q, k, v, scale, causal, bias)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (("cpu", (0, 0), torch.float32, 100, True), "cpu"),
        (("cpu", (0, 0), torch.float64, 64, False), None),
        (("cuda", (8, 0), torch.bfloat16, 100, False), "flash"),  # LongLLaMA 3B
        (("cuda", (9, 0), torch.float16, 128, True), "efficient"),
        (("cuda", (8, 0), torch.float32, 128, False), "efficient"),
        (("cuda", (7, 5), torch.float16, 128, False), "efficient"),  # T4
        (("cuda", (7, 5), torch.bfloat16, 128, False), None),
        (("cuda", (0, 0), torch.float16, 128, False), None),  # ROCm
        (("mps", (0, 0), torch.float32, 64, False), None),
    ],
)
def test_choice(case: tuple[str, tuple[int, int], torch.dtype, int, bool], expected: str | None) -> None:
    assert kernels.choose(*case) == expected


def test_head_size_that_no_fused_kernel_takes_unpadded() -> None:
    """The same through ``attend`` on this device, gradients wanted or not."""
    q, k, v = (torch.randn(1, 2, count, 100, generator=torch.Generator().manual_seed(count)) for count in (T, N, N))
    expected = reference(q, k, v, 0.1, False, None)
    for grad in (False, True):
        found = attend(q.requires_grad_(grad), k, v, scale=0.1)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
