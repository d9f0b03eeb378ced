"""The same numbers on a CUDA device, without waiting for it in the decoding loop. Run with ``pytest -m gpu``."""

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import WINDOW, ModelMaker

from memory import Memory, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

Draw = Callable[..., torch.Tensor]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_logits_equal_those_of_the_cpu(family: str, make_model: ModelMaker, ids: Draw) -> None:
    tokens = ids(5 * WINDOW)
    expected = make_model(family)(tokens).logits
    torch.backends.cuda.matmul.allow_tf32 = False
    found = make_model(family).to("cuda")(tokens.cuda()).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("memory_device", [None, "cpu"])
def test_memory_on_either_device(memory_device: str | None, make_model: ModelMaker, ids: Draw) -> None:
    tokens, prompt = ids(5 * WINDOW), ids(10, seed=1)
    reference = make_model()
    memory = reference.new_memory()
    reference.ingest(tokens, memory)
    expected = reference(prompt, memory=memory).logits
    model = make_model(memory_device=memory_device).to("cuda")
    memory = model.new_memory()
    model.ingest(tokens, memory)
    assert memory[1].device.type == (memory_device or "cuda")
    found = model(prompt.cuda(), memory=memory).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_generated_token_does_not_wait_for_the_device(
    make_model: ModelMaker, ids: Draw, request: pytest.FixtureRequest
) -> None:
    model = make_model().to("cuda", torch.bfloat16)
    cache = model(ids(3 * WINDOW + 2).cuda()).past_key_values
    token = ids(1).cuda()
    model(token, past_key_values=cache)  # warm up
    request.getfixturevalue("no_waiting")
    model(token, past_key_values=cache)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", [5, 64, 100, 128, 250, 320])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_with_its_log_sum_exp(dtype: torch.dtype, head_dim: int, masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 67, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    mask = (torch.rand(2, 1, 67, 67, device="cuda") > 0.5) | torch.eye(67, dtype=torch.bool, device="cuda")
    for causal in (False,) if masked else (False, True):
        scale, given = head_dim**-0.5, mask if masked else None
        output, lse = attend(q, k, v, scale=scale, causal=causal, mask=given)
        cpu = [tensor.cpu().float() for tensor in (q, k, v)]
        expected, expected_lse = attend(*cpu, scale=scale, causal=causal, mask=None if given is None else given.cpu())
        torch.testing.assert_close(output.cpu().float(), expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected_lse, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", [5, 64, 100, 128, 250])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_attention_and_its_log_sum_exp(dtype: torch.dtype, head_dim: int, masked: bool) -> None:
    """Against float64 on the CPU, with fewer KV heads than query heads."""
    tensors = [torch.randn(2, heads, 67, head_dim).to(dtype) for heads in (4, 2, 2)]
    mask = (torch.rand(2, 1, 67, 67) > 0.5) | torch.eye(67, dtype=torch.bool) if masked else None
    gradients = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        given = [tensor.to(device, kind).requires_grad_() for tensor in tensors]
        seen = None if mask is None else mask.to(device)
        output, lse = attend(*given, scale=head_dim**-0.5, causal=not masked, mask=seen)
        (output.double().square().sum() + lse.double().sum()).backward()
        gradients.append([tensor.grad.cpu().double() for tensor in given])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < (1e-3 if dtype == torch.float32 else 3e-2) * b.norm()


def test_store_on_the_device() -> None:
    memory = Memory((0,), 2, 64, index="exact", device="cuda", key_dtype="bfloat16", value_dtype="int8")
    keys, values = torch.randn(2, 5000, 64), torch.randn(2, 5000, 64)
    memory.append({0: keys}, {0: values}, range(5000))
    assert memory[0].device.type == "cuda"
    scores, slots = memory[0].search(keys[:, :10], 3)
    assert slots[..., 0].tolist() == [list(range(10))] * 2
    assert scores.device.type == "cpu"


def test_generate_equals_the_cpu(make_model: ModelMaker, ids: Draw) -> None:
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 2 * WINDOW}
    prompt = ids(4 * WINDOW)
    expected = make_model().generate(prompt, **options)
    assert make_model().to("cuda").generate(prompt.cuda(), **options).tolist() == expected.tolist()
