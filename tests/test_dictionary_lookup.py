"""Dictionary lookup through the command, by the model that is shipped for it."""

import json
from pathlib import Path

import pytest

import fot
from fot.cli import main
from fot.evaluation import dictionary
from fot.tasks.dictionary import DictionaryTable


def test_the_shipped_model_finds_what_was_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In a memory of 80 times the tokens it was trained on; its plain window alone holds no answer."""
    out = tmp_path / "out.json"
    assert main(["eval", "dictionary", "--lengths", "4000,40000", "--windows", "2", "--json", str(out)]) == 0
    assert "dictionary lookup, dictionary-fot" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [entry["length"] for entry in result["results"]] == [4000, 40000]
    for entry in result["results"]:
        assert entry["answers"] == 50
        assert entry["accuracy"] >= 0.99
        assert entry["exact"] <= entry["accuracy"]


def test_an_empty_memory_answers_nothing() -> None:
    model = fot.FoTForCausalLM.from_pretrained("dictionary-fot")
    table = DictionaryTable.of_tokens(40000, 0, model.memory_config.window)
    rng = dictionary.np.random.default_rng(0)
    marks = dictionary._marks(model, model.new_memory(), table, rng, model.memory_config.window)
    assert marks.float().mean() < 0.1  # 60 symbols to guess from


def test_ctrl_c_keeps_finished_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = dictionary._measure

    def interrupted(model: object, table: DictionaryTable, *rest: object) -> dict[str, float]:
        if table.records > 100:
            raise KeyboardInterrupt
        return measure(model, table, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(dictionary, "_measure", interrupted)
    out = tmp_path / "out.json"
    assert main(["eval", "dictionary", "--lengths", "1000,2000", "--windows", "1", "--json", str(out)]) == 130
    result = json.loads(out.read_text())
    assert result["interrupted"]
    assert [entry["length"] for entry in result["results"]] == [1000]


def test_bad_input(capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", "dictionary", "--lengths", "16001"]) == 2
    assert "16001 tokens are not one or more whole windows of 250" in capsys.readouterr().err
    model = fot.FoTForCausalLM.from_pretrained("dictionary-fot")
    model.config.vocab_size = 60
    with pytest.raises(ValueError, match="the model has 60 tokens, but the dictionary task needs 64"):
        dictionary.run(model, [250])
