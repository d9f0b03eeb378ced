"""Crossbatch: what a layer computes in training is what it computes at inference, and gradients are exact."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SHAPE, WINDOW, ModelMaker
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

import fot
from fot.config import MemoryConfig
from training import crossbatch as cb

Draw = Callable[..., torch.Tensor]

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def contexts(*rows: list[int], padding: torch.Tensor | None = None) -> cb.Contexts:
    return cb.Contexts([torch.tensor(row, dtype=torch.int64) for row in rows], padding)


def tensors(rows: int = 3, length: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """queries, keys, values, context keys, context values: 4 query heads on 2 KV heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, 4, length, 8), *[(rows, 2, length, 8)] * 2, *[(5, 2, length, 8)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def one_softmax(
    q: Any, k: Any, v: Any, ck: Any, cv: Any, chosen: cb.Contexts, scale: float, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Row by row, keys laid end to end, behind a learnt sink if there is one; one mask, one softmax."""
    rows, T = [], q.shape[2]  # noqa: N806
    for row, others in enumerate(chosen.rows):
        keys = torch.cat([k[row], *(ck[other] for other in others)], dim=1).repeat_interleave(2, dim=0)
        values = torch.cat([v[row], *(cv[other] for other in others)], dim=1).repeat_interleave(2, dim=0)
        seen = torch.cat([torch.ones(T, T).tril(), torch.ones(T, keys.shape[1] - T)], dim=1).bool()
        if chosen.padding is not None and len(others):
            seen[:, T:] &= ~chosen.padding[others].flatten()
        scores = (scale * q[row] @ keys.mT).masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([sinks.view(-1, 1, 1).expand(-1, T, 1), scores], dim=-1)
        rows.append(scores.softmax(-1)[..., -keys.shape[1] :] @ values)
    return torch.stack(rows)


CHOICES = {
    "none": contexts([], [], []),
    "equal": contexts([1, 4], [0, 2], [3, 4]),
    "unequal": contexts([], [0], [0, 1, 4]),
    "shared": contexts([2, 3], [2, 3], [2, 3]),
}
PADDING = torch.zeros(5, 7, dtype=torch.bool)
PADDING[2, 4:] = PADDING[4, 6:] = True


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("path", ["fused", "recomputed"])
def test_output_and_gradients_equal_one_softmax(
    path: str, choice: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "recomputed":
        monkeypatch.setattr(cb, "fused_backward_fits", lambda queries: False)
    chosen = cb.Contexts(CHOICES[choice].rows, PADDING if padded else None)
    given = tensors()
    weight = torch.randn(3, 4, 7, 8, generator=torch.Generator().manual_seed(9))
    output = cb.attend_batch(*given, chosen, scale=0.4)
    expected = one_softmax(*given, chosen, 0.4)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((output * weight).sum(), given, allow_unused=True)
    right = torch.autograd.grad((expected * weight).sum(), given, allow_unused=True)
    for tensor, one, other in zip(given, found, right, strict=True):
        gradients = [torch.zeros_like(tensor) if gradient is None else gradient for gradient in (one, other)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("path", ["fused", "recomputed"])
def test_learnt_sinks_are_in_the_softmax(path: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient, that of the sinks included."""
    if path == "recomputed":
        monkeypatch.setattr(cb, "fused_backward_fits", lambda queries: False)
    chosen = cb.Contexts(CHOICES[choice].rows, PADDING)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0], requires_grad=True)
    given = tensors()
    weight = torch.randn(3, 4, 7, 8, generator=torch.Generator().manual_seed(9))
    output = cb.attend_batch(*given, chosen, scale=0.4, learnt_sinks=sinks)
    expected = one_softmax(*given, chosen, 0.4, sinks)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert (output - cb.attend_batch(*given, chosen, scale=0.4)).abs().max() > 0.1
    inputs = [*given, sinks] if choice != "none" else [*given[:3], sinks]
    found = torch.autograd.grad((output * weight).sum(), inputs)
    right = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("path", ["fused", "recomputed"])
