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

import memory.softmax
from memory import attend, kernels
from training.crossbatch import Contexts, attend_batch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CAPABILITIES = ((3, 7), (5, 2), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0))
HEAD_DIMS = (5, 64, 100, 128, 250, 320)
T, N = 33, 45


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
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
        assert {t.stride(-1) for t in (q, k, v)} == {1}, "Input tensor must have contiguous last dimension"
        assert not causal or q.shape[2] == k.shape[2], "causal to the last key"
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
        assert q.shape[1] == k.shape[1] == v.shape[1]
        assert with_lse
        assert dropout == 0.0
        assert {t.stride(-1) for t in (q, k, v)} == {1}, "query must be contiguous in its last dimension"
        if bias is not None:
            assert bias.stride(-1) == 1
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.dtype == q.dtype
            assert bias.stride(-2) % 16 == 0, "attn_bias is not correctly aligned"
        self.calls.append("efficient")
        output, lse = reference(q, k, v, scale, causal, bias)
        return output, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None, None

    def flash_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cum_q: None, cum_k: None,
        max_q: int, max_k: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *, scale: float,
    ) -> Any:  # fmt: skip
        assert self.capability >= (8, 0)
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] <= (192 if self.capability in ((8, 6), (12, 0)) else 256)
        assert q.shape[1] % k.shape[1] == 0
        assert (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0.0)
        assert lse.shape == q.shape[:3]
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
        assert {t.shape[-1] for t in (grad, q, k, v, out)} == {q.shape[-1]}
        assert {t.stride(-1) for t in (q, k, v)} == {1}, "Input tensor must have contiguous last dimension"
        self.calls.append("flash backward")
        return reference_backward(grad, q, k, v, out, lse, scale, causal, None)

    def efficient_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
        seed: Tensor, offset: Tensor, dropout: float, wanted: list[bool], causal: bool, *, scale: float,
    ) -> Any:  # fmt: skip
        assert self.capability >= (5, 0)
        assert q.dtype in (torch.float32, torch.float16) or (q.dtype == torch.bfloat16 and self.capability >= (8, 0))
        assert q.shape[-1] * q.element_size() % 16 == 0
        assert q.shape[1] == k.shape[1] == v.shape[1]
        assert lse.shape[2] % 32 == 0, "LSE is not correctly aligned"
        assert wanted == [True, True, True, False]
        assert {t.shape[-1] for t in (grad, q, k, v, out)} == {q.shape[-1]}
        assert {t.stride(-1) for t in (q, k, v)} == {1}, "query must be contiguous in its last dimension"
        # The kernel is not told how far apart the output's rows are (o_strideM in kernel_backward.h).
        assert out.transpose(1, 2).is_contiguous(), "delta would be read from a wrong place, without an error"
        if bias is not None:
            assert bias.stride(-1) == 1
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.stride(-2) % 16 == 0, "attn_bias is not correctly aligned"
        self.calls.append("efficient backward")
        return *reference_backward(grad, q, k, v, out, lse[..., : q.shape[2]], scale, causal, bias), None


