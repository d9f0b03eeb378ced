"""The choice of retrieval heads."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from wide import make_wide

from fot import FoTForCausalLM
from fot.cli import main
from fot.evaluation import heads, needles
from fot.retrieval.find import Finder

TEXT = "It was a dark evening in the old town, and nobody would have gone out without need. " * 5


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_wide(tokenizer, 128)


def test_each_head_is_judged_by_its_own_ranking(model: Any) -> None:
    texts, before = [model.tokenizer(TEXT).input_ids], model.memory_config
    found = heads.run(model, texts, length=1200, needles=2, trials=2)
    assert model.memory_config == before
    assert sorted((one.layer, one.head) for one in found) == [(layer, head) for layer in (1, 3) for head in range(4)]
    assert [one.rank for one in found] == sorted((one.rank for one in found), reverse=True)
    rng = random.Random(0)
    ranks: dict[tuple[int, int], list[int]] = {(one.layer, one.head): [] for one in found}
    for haystack in [needles.make_haystack(model.tokenizer, texts, 1200, 2, rng) for _ in range(2)]:
        memory = model.new_memory()
        model.ingest(haystack.ids, memory)
        finder = Finder(model, memory, lambda text: model.tokenizer(f"\nQuestion: {text}\nAnswer:").input_ids)
        bounds = list(zip(finder.passages().starts, finder.passages().stops, strict=True))
        for needle in haystack.needles:
            texts_of = [model.tokenizer.decode(memory.token_ids(slice(start, stop))) for start, stop in bounds]
            tail = needle.statement[-8:]
            right = next(place for place, text in enumerate(texts_of) if tail in text or text.startswith(tail[-3:]))
            for layer, scores in finder.head_scores(needle.asked).items():
                for head in range(4):
                    better = [score >= scores[head, right] for score in scores[head]]
                    ranks[layer, head].append(int(sum(better)))
    for one in found:
        places = ranks[one.layer, one.head]
        assert one.rank == pytest.approx(sum(1 / place for place in places) / len(places))
        assert one.first == places.count(1) / len(places)


def test_command_stores_the_best(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = tmp_path / "model", tmp_path / "out.json"
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--length", "900", "--needles", "2", "--trials", "1", "--keep", "3", "--device", "cpu"]
    assert (
        main(["eval", "heads", str(folder), str(tmp_path / "text.txt"), *options, "--json", str(out), "--store"]) == 0
    )
    result = json.loads(out.read_text())
    assert len(result["heads"]) == 8
    chosen = tuple(map(tuple, result["retrieval_heads"]))
    assert set(chosen) == {(one["layer"], one["head"]) for one in result["heads"][:3]}
    assert f"retrieval_heads={[list(pair) for pair in chosen]}" in capsys.readouterr().out
    again: Any = FoTForCausalLM.from_pretrained(folder)
    assert again.memory_config.retrieval_heads == chosen
    assert again.memory_config.layers == (1, 3)


def test_store_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["eval", "heads", "smollm2-135m-fot", str(tmp_path / "text.txt"), "--store"]) == 2
    assert "save the model to a folder first" in capsys.readouterr().err
