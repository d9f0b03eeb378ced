"""``fot memory check`` and what it measures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from test_memory_command import OPTIONS, built, first_built, place  # noqa: F401 - fixtures
from torch import Tensor

from fot.cli import main
from fot.evaluation.memory_check import Listening, check
from memory import Memory, VectorBlocks, attention_mass_recall

Draw = Callable[..., Tensor]


@pytest.fixture
def read(make_model: ModelMaker, ids: Draw) -> tuple[Any, Memory]:
    model = make_model()
    memory = model.new_memory()
    model.ingest(ids(300)[0], memory, progress=False)
    return model, memory


def test_exact_loses_nothing_and_a_top_k_what_recall_says(read: tuple[Any, Memory]) -> None:
    model, memory = read
    window = model.memory_config.window
    found = check(model, memory, places=2, queries=window, top_k=9)
    assert found["tokens"] == 300 - 2 * window
    assert [(one["layer"], one["head"]) for one in found["heads"]] == [
        (layer, head) for layer in memory.layers for head in range(memory.num_key_value_heads)
    ]
    assert all(one["index_error"] < 1e-5 for one in found["heads"])
    assert all(0 < one["mass"] < 1 and one["top_k_error"] > 0.01 for one in found["heads"])
    made: list[Listening] = []

    def listen(keys: VectorBlocks, values: VectorBlocks) -> Listening:
        made.append(Listening(keys, values))
        return made[-1]

    starts = [(300 - window) // 4, 3 * (300 - window) // 4]
    asking = {slot for start in starts for slot in range(start, start + window)}
    rest = memory.kept(torch.tensor([slot for slot in range(300) if slot not in asking]), index=listen)
    rest.prepare()
    for start in starts:
        model(torch.from_numpy(memory.token_ids(slice(start, start + window)).copy()).long()[None], memory=rest)
    for layer, index in zip(rest.layers, made, strict=True):
        asked = torch.cat(index.asked, dim=1)
        hits = rest[layer].search(asked, 9)[1]
        recall = attention_mass_recall(asked, rest[layer].keys(), hits, scale=index.scale).mean(1)
        mine = torch.tensor([one["mass"] for one in found["heads"] if one["layer"] == layer])
        torch.testing.assert_close(mine, recall)


def test_a_top_k_of_everything_loses_nothing(read: tuple[Any, Memory]) -> None:
    found = check(*read, places=1, queries=4, top_k=1000)
    assert all(one["mass"] == pytest.approx(1) and one["top_k_error"] < 1e-5 for one in found["heads"])


def test_kept_tokens_leave_the_memory_as_it_was(read: tuple[Any, Memory], tmp_path: Path) -> None:
    _, memory = read
    layer, slots = memory.layers[0], torch.tensor([0, 3, 4, 200])
    memory.save(tmp_path / "m")
    for whole in (memory, Memory.open(tmp_path / "m")):
        some = whole.kept(slots)
        assert (len(some), len(whole)) == (4, 300)
        assert some.token_ids().tolist() == whole.token_ids()[slots.numpy()].tolist()
        assert torch.equal(some[layer].keys(), whole[layer].keys()[:, slots])
        assert some.index == whole.index


def test_the_command(built: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    command = ["memory", "check", "m", "--places", "2", "--queries", "8", "--json", "out.json"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "A top-128 drops" in shown
    assert "error, index" in shown
    found = json.loads(Path("out.json").read_text())
    assert len(found["heads"]) == 2 * 2
    assert {one["layer"] for one in found["heads"]} == {1, 3}
    assert main([*command, "--index", "exact", "--top-k", "2", "--compare", "2"]) == 0
    for one in json.loads(Path("out.json").read_text())["heads"]:
        assert one["index_error"] == pytest.approx(one["top_k_error"], abs=1e-4)
    capsys.readouterr()
    assert main(["memory", "check", "m", "--places", "4000"]) == 2
    assert "choose a smaller --places" in capsys.readouterr().err


def test_a_top_k_is_warned_of(built: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    main(["memory", "check", "m", "--places", "1", "--index", "exact", "--top-k", "5"])
    assert "fot memory check m" in caplog.text
    caplog.clear()
    main(["memory", "check", "m", "--places", "1"])
    assert "fot memory check" not in caplog.text
