"""Memorizing Transformers: its gate and nearest keys against the paper's formula, in training and in reading."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PAPER, WINDOW, ModelMaker
from train_helpers import SMALL, losses, train
from transformers import LlamaForCausalLM

import fot
from fot.evaluation import distraction
from training.crossbatch import Contexts, enable_crossbatch
from training.methods.memorizing import GATE, Memorizing, add_gates, add_memory
from training.recipe import Recipe
from training.setup import check_contexts

TOP_K = 3


def by_the_formula(queries: Any, local: Any, keys: Any, values: Any, gates: Any, scale: float) -> torch.Tensor:
    """g V_m + (1 - g) V_c, a head and a query at a time, over the ``TOP_K`` nearest keys."""
    output = torch.empty_like(local)
    for head in range(len(queries)):
        group = head * len(keys) // len(queries)
        for place, query in enumerate(queries[head]):
            scores = torch.stack([scale * query @ key for key in keys[group]])
            nearest = scores.argsort(descending=True)[:TOP_K]
            weights = scores[nearest].exp() / scores[nearest].exp().sum()
            found = sum(weight * values[group][one] for weight, one in zip(weights, nearest, strict=True))
            output[head, place] = gates[head] * found + (1 - gates[head]) * local[head, place]
    return output


def test_gate_and_nearest_keys_are_the_papers() -> None:
    torch.manual_seed(0)
    queries, local = torch.randn(3, 4, 5, 8), torch.randn(3, 4, 5, 8)
    keys, values, bias = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(4)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    contexts = Contexts([torch.tensor([], dtype=torch.int64), torch.tensor([0]), torch.tensor([0, 1])], hidden)
    found = add_memory(queries, local, keys, values, contexts, bias, top_k=TOP_K, scale=0.4)
    assert torch.equal(found[0], local[0])
    expected = by_the_formula(queries[1], local[1], keys[0], values[0], bias.sigmoid(), 0.4)
    torch.testing.assert_close(found[1], expected)
    both = [torch.cat([tensor[0], tensor[1][:, :3]], dim=1) for tensor in (keys, values)]
    torch.testing.assert_close(found[2], by_the_formula(queries[2], local[2], *both, bias.sigmoid(), 0.4))


@pytest.mark.parametrize("positionals", [True, False])
@torch.no_grad()
def test_reading_is_what_training_computes(positionals: bool, make_plain: ModelMaker, ids: Any) -> None:
    """A window after another of its document, in a batch and from a memory; gates as settings."""
    gates = torch.tensor([[-1.0, 0.0, 2.0, 0.5], [1.0, -2.0, 0.3, 0.0]])
    config = fot.MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, index="exact", top_k=TOP_K,
                              isolated_windows=True, mem_positionals=positionals, **PAPER)  # fmt: skip
    windows, plain = ids(WINDOW, rows=2), make_plain("qwen3")
    resolved = config.resolve(5, 64, "float32")
    add_gates(plain, resolved)
    for layer, bias in zip((1, 3), gates, strict=True):
        getattr(plain.model.layers[layer].self_attn, GATE).copy_(bias)
    switch = enable_crossbatch(plain, resolved, Memorizing)
    switch.contexts = Contexts([torch.tensor([], dtype=torch.int64), torch.tensor([0])])
    expected = plain(windows, use_cache=False).logits[1]

    settings = {**config.to_dict(), "memory_gates": gates.sigmoid().tolist()}
    model = fot.attach_memory(make_plain("qwen3"), fot.MemoryConfig.from_dict(settings))
    memory = model.new_memory()
    model.ingest(windows[0], memory)
    found = model(windows[1:], memory=memory).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    ungated = fot.attach_memory(make_plain("qwen3"), config)
    assert not torch.allclose(ungated(windows[1:], memory=memory).logits[0], expected, atol=1e-2)
    scores = distraction.context_scores(model, windows[1], [memory])[1]
    torch.testing.assert_close((scores.newest - scores.all).exp(), gates[0].sigmoid().unsqueeze(-1).expand(4, WINDOW))


def test_no_gradient_reaches_the_memory(make_plain: ModelMaker, ids: Any) -> None:
    """The window in memory gets none, its gate does; with crossbatch it gets some."""
    config = fot.MemoryConfig(mem_layers=(1,), local_context=WINDOW, top_k=TOP_K, index="exact", **PAPER)
    found = {}
    for kind in (Memorizing, None):
        plain = make_plain()
        resolved = config.resolve(5, 64, "float32")
        add_gates(plain, resolved)
        switch = enable_crossbatch(plain, resolved, *([kind] if kind else []))
        switch.contexts = Contexts([torch.tensor([], dtype=torch.int64), torch.tensor([0])])
        embedded = plain.get_input_embeddings()(ids(WINDOW, rows=2)).detach().requires_grad_()
        plain.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[1, :, 0].sum().backward()
        found[kind] = embedded.grad[0].abs().sum().item()
        gate = getattr(plain.model.layers[1].self_attn, GATE).grad
        assert (gate is not None and gate.abs().min() > 0) == (kind is Memorizing)
    assert found[Memorizing] == 0
    assert found[None] > 0


RECIPE = SMALL | {"method": "memorizing", "contexts": {},
                  "memory": SMALL["memory"] | {"top_k": 8, "index": "exact"}}  # fmt: skip


@pytest.mark.parametrize("trainable", ["all", "memory", "lora"])
def test_runs_learn_gates_and_their_results_have_them(trainable: str, tmp_path: Path) -> None:
    recipe, out, base = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "base"
    settings = dict(RECIPE)
    if trainable != "all":
        recipe.write_text(yaml.safe_dump(SMALL))
        assert train(recipe, base, "steps=1") == 0
        settings |= {"model": str(base / "model"), "trainable": trainable}
    recipe.write_text(yaml.safe_dump(settings))
    assert train(recipe, tmp_path / "whole", "steps=4") == 0
    assert train(recipe, out, "steps=2") == 0
    assert train(recipe, out, "steps=4", "--resume") == 0
    assert losses(out) == losses(tmp_path / "whole")
    folder = out / ("model" if trainable == "all" else "adapter")
    model = fot.FoTForCausalLM.from_pretrained(folder)
    (gates,) = model.memory_config.memory_gates
    assert len(gates) == 4
    assert all(one != 0.5 for one in gates)
    assert not any(GATE in name for name in model.state_dict())
    if trainable == "all":
        plain, about = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not about["unexpected_keys"]
        assert not about["missing_keys"]
        assert plain.config.fot_memory["memory_gates"] == [list(gates)]


def test_contexts_are_earlier_windows_of_the_own_document() -> None:
    recipe = Recipe(**RECIPE)
    assert recipe.schedule().segments == ((1, 0),)
    check_contexts(recipe)
    with pytest.raises(ValueError, match=r"contexts.segments\[0\] is \[2, 0\]"):
        check_contexts(Recipe(**RECIPE | {"contexts": {"previous_windows": 2}}))


@pytest.mark.parametrize(("changes", "words"), [
    ({"memory": SMALL["memory"]}, "memory.top_k is not given"),
    ({"contexts": {"values": [4]}}, "contexts.values is"),
    ({"contexts": {"copies": 4}}, "contexts.copies is 4"),
    ({"memory": RECIPE["memory"] | {"memory_gates": [[0.5] * 4]}}, "omit memory_gates"),
    ({"length": 64}, "length is 64"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**RECIPE | changes)


def test_gates_are_checked(make_model: ModelMaker, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_gates has 1.0"):
        fot.MemoryConfig(memory_gates=((0.5, 1.0),))
    with pytest.raises(ValueError, match="memory_gates are of 1 layers"):
        make_model(memory_gates=((0.5,) * 4,))
    model = make_model(memory_gates=((0.5, 0.5),) * 2)
    memory = model.new_memory()
    with pytest.raises(ValueError, match="2 numbers for a layer of 4 heads"):
        model.ingest(ids(3 * WINDOW), memory)