def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the kernels do it: weights from the log-sum-exp that is given, delta from the output that is given."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (tensor.repeat_interleave(group, dim=1).double() for tensor in (k, v))
    scores = scale * (q.double() @ wide_k.mT)
    if causal:
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    weights = (scores + (0 if bias is None else bias.double()) - lse.double().unsqueeze(-1)).exp()
    delta = (grad.double() * out.double()).sum(-1, keepdim=True)
    there = weights * (grad.double() @ wide_v.mT - delta)
    found = [scale * there @ wide_k, scale * there.mT @ q.double(), weights.mT @ grad.double()]
    found[1:] = [tensor.unflatten(1, (k.shape[1], group)).sum(2) for tensor in found[1:]]
    return tuple(tensor.to(q.dtype) for tensor in found)  # type: ignore[return-value]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """capability -> a device whose operators and name everything here gets."""

    def make(capability: tuple[int, int]) -> Device:
        device = Device(capability)
        for name in ("flash", "efficient"):
            for suffix in ("", "_backward"):
                operator = f"_scaled_dot_product_{name}_attention{suffix}"
                monkeypatch.setattr(torch.ops.aten, operator, getattr(device, name + suffix))
        plain = kernels.choose
        monkeypatch.setattr(kernels, "capability_of", lambda _: capability)
        monkeypatch.setattr(kernels, "choose", lambda _, *rest: plain("cuda", *rest))
        return device

    return make


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (12, 0)])
def test_gradients_of_output_and_log_sum_exp_come_from_kernels(
    capability: tuple[int, int], heads: int, masked: bool, on_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = on_cuda(capability)
    monkeypatch.setattr(memory.softmax, "_attend_naive", None)  # float32 in slices: no training on CUDA comes there
    for dtype, head_dim in itertools.product((torch.float32, torch.float16, torch.bfloat16), (5, 100, 128, 196, 255)):
        if dtype == torch.bfloat16 and capability < (8, 0):
            continue
        generator = torch.Generator().manual_seed(0)
        shapes = [
            (2, 4, T, head_dim),
            (2, heads, N if masked else T, head_dim),
            (2, heads, N if masked else T, head_dim),
        ]
        tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
        mask = (torch.rand(2, 1, 1, N, generator=generator) > 0.5) | (torch.arange(N) == 0) if masked else None
        output, lse = attend(*tensors, scale=head_dim**-0.5, causal=not masked, mask=mask)
        (output.float().square().sum() + (lse * torch.arange(T)).sum()).backward()
        kinds = {call.split()[0] for call in device.calls}
        assert [call for call in device.calls if "backward" in call]
        small = dtype != torch.float32 and not masked and capability >= (8, 0)
        fits = head_dim + 1 <= (192 if capability in ((8, 6), (12, 0)) else 256)
        assert kinds == {"flash" if small and fits else "efficient"}
        device.calls.clear()
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        wide = [exact[0], *(tensor.repeat_interleave(4 // heads, dim=1) for tensor in exact[1:])]
        scores = head_dim**-0.5 * (wide[0] @ wide[1].mT)
        seen = mask if masked else torch.ones(T, T, dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ wide[2]
        (expected.square().sum() + (scores.logsumexp(-1) * torch.arange(T)).sum()).backward()
        for a, b in zip(tensors, exact, strict=True):
            error = (a.grad.double() - b.grad).norm() / b.grad.norm()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2), (dtype, head_dim, error)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_numbers_of_a_head_need_not_lie_together(capability: tuple[int, int], masked: bool, on_cuda: Any) -> None:
    """Kernels want them so, and may read a wrong place otherwise."""
    device = on_cuda(capability)
    for head_dim in (64, 100):
        tensors = [torch.randn(2, 4, head_dim, T).half().mT.requires_grad_() for _ in range(3)]
        mask = torch.eye(T, dtype=torch.bool)[None, None] if masked else None
        output, lse = attend(*tensors, scale=0.1, causal=not masked, mask=mask)
        (output.float().square().sum() + lse.sum()).backward()
    assert len(device.calls) == 4


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("head_dim", [5, 100, 128])
def test_torchs_own_operators_take_what_they_are_given(kernel: str, head_dim: int) -> None:
    """Arguments, their order and what comes back, without a GPU and without numbers."""
    for heads, masked in itertools.product((2, 4), (False,) if kernel == "flash" else (False, True)):
        queries, keys, bias = (
            torch.empty(shape, dtype=torch.float16, device="meta")
            for shape in ((2, 4, T, head_dim), (2, heads, T, head_dim), (2, 1, 1, T))
        )
        settings: Any = {"scale": 0.1, "causal": not masked, "bias": bias if masked else None}
        output, lse = kernels.run(kernel, queries, keys, keys, **settings)
        assert (output.shape, output.dtype) == (queries.shape, queries.dtype)
        assert (lse.shape, lse.dtype) == (queries.shape[:3], torch.float32)
        grads = kernels.backward(kernel, output, queries, keys, keys, output, lse, **settings)
        assert [grad.shape for grad in grads] == [queries.shape, keys.shape, keys.shape]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_crossbatch_trains_by_kernels(capability: tuple[int, int], on_cuda: Any, monkeypatch: Any) -> None:
    """Forward and backward, with a discount and padding, and with fewer KV heads."""
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, T, 100), *[(3, 2, T, 100)] * 4]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    rows = [torch.tensor(chosen, dtype=torch.int64) for chosen in ([], [0], [0, 1])]
    padding = torch.zeros(3, T, dtype=torch.bool)
    padding[0, :4] = True
    for contexts in (Contexts(rows), Contexts(rows, padding, full_weight_tokens=T)):
        exact = [tensor.double().requires_grad_() for tensor in tensors]
        attend_batch(*exact, contexts, scale=0.1).square().sum().backward()
        with monkeypatch.context():
            device = on_cuda(capability)
            monkeypatch.setattr(memory.softmax, "_attend_naive", None)
            found = [tensor.clone().requires_grad_() for tensor in tensors]
            attend_batch(*found, contexts, scale=0.1).float().square().sum().backward()
            assert any("backward" in call for call in device.calls)
            monkeypatch.undo()
        for a, b in zip(found, exact, strict=True):
            assert (a.grad.double() - b.grad).norm() < 3e-2 * b.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [2, 4])
def test_gradients_on_the_cpu(heads: int, dtype: torch.dtype) -> None:
    """By its kernel, and in float64, for which there is none."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, count, T, 12, generator=generator).to(dtype).requires_grad_() for count in (4, heads, heads)
    ]
    output, lse = attend(*tensors, scale=0.3, causal=True)
    assert ("FusedAttention" in type(output.grad_fn).__name__) == (dtype == torch.float32)
    found = torch.autograd.grad(output.square().sum() + (lse * torch.arange(T)).sum(), tensors)
    q, k, v = (t if t.shape[1] == 4 else t.repeat_interleave(2, dim=1) for t in tensors)
    scores = (0.3 * q @ k.mT).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    loss = (scores.softmax(-1) @ v).square().sum() + (scores.logsumexp(-1) * torch.arange(T)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, tensors), atol=1e-3, rtol=1e-4)


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