def test_copies_count_as_listing_a_row_as_often(path: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "recomputed":
        monkeypatch.setattr(cb, "fused_backward_fits", lambda queries: False)
    padding = PADDING if padded else None
    copies = [torch.tensor([3.0, 1.0]), torch.tensor([]), torch.tensor([2.0])]
    counted = cb.Contexts(contexts([1, 4], [], [2]).rows, padding, copies)
    listed = contexts([1, 1, 1, 4], [], [2, 2], padding=padding)
    given = tensors()
    weight = torch.randn(3, 4, 7, 8, generator=torch.Generator().manual_seed(9))
    output, expected = (cb.attend_batch(*given, chosen, scale=0.4) for chosen in (counted, listed))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((output * weight).sum(), given)
    right = torch.autograd.grad((expected * weight).sum(), given)
    for gradient, other in zip(found, right, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)
    once = cb.attend_batch(*given, cb.Contexts(counted.rows, padding), scale=0.4)
    assert (output - once).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    torch.testing.assert_close(output[1], once[1])


def test_bfloat16_gradients_are_close() -> None:
    given = tensors(dtype=torch.bfloat16, length=64)
    chosen = CHOICES["unequal"]
    found = torch.autograd.grad(cb.attend_batch(*given, chosen, scale=0.4).float().square().sum(), given)
    wide = [tensor.detach().float().requires_grad_() for tensor in given]
    right = torch.autograd.grad(one_softmax(*wide, chosen, 0.4).square().sum(), wide)
    for one, other in zip(found, right, strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.02


@pytest.fixture
def trained(make_plain: ModelMaker) -> Callable[..., tuple[Any, cb.Crossbatch]]:
    """family, settings -> a plain model with crossbatch in layers 1 and 3."""

    def make(family: str = "llama", **settings: Any) -> tuple[Any, cb.Crossbatch]:
        model = make_plain(family)
        config = MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, **settings).resolve(5, 64, "float32")
        return model, cb.enable_crossbatch(model, config)

    return make


@pytest.mark.parametrize("positionals", [True, False])
@torch.no_grad()
def test_train_time_equals_inference_time(
    positionals: bool, family: str, trained: Any, make_model: ModelMaker, ids: Draw
) -> None:
    """The second window's logits with the first as its context are those of ingesting the first, then reading it."""
    windows = ids(WINDOW, rows=2)
    model, crossbatch = trained(family, mem_positionals=positionals)
    crossbatch.contexts = contexts([], [0])
    logits = model(windows, use_cache=False).logits
    reader = make_model(family, mem_positionals=positionals)
    memory = reader.new_memory()
    reader.ingest(windows[:1], memory)
    torch.testing.assert_close(logits[1:], reader(windows[1:], memory=memory).logits, **CLOSE)
    crossbatch.contexts = None
    assert (model(windows, use_cache=False).logits[1] - logits[1]).abs().max() > 0.05


@pytest.mark.parametrize("positionals", [True, False])
@torch.no_grad()
def test_scaled_rotary_positions_equal_inference_time(positionals: bool, ids: Draw) -> None:
    """YaRN multiplies rotated keys by a factor; those of other windows have it, too."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    found, windows = [], ids(WINDOW, rows=2)
    for trains in (True, False):
        set_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, rope_parameters=yarn)).eval()
        config = MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, mem_positionals=positionals)
        if trains:
            cb.enable_crossbatch(model, config.resolve(5, 64, "float32")).contexts = contexts([], [0])
            found.append(model(windows, use_cache=False).logits[1:])
        else:
            memory = fot.attach_memory(model, config).new_memory()
            model.ingest(windows[:1], memory)
            found.append(model(windows[1:], memory=memory).logits)
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@torch.no_grad()
def test_chain_of_windows_equals_inference_time(family: str, trained: Any, make_model: ModelMaker, ids: Draw) -> None:
    """Three windows, each with all before it: the third reads a memory whose second window read the first."""
    windows = ids(WINDOW, rows=3)
    model, crossbatch = trained(family)
    crossbatch.contexts = contexts([], [0], [0, 1])
    logits = model(windows, use_cache=False).logits
    reader = make_model(family)
    memory = reader.new_memory()
    reader.ingest(windows[:2].flatten(), memory)
    torch.testing.assert_close(logits[2:], reader(windows[2:], memory=memory).logits, **CLOSE)


@torch.no_grad()
def test_isolated_windows_equal_inference_time(family: str, trained: Any, make_model: ModelMaker, ids: Draw) -> None:
    """Three windows: the third alone reads the first two, which were stored without reading one another."""
    windows = ids(WINDOW, rows=3)
    model, crossbatch = trained(family, isolated_windows=True)
    crossbatch.contexts = contexts([], [], [0, 1])
    logits = model(windows, use_cache=False).logits
    reader = make_model(family, isolated_windows=True)
    memory = reader.new_memory()
    reader.ingest(windows[:2].flatten(), memory)
    torch.testing.assert_close(logits[2:], reader(windows[2:], memory=memory).logits, **CLOSE)
    crossbatch.contexts = contexts([], [0], [0, 1])
    assert (model(windows, use_cache=False).logits[2] - logits[2]).abs().max() > 1e-2


@torch.no_grad()
def test_without_contexts_the_model_is_untouched(
    family: str, trained: Any, make_plain: ModelMaker, make_model: ModelMaker, ids: Draw
) -> None:
    windows = ids(WINDOW, rows=3)
    model, crossbatch = trained(family)
    plain = make_plain(family)(windows).logits
    torch.testing.assert_close(model(windows, use_cache=False).logits, plain, **CLOSE)
    crossbatch.contexts = contexts([], [], [])
    torch.testing.assert_close(model(windows, use_cache=False).logits, plain, **CLOSE)
    cb.disable_crossbatch(model, crossbatch)
    torch.testing.assert_close(model(windows).logits, plain, atol=0, rtol=0)
    with_memory = make_model(family)
    expected = with_memory(ids(40)).logits
    switch = cb.enable_crossbatch(with_memory, with_memory.memory_config)
    cb.disable_crossbatch(with_memory, switch)
    torch.testing.assert_close(with_memory(ids(40)).logits, expected, atol=0, rtol=0)


@torch.no_grad()
def test_no_leak(trained: Any, ids: Draw) -> None:
    """Only a row itself, its chosen rows and the rows those saw change its logits; each chosen row does."""
    windows = ids(WINDOW, rows=5)
    model, crossbatch = trained()
    crossbatch.contexts = contexts([], [0, 3], [0, 1], [], [])
    before = model(windows, use_cache=False).logits
    reach = {0: {0}, 1: {0, 1, 3}, 2: {0, 1, 2, 3}, 3: {3}, 4: {4}}
    for changed in range(5):
        other = windows.clone()
        other[changed] = ids(WINDOW, seed=100 + changed)
        difference = (model(other, use_cache=False).logits - before).abs().amax((1, 2))
        for row in range(5):
            if changed in reach[row]:
                assert difference[row] > 1e-3
            else:
                assert difference[row] == 0


def test_gradient_checkpointing_covers_memory_layers(trained: Any, ids: Draw) -> None:
    windows = ids(WINDOW, rows=3)
    model, crossbatch = trained()
    crossbatch.contexts = contexts([], [0], [0, 1])
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(windows, use_cache=False, labels=windows).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    runs = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *args: runs.append(1))
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    checkpointed = gradients()
    handle.remove()
    assert len(runs) == 2, "the memory layer is recomputed too"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


def test_gradients_reach_the_contexts(trained: Any, ids: Draw) -> None:
    """The loss of the second window alone moves what the first window stores."""
    windows = ids(WINDOW, rows=2)
    model, crossbatch = trained()
    crossbatch.contexts = contexts([], [0])
    embedded = model.model.embed_tokens(windows).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits[1].square().mean().backward()
    assert embedded.grad[0].abs().max() > 1e-6


def test_attention_mass_is_what_each_context_got(trained: Any, ids: Draw) -> None:
    windows = ids(WINDOW, rows=3)
    model, crossbatch = trained()
    crossbatch.contexts = contexts([], [0], [0, 1])
    crossbatch.attention_mass = []
    with torch.no_grad():
        model(windows, use_cache=False)
    assert [layer for layer, _ in crossbatch.attention_mass] == [1, 3]
    for _, shares in crossbatch.attention_mass:
        assert [len(share) for share in shares] == [0, 1, 2]
        assert all(0 < share.sum() < 1 for share in shares[1:])


def test_result_is_a_plain_checkpoint(trained: Any, make_plain: ModelMaker) -> None:
    model, _ = trained()
    assert list(model.state_dict()) == list(make_plain().state_dict())
    copied = copy.deepcopy(model.state_dict())
    assert fot.attach_memory(make_plain()).load_state_dict(copied).missing_keys == []


def test_bfloat16_autocast(family: str, make_plain: ModelMaker, ids: Draw) -> None:
    """Norms of queries and keys leave float32 behind, the rest bfloat16: one attention takes both."""
    model = make_plain(family)
    crossbatch = cb.enable_crossbatch(model, MemoryConfig(mem_layers=(1, 3), local_context=WINDOW))
    crossbatch.contexts = contexts([], [0])
    exact = model(ids(WINDOW, rows=2), use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids(WINDOW, rows=2), use_cache=False).logits
    rounded.float().sum().backward()
    difference = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < difference < 0.05  # bfloat16 has 8 bits; the same layers, not others
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
