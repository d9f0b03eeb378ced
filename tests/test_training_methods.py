"""Methods that train on whole sequences: their attention, their positions, what they train, and runs that load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ModelMaker
from train_helpers import losses, train
from transformers import AutoModelForCausalLM

import fot
from training.batches import DocumentLoader
from training.methods import METHODS, longlora
from training.recipe import Recipe, load_recipe
from training.setup import build_loader, build_model, choose_trainable

WHOLE = [name for name, method in METHODS.items() if method.whole]
STRETCHED = [name for name, method in METHODS.items() if method.rope is not None]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in "abc":
        lines = (f"{name}{number} bottles hang on the wall of room {number * 7 % 91}.\n" for number in range(40))
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def settings(checkpoint: Path, texts: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "longlora", "model": str(checkpoint), "length": 64, "factor": 2, "windows": 1, "lanes": 2,
        "trainable": "lora", "lora": {"r": 4}, "sources": [{"path": str(texts / "[ab].txt")}],
        "held_out": [{"path": str(texts / "c.txt")}], "learning_rate": 0.01, "steps": 4, "save_every": 2,
        "eval_batches": 1, "dtype": "float32",
    } | changes  # fmt: skip


def seen_by_hand(length: int, heads: int) -> torch.Tensor:
    """(heads, T, T): what LongLoRA's groups let each token see, written out token by token."""
    size = length // 4
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        ahead = 0 if head < heads // 2 else size // 2  # groups of the second half begin half a group earlier
        for query in range(length):
            for key in range(query + 1):
                seen[head, query, key] = (query + ahead) // size == (key + ahead) // size
    return seen


@pytest.mark.parametrize("heads", [4, 3])
def test_shifted_groups_are_those_of_a_mask_written_by_hand(heads: int) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module().train()
    queries, keys, values = (torch.randn(2, count, 32, 8) for count in (heads, 1, 1))
    found, _ = longlora.shifted_sparse(module, queries, keys, values, None, scaling=0.3)
    scores = (0.3 * queries @ keys.mT).masked_fill(~seen_by_hand(32, heads), -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ values).transpose(1, 2))


def test_groups_are_of_training_alone(make_plain: ModelMaker, ids: Any) -> None:
    model, text = make_plain("qwen3"), ids(32)
    full = model(text).logits
    model.set_attn_implementation(longlora.NAME)
    torch.testing.assert_close(model(text).logits, full)
    assert not torch.allclose(model.train()(text).logits, full)


def test_frequencies_and_length_of_stretched_models(make_plain: ModelMaker) -> None:
    plain = make_plain()
    before = plain.model.rotary_emb.inv_freq.clone()
    for name in ("interpolation", "longlora", "yarn"):
        model = make_plain()
        METHODS[name].stretch(model, 4.0)
        assert model.config.max_position_embeddings == 256
        rotary = model.model.rotary_emb
        if name == "yarn":
            assert rotary.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
            assert model.config.rope_parameters["original_max_position_embeddings"] == 64
            assert rotary.inv_freq[-1] == pytest.approx(before[-1] / 4)
        else:
            torch.testing.assert_close(rotary.inv_freq, before / 4)
    crossbatch = make_plain()
    METHODS["crossbatch"].stretch(crossbatch, 4.0)
    assert crossbatch.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize("method", WHOLE)
def test_what_is_trained(method: str, checkpoint: Path, texts: Path) -> None:
    recipe = Recipe(**settings(checkpoint, texts, method=method, factor=2 if method in STRETCHED else 1))
    model, config, _ = build_model(recipe)
    trained = choose_trainable(model, recipe, config)
    besides = {name for name in trained if "lora_" not in name}
    parts = {"longlora": ("norm", "embed"), "landmark": ("embed",)}.get(method, ())
    assert besides == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert len(trained) - len(besides) == 4 * 4 * 2
    assert method != "longlora" or len(besides) == 1 + 2 * 4 + 1


def test_a_sequence_is_of_one_document(checkpoint: Path, texts: Path) -> None:
    recipe = Recipe(**settings(checkpoint, texts))
    _, config, tokenizer = build_model(recipe)
    loader = build_loader(recipe, config, tokenizer)
    assert isinstance(next(iter(loader._loaders.values())), DocumentLoader)
    for _ in range(40):
        batch = next(loader)
        assert batch.input_ids.shape == (2, 64)
        for row, padding in zip(batch.content, batch.padding, strict=True):
            assert len(set(row[~padding].tolist())) <= 1


