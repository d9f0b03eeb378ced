"""Distraction: shares of attention as training sees them, on windows drawn as they should be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from fot.cli import main
from fot.evaluation import distraction
from fot.tasks.dictionary import KEY, QUESTION, RECORD, VOCABULARY
from training.crossbatch import Contexts, enable_crossbatch

Draw = Callable[..., torch.Tensor]


def memories_of(model: Any, windows: torch.Tensor) -> list[Any]:
    found = [model.new_memory() for _ in windows]
    for window, memory in zip(windows, found, strict=True):
        model.ingest(window, memory)
    return found


@pytest.mark.parametrize("positionals", [True, False])
@torch.no_grad()
def test_shares_are_those_of_training(
    positionals: bool, family: str, make_model: ModelMaker, make_plain: ModelMaker, ids: Draw
) -> None:
    """A row that reads three others, which read nothing: crossbatch and memories agree on who got what."""
    windows = ids(WINDOW, rows=4)
    model = make_model(family, mem_positionals=positionals)
    scores = distraction.context_scores(model, windows[3], memories_of(model, windows[:3]))
    plain = make_plain(family)
    crossbatch = enable_crossbatch(plain, model.memory_config)
    empty = torch.empty(0, dtype=torch.int64)
    crossbatch.contexts = Contexts([empty, empty, empty, torch.arange(3)])
    crossbatch.attention_mass = []
    plain(windows, use_cache=False)
    assert list(scores) == [1, 3]
    for layer, expected in crossbatch.attention_mass:
        shares = (scores[layer].alike - scores[layer].all).exp()
        torch.testing.assert_close(shares.sum(0), (scores[layer].memory - scores[layer].all).exp())
        torch.testing.assert_close(shares.mean((1, 2)), expected[3], atol=1e-4, rtol=1e-3)
        assert expected[3].max() - expected[3].min() > 1e-3, "contexts differ in what they get"


@torch.no_grad()
def test_positive_mass_of_equal_contexts_is_one_in_d(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model()
    windows = torch.cat([ids(WINDOW), ids(WINDOW, seed=1).expand(4, -1)])
    sample = distraction.Sample(windows, [distraction.Trial(0, (1, 2, 3, 4))])
    found = distraction.run(model, sample, [1, 2, 4])
    assert not found["interrupted"]
    for entry in found["results"]:
        for shares in (entry, *entry["layers"].values()):
            assert shares["to_memory"] == shares["weighed"] == pytest.approx(1 / entry["contexts"], rel=1e-4)
            assert 0 < shares["of_all"] < shares["to_memory"]
    other = distraction.run(model, distraction.Sample(windows, [distraction.Trial(0, (0, 2, 3, 4))]), [1, 4])
    assert other["results"][0]["to_memory"] == pytest.approx(1)
    assert other["results"][1]["to_memory"] != pytest.approx(1 / 4, abs=1e-3)


@pytest.mark.parametrize(("newest", "share"), [(1, 1 / 2), (2, 1 / 3)])
@torch.no_grad()
def test_a_model_may_weigh_the_newest_more(newest: int, share: float, make_model: ModelMaker, ids: Draw) -> None:
    """Of 4 equal windows that weigh as much as ``newest + 1``: the newest ones at 1 each, the others 1 together."""
    weights = {"full_weight_tokens": (newest + 1) * WINDOW, "newest_full_weight": newest * WINDOW}
    model, alike = make_model(**weights), make_model()
    windows = torch.cat([ids(WINDOW), ids(WINDOW, seed=1).expand(4, -1)])
    sample = distraction.Sample(windows, [distraction.Trial(0, (1, 2, 3, 4))])
    (found,) = distraction.run(model, sample, [4])["results"]
    assert found["to_memory"] == pytest.approx(1 / 4, rel=1e-4)
    assert found["weighed"] == pytest.approx(share, rel=1e-4)
    (scores, *_) = distraction.context_scores(model, windows[0], memories_of(model, windows[1:])).values()
    (plain, *_) = distraction.context_scores(alike, windows[0], memories_of(alike, windows[1:])).values()
    # In the first memory layer queries are the same: of the window's own keys each weighs as much as the newest.
    own, newest_one = ((plain.all.exp() - plain.memory.exp()), plain.alike[-1].exp())
    expected = newest_one / (own + (newest + 1) * newest_one)
    torch.testing.assert_close((scores.newest - scores.all).exp(), expected, atol=1e-5, rtol=1e-4)


def test_text_windows_are_consecutive_and_negatives_of_other_texts() -> None:
    texts = [range(100 * n, 100 * n + 100) for n in range(5)]
    sample = distraction.text_sample(texts, 10, 8, 20, seed=3)
    assert len(sample.trials) == 20
    for trial in sample.trials:
        query, contexts = sample.windows[trial.query], sample.windows[list(trial.contexts)]
        assert contexts[0, -1] + 1 == query[0]
        assert contexts[0, 0] // 100 == query[0] // 100
        assert all(row[0] // 100 != query[0] // 100 for row in contexts[1:])
        assert len(contexts.unique(dim=0)) == 8
    assert sample.trials == distraction.text_sample(texts, 10, 8, 20, seed=3).trials
    assert sample.trials != distraction.text_sample(texts, 10, 8, 20, seed=4).trials
    assert len({row for trial in sample.trials for row in trial.contexts}) < 20 + 20
    with pytest.raises(ValueError, match="64 contexts need two windows of 10 tokens from one text and 63 from others"):
        distraction.text_sample(texts, 10, 64, 1, seed=0)


def test_dictionary_positive_holds_the_records_asked_for() -> None:
    sample = distraction.dictionary_sample(44, 5, 3, seed=0)

    def keys(row: int, kind: int) -> set[tuple[int, ...]]:
        entries = sample.windows[row, :40].reshape(-1, RECORD).tolist()
        assert all(entry[0] == kind for entry in entries)
        return {tuple(entry[1:5]) for entry in entries}

    for trial in sample.trials:
        asked = keys(trial.query, QUESTION)
        assert len(set(trial.contexts)) == 5
        assert asked == keys(trial.contexts[0], KEY)
        assert all(asked.isdisjoint(keys(row, KEY)) for row in trial.contexts[1:])


def test_command_compares_models_on_texts(
    make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = []
    for seed in (0, 1):
        make_plain(seed=seed).save_pretrained(tmp_path / f"m{seed}")
        tokenizer.save_pretrained(tmp_path / f"m{seed}")
        names.append(str(tmp_path / f"m{seed}"))
    texts = [tmp_path / f"{n}.txt" for n in range(3)]
    for number, path in enumerate(texts):
        path.write_text(f"Text number {number} says: " + "abcdefghij"[number:] * 30)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["eval", "distraction", *names, "--text", *map(str, texts), "--contexts", "1,2,8", "--trials", "3",
                 "--mem-layers", "1,3", "--local-context", "16", "--json", str(out), "--plot", str(plot)]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "12.5%" in shown
    assert "layer" in shown
    result = json.loads(out.read_text())
    assert [entry["model"] for entry in result["models"]] == names
    first, second = ([row["to_memory"] for row in entry["results"]] for entry in result["models"])
    assert first[0] == second[0] == pytest.approx(1)
    assert first[2] != second[2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "distraction", names[0], "--text", str(texts[0])]) == 2
    assert "give more or longer files" in capsys.readouterr().err


def test_command_on_the_dictionary_task(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    set_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    arguments = ["eval", "distraction", str(tmp_path), "--task", "dictionary", "--contexts", "1,4", "--trials", "2",
                 "--mem-layers", "1", "--local-context", "40"]  # fmt: skip
    assert main(arguments) == 0
    assert "25.0%" in capsys.readouterr().out
