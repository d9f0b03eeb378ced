"""Wrong recipes: one line with the key, the value and a remedy, status 2, and nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from train_helpers import SMALL, losses, train, write_recipe

from training.data import read_documents
from training.rates import learning_rate_at
from training.recipe import Recipe, load_recipe
from training.sources import DataSource

DICTIONARY = {"kind": "dictionary"}

# Changes to a recipe of synthetic documents, and what the line must hold: the key and the value, or more.
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"sources": "texts"}, ["sources is 'texts'", "list of mappings such as"]),
    ({"sources": ["texts"]}, ["sources[0] is 'texts'", "mapping such as {path:"]),
    ({"sources": {"path": "texts"}}, ["sources is {'path': 'texts'}", "list"]),
    ({"sources": [{"pth": "texts"}]}, ["sources[0].pth is 'texts'", "unknown entry 'pth'; known: ", "path"]),
    ({"sources": [{"path": 3}]}, ["sources[0].path is 3", "text"]),
    ({"sources": [{"path": "texts", "weight": -1}]}, ["sources[0]", "weight is -1"]),
    ({"sources": [{"path": "texts", "min_tokens": "few"}]}, ["sources[0].min_tokens is 'few'", "whole number"]),
    ({"sources": [{"path": "no/such/folder"}]}, ["sources[0]", "no/such/folder", "correct the path"]),
    ({"held_out": ["texts"]}, ["held_out[0] is 'texts'"]),
    ({"held_out": [{"path": "no/such/file.txt"}]}, ["held_out[0]", "no/such/file.txt"]),
    ({"tasks": "dictionary"}, ["tasks is 'dictionary'", "list"]),
    ({"tasks": ["dictionary"]}, ["tasks[0] is 'dictionary'", "{kind: dictionary}"]),
    ({"tasks": [{}]}, ["tasks[0]", "{}", "add kind: retrieval or kind: dictionary or kind: questions"]),
    ({"tasks": [{"kind": "lookup"}]}, ["tasks[0]", "kind is 'lookup'", "choose retrieval or dictionary or questions"]),
    ({"tasks": [{"kind": "questions", "path": "a.jsonl"}]}, ["tasks[0]", "no filler", "passages", "add filler: "]),
    ({"tasks": [{"kind": "questions", "filler": [{"path": "a"}]}]}, ["tasks[0]", "no path", "add path: "]),
    (
        {"tasks": [{"kind": "questions", "filler": [{"path": "pyproject.toml"}], "path": "no/such.jsonl"}]},
        ["tasks[0]", "no such file", "no/such.jsonl", "correct path"],
    ),
    ({"tasks": [{"kind": "retrieval"}]}, ["tasks[0]", "no filler", "add filler: "]),
    ({"tasks": [DICTIONARY, {"kind": "retrieval", "filler": []}]}, ["tasks[1].filler is []", "at least 1"]),
    (
        {"tasks": [{"kind": "retrieval", "filler": [{"path": "a"}, {"path": 3}]}]},
        ["tasks[0].filler[1].path is 3", "text"],
    ),
    (
        {"tasks": [{"kind": "retrieval", "filler": [{"path": "no/such/a.txt"}]}]},
        ["tasks[0].filler[0]", "no/such/a.txt"],
    ),
    (
        {"tasks": [{"kind": "retrieval", "filler": [{"path": "pyproject.toml"}]}]},
        ["tasks[0]", "kind is 'retrieval'", "no tokenizer"],
    ),
    ({"tasks": [DICTIONARY | {"simlar": 0.5}]}, ["tasks[0].simlar is 0.5", "known: ", "similar"]),
    ({"tasks": [DICTIONARY | {"similar": 2}]}, ["tasks[0].similar is 2", "at most 1"]),
    ({"tasks": [DICTIONARY | {"weight": 0}]}, ["tasks[0].weight is 0", "above 0"]),
    ({"tasks": [DICTIONARY | {"windows": 1}]}, ["tasks[0]", "windows is 1"]),
    ({"tasks": []}, ["nothing to train on"]),
    ({"lora": {"rr": 3}}, ["lora.rr is 3", "unknown entry 'rr'", "known: "]),
    ({"lora": {"r": 0}}, ["lora.r is 0", "at least 1"]),
    ({"lora": {"r": 4}}, ["lora is {'r': 4}", "set trainable: lora"]),
    ({"contexts": 3}, ["contexts is 3", "mapping"]),
    ({"contexts": {"kind": "maybe"}}, ["contexts.kind is 'maybe'", "constant, steps, ramp, accuracy, drawn"]),
    ({"contexts": {"valus": [1]}}, ["contexts.valus is [1]", "known: "]),
    ({"contexts": {"values": [-1]}}, ["contexts", "-1", "at least 0"]),
    ({"contexts": {"values": [40]}}, ["contexts.values[0] is 40", "4 lanes of 2 windows", "add lanes or windows"]),
    ({"contexts": {"segments": [[0, 0], [1, 30]]}}, ["contexts.segments[1] is [1, 30]", "add lanes"]),
    ({"contexts": {"segments": [[3, 0]]}}, ["contexts.segments[0] is [3, 0]", "windows"]),
    ({"contexts": {"segments": [[1]]}}, ["contexts.segments[0] is [1]", "too few"]),
    ({"betas": [0.9]}, ["betas is [0.9]", "too few"]),
    ({"betas": [0.9, 0.95, 0.99]}, ["betas is [0.9, 0.95, 0.99]"]),
    ({"betas": 0.9}, ["betas is 0.9", "list"]),
    ({"betas": [0.9, 1.5]}, ["betas[1] is 1.5", "below 1"]),
    ({"weight_decay": -0.1}, ["weight_decay is -0.1", "at least 0"]),
    ({"clip": -1}, ["clip is -1", "at least 0"]),
    ({"clip": "much"}, ["clip is 'much'", "number"]),
    ({"warmup_steps": 9}, ["warmup_steps is 9", "8 steps", "lower it"]),
    ({"decay_steps": 2}, ["decay_steps is 2", "warmup_stable_decay"]),
    ({"steps": True}, ["steps is True", "whole number"]),
    ({"steps": 2.5}, ["steps is 2.5", "whole number"]),
    ({"steps": [8]}, ["steps is [8]", "whole number"]),
    ({"lanes": 0}, ["lanes is 0", "at least 1"]),
    ({"eval_batches": 0}, ["eval_batches is 0", "at least 1"]),
    ({"learning_rate": float("inf")}, ["learning_rate is inf", "number"]),
    ({"learning_rate": 1e39}, ["learning_rate is 1e+39", "at most 1000"]),
    ({"learning_rate": None}, ["learning_rate is None", "number"]),
    ({"lr_schedule": "cosin"}, ["lr_schedule is 'cosin'", "constant, linear, cosine"]),
    ({"checkpointing": "perhaps"}, ["checkpointing is 'perhaps'", "true or false"]),
    ({"memory": [1]}, ["memory is [1]", "mapping"]),
    ({"memory": {"mem_layer": [1]}}, ["memory.mem_layer is [1]", "known: ", "mem_layers"]),
    ({"memory": {"mem_layers": "all"}}, ["memory.mem_layers is 'all'", "list"]),
    ({"memory": {"mem_layers": [7]}}, ["memory", "layer 7 is out of range"]),
    ({"memory": {"local_context": 0}}, ["memory", "local_context is 0", "at least 1"]),
    ({"memory": {"local_context": True}}, ["memory", "local_context is True", "whole number"]),
    ({"memory": {"local_context": 9999}}, ["memory", "local_context is 9999", "64 positions"]),
    ({"memory": {"index": "quick"}}, ["memory", "index 'quick'", "use exact"]),
    ({"model": ""}, ["model is ''"]),
    ({"model": 7}, ["model is 7"]),
    ({"model": "no/such/model"}, ["no/such/model", "check the path"]),
    ({"model": SMALL["model"] | {"hidden_sise": 32}}, ["model.hidden_sise is 32", "correct the key"]),
    ({"model": SMALL["model"] | {"model_type": "lama"}}, ["model.model_type is 'lama'", "for instance llama"]),
    ({"model": SMALL["model"] | {"hidden_size": "big"}}, ["model", "big"]),
    ({"model": SMALL["model"] | {"num_attention_heads": 5}}, ["model", "5"]),
    ({"trainable": "memory"}, ["trainable is 'memory'", "name a model"]),
    ({"strength": 0}, ["strength is 0", "above 0"]),
    ({"result": "best", "tasks": [], "sources": [{"path": "a.txt"}]}, ["result is 'best'", "add held_out or tasks"]),
    ({"result": "best", "eval_every": 0}, ["eval_every is 0", "result is 'best'"]),
    ({"result": "best", "eval_every": 8}, ["eval_every is 8", "result is 'best'"]),
    ({"patience": 2, "eval_every": 0}, ["patience is 2", "eval_every is 0"]),
    ({"trackers": "wandb"}, ["trackers is 'wandb'", "list"]),
    ({"trackers": ["wandbb"]}, ["trackers[0] is 'wandbb'", "wandb"]),
    ({"sede": 1}, ["'sede'", "1", "known: "]),
    ({3: 1}, ["unknown entry 3", "1"]),
]


def assert_refused(recipe: Path, out: Path, parts: list[str], capsys: pytest.CaptureFixture, *arguments: str) -> None:
    assert train(recipe, out, *arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("fot: ")
    for part in parts:
        assert part in said[0]
    assert not out.exists()


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_wrong_recipes(
    changes: dict[str, Any], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL | changes))
    assert_refused(recipe, tmp_path / "out", parts, capsys)


@pytest.fixture(scope="module")
def base(make_plain: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can read text, a token a byte, and some texts; 16 tokens to a window."""
    folder = tmp_path_factory.mktemp("base")
    make_plain("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("long", 2000), ("short", 11)):
        (folder / f"{name}.txt").write_text("abcdefghi " * (count // 10) + "x" * (count % 10))
    (folder / "asked.jsonl").write_text('{"passage": "A cat sat.", "question": "Who sat?", "answers": ["a cat"]}\n')
    (folder / "rows.csv").write_text("number,story\n" + "".join(f"{n},{'word ' * 20}{n}\n" for n in range(30)))
    return folder


QUESTIONS = {"kind": "questions", "filler": [{"path": "{base}/long.txt"}], "path": "{base}/asked.jsonl"}


def text_recipe(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(base / "model"), "memory": {"mem_layers": [1], "local_context": 16}, "lanes": 2, "windows": 2,
        "sources": [{"path": str(base / "long.txt")}], "steps": 2, "save_every": 2, "dtype": "float32",
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sources": [{"path": "{base}/short.txt"}]}, ["sources[0]", "short.txt", "has 11 tokens", "windows of 16"]),
        ({"held_out": [{"path": "{base}/short.txt"}]}, ["held_out[0]", "short.txt", "has 11 tokens", "add text"]),
        ({"tasks": [{"kind": "retrieval", "filler": [{"path": "{base}/long.txt"}], "text_share": 3}]},
         ["tasks[0].text_share is 3", "at most 1"]),
        ({"tasks": [{"kind": "retrieval", "filler": [{"path": "{base}/long.txt"}], "chat_share": 0.5}]},
         ["tasks[0]", "chat_share=0.5", "set it to 0"]),
        ({"tasks": [{"kind": "retrieval", "filler": [{"path": "{base}/long.txt"}], "facts": [3, 1]}]},
         ["tasks[0]", "(3, 1)"]),
        ({"tasks": [QUESTIONS | {"path": "{base}/long.txt"}]},
         ["tasks[0]", "long.txt, line 1", "no JSON", "write it as"]),
        ({"tasks": [QUESTIONS | {"passages": [3, 1]}]}, ["tasks[0]", "(3, 1)", "least"]),
        ({"tasks": [QUESTIONS | {"near_share": 2}]}, ["tasks[0].near_share is 2", "at most 1"]),
        ({"tasks": [QUESTIONS | {"pasages": [1, 2]}]}, ["tasks[0]", "'pasages'", "known: ", "passages"]),
        ({"tasks": [QUESTIONS]}, ["tasks[0]", "no chat template", "leave this task out"]),
        ({"sources": [{"path": "{base}/rows.csv"}]}, ["sources[0]", "'text' is missing", "'story'", "text_field"]),
        ({"trainable": "lora", "lora": {"target_modules": ["nothing"]}}, ["lora", "nothing"]),
        ({"trainable": "lora", "strength": 0.5}, ["strength is 0.5", "lora_alpha"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_wrong_recipes_of_text(
    changes: dict[str, Any], parts: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(text_recipe(base, **changes)).replace("{base}", str(base)))
    assert_refused(recipe, tmp_path / "out", parts, capsys)


def test_the_same_recipes_without_the_mistakes(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    rows = {"path": str(base / "rows.csv"), "text_field": "story"}
    recipe.write_text(yaml.safe_dump(text_recipe(base, held_out=[{"path": str(base / "long.txt")}])))
    assert train(recipe, tmp_path / "text") == 0
    recipe.write_text(yaml.safe_dump(text_recipe(base, sources=[rows], steps=6)))
    assert train(recipe, tmp_path / "rows") == 0
    for steps in (2, 6):  # the place in the rows is kept
        assert train(recipe, tmp_path / "parts", f"steps={steps}", "--resume") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "rows")


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_csv_gives_a_document_a_row(suffix: str, mark: str, tmp_path: Path, tokenizer: Any) -> None:
    """Not one text with commas."""
    file = tmp_path / f"rows.{suffix}"
    file.write_text(f"number{mark}story\n1{mark}one, two\n2{mark}three\n".replace("one, two", '"one, two"'))
    found = [tokenizer.decode(ids) for ids in read_documents(DataSource(str(file), text_field="story"), tokenizer)]
    assert found == ["one, two", "three"]


@pytest.mark.parametrize("override", ["contexts={", "=3", "tasks.kind=3"])
def test_wrong_overrides(override: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert_refused(write_recipe(tmp_path / "recipe.yaml"), tmp_path / "out", [override], capsys, override)


@pytest.mark.parametrize(
    ("content", "part"), [(b"steps: [", "is not YAML"), (b"- 1", "holds no settings"), (b"\xff\xfe", "is not UTF-8")]
)
def test_files_that_are_no_recipes(content: bytes, part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    assert_refused(recipe, tmp_path / "out", [part, "recipe.yaml"], capsys)


def test_numbers_may_be_texts_that_look_like_numbers() -> None:
    """YAML takes 2e-5, without a point, for a text."""
    task = DICTIONARY | {"similar": "5e-1"}
    recipe = Recipe(tasks=[task], learning_rate="2e-5", contexts={"copies": "1e2"})  # type: ignore[arg-type]
    assert recipe.learning_rate == 2e-5
    assert recipe.tasks[0]["similar"] == 0.5
    assert recipe.contexts == {"copies": 100.0}
    assert load_recipe("smollm2-135m").to_dict()["contexts"] == {"kind": "constant", "values": [6], "copies": 128.0}


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.01}),
        ("warmup_stable_decay", "warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear"}),
    ],
)
def test_learning_rates_are_those_of_transformers(ours: str, theirs: str, options: dict[str, Any]) -> None:
    """After the warm-up, whose first step is not 0 here."""
    import torch
    from transformers import get_scheduler

    recipe = Recipe(tasks=[DICTIONARY], steps=100, warmup_steps=10, learning_rate=1.0, lr_schedule=ours,
                    decay_steps=20 if "decay" in ours else 0)  # type: ignore[arg-type]  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, 10, 100, scheduler_specific_kwargs=options)
    for step in range(100):
        if step >= 10:
            assert learning_rate_at(recipe, step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