@pytest.mark.parametrize("method", STRETCHED)
def test_a_run_is_resumed_and_its_result_is_a_plain_model(method: str, checkpoint: Path, texts: Path,
                                                          tmp_path: Path) -> None:  # fmt: skip
    recipe, whole, parts = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "parts"
    recipe.write_text(yaml.safe_dump(settings(checkpoint, texts, method=method)))
    assert train(recipe, whole) == 0
    assert train(recipe, parts, "steps=2") == 0
    assert train(recipe, parts, "steps=4", "--resume") == 0
    assert losses(parts) == losses(whole)
    assert losses(whole)[-1][1] < losses(whole)[0][1]
    model: Any = AutoModelForCausalLM.from_pretrained(whole / "model").eval()
    before: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config.max_position_embeddings == 128
    assert model.config.rope_parameters["rope_type"] == ("yarn" if method == "yarn" else "linear")
    assert list(model.state_dict()) == list(before.state_dict())
    # The result's loss on the held-out text, in full attention, is what the run said.
    _, _, tokenizer = build_model(load_recipe(whole / "recipe.json"))
    text = tokenizer((texts / "c.txt").read_text(), return_tensors="pt").input_ids
    framed = torch.cat([torch.tensor([[1]]), text, torch.tensor([[2]])], dim=1)[0]
    last = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    with torch.no_grad():
        found = [
            torch.nn.functional.cross_entropy(model(piece[None]).logits[0, :-1], piece[1:]).item()
            for piece in framed.split(64)[:-1]
        ]
    assert min(found) <= last["held_out_loss"] <= max(found)
    reader = fot.FoTForCausalLM.from_pretrained(whole / "model")
    assert reader.config.max_position_embeddings == 128


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": "longlore"}, ["method is 'longlore'", "crossbatch", "longlora"]),
    ({"method": "crossbatch"}, ["length is 64", "omit length"]),
    ({"method": "crossbatch", "length": None}, ["factor is 2", "omit factor"]),
    ({"factor": 0.5}, ["factor is 0.5", "at least 1"]),
    ({"method": "landmark"}, ["factor is 2", "omit factor"]),
    ({"length": None}, ["length is not given", "set length"]),
    ({"length": 60}, ["60 tokens", "multiple of 8"]),
    ({"length": 640}, ["length is 640", "128 positions", "lower length"]),
    ({"windows": 2}, ["windows is 2", "set windows: 1"]),
    ({"trainable": "memory", "lora": {}}, ["trainable is 'memory'", "set trainable: lora"]),
    ({"trainable": "all", "lora": {}}, ["trainable is 'all'", "trains a LoRA"]),
    ({"memory": {"mem_layers": [1]}}, ["memory is {'mem_layers'", "omit memory"]),
    ({"contexts": {"values": [1]}}, ["contexts is {'values'", "omit contexts"]),
    ({"held_out_memory": [64]}, ["held_out_memory is [64]", "omit held_out_memory"]),
    ({"tasks": [{"kind": "dictionary"}]}, ["tasks is [", "omit tasks"]),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_what_does_not_fit_a_method_is_one_line(changes: dict[str, Any], words: list[str], checkpoint: Path,
                                                texts: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(settings(checkpoint, texts, **changes)))
    assert train(recipe, out) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    assert not out.exists()


def test_a_model_that_is_stretched_already_is_refused(checkpoint: Path, texts: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(settings(checkpoint, texts, steps=1, save_every=1)))
    assert train(recipe, out) == 0
    capsys.readouterr()
    assert train(recipe, tmp_path / "again", f"model={out / 'model'}") == 2
    assert "stretched already" in capsys.readouterr().err


def test_tuned_recipes_have_one_budget() -> None:
    """The panel's recipes: the same model, texts, tokens, optimiser and LoRA."""
    recipes = {method: load_recipe(f"tuned-{method}") for method in METHODS}
    for method, recipe in recipes.items():
        assert recipe.method == method
        window = recipe.length or recipe.memory_config().window
        assert recipe.lanes * recipe.windows * window == 2048
    own = ("method", "length", "factor", "lanes", "windows", "memory", "contexts")
    shared = [{key: value for key, value in recipe.to_dict().items() if key not in own} for recipe in recipes.values()]
    assert all(one == shared[0] for one in shared)
