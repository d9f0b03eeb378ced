"""Passages of a memory, and how attention, words and both find those that a question is about."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from wide import make_wide

from fot import MemoryConfig, attach_memory
from fot.retrieval import attention
from fot.retrieval.attention import Queries, passage_masses, question_queries
from fot.retrieval.find import TIMES_EXPECTED, WAYS, Finder, above_chance, common, fuse
from fot.retrieval.passages import cut, passage_texts
from fot.retrieval.prompt import with_passages
from fot.retrieval.words import WordIndex

WINDOW = 128
TEA = "Tea is taken at five in the garden, if the weather allows it and nobody has a cold. "
VICAR = "The vicar of Highbury is Mr Elton, a young man whom everybody likes at first sight. "
FILLER = "It was a dark evening in the old town, and nobody would have gone out without need. "


class Documents:
    """As much of a memory as cutting needs."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.ids, self.runs = np.zeros(0, dtype=np.int64), []
        for number, text in enumerate(texts):
            ids = np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
            self.runs.append((f"{number}.txt", len(self.ids), len(self.ids) + len(ids)))
            self.ids = np.concatenate([self.ids, ids])

    def __len__(self) -> int:
        return len(self.ids)

    def token_ids(self, slots: Any = slice(None)) -> np.ndarray:
        return self.ids[slots]

    def document_runs(self) -> list[tuple[str, int, int]]:
        return self.runs


@pytest.mark.parametrize("seed", range(30))
def test_passages_hold_every_slot_once(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    rng = random.Random(seed)
    shortest = rng.randrange(1, 21)
    texts = ["".join(rng.choices('ab.!\n" ', k=rng.randrange(1, 300))) for _ in range(rng.randrange(1, 5))]
    documents: Any = Documents(tokenizer, texts)
    longest = 2 * shortest
    found = cut(documents, tokenizer, shortest, longest)
    assert found.starts[0] == 0
    assert found.stops[-1] == len(documents)
    assert (found.starts[1:] == found.stops[:-1]).all()
    lasts = {last for _, _, last in documents.runs}
    for start, stop, document in zip(found.starts, found.stops, found.documents, strict=True):
        assert stop - start <= longest
        assert stop - start >= shortest or stop in lasts
        (run,) = [run for run in documents.runs if run[1] <= start and stop <= run[2]]
        assert run[0] == document
    assert "".join(passage_texts(documents, tokenizer, found)) == "".join(texts)


def test_passages_end_where_a_reader_would_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    text = 'He came late.\nShe said, "Why?"\n\nNobody knew. It rained all day long, and then some more of it'
    documents: Any = Documents(tokenizer, [text])
    texts = passage_texts(documents, tokenizer, cut(documents, tokenizer, 20, 40))
    assert texts[0] == 'He came late.\nShe said, "Why?"\n\n'  # a paragraph goes before the later full stop
    lines: Any = Documents(tokenizer, ["one two three\nfour five six seven eight nine"])
    assert passage_texts(lines, tokenizer, cut(lines, tokenizer, 8, 20))[0] == "one two three\n"


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_wide(tokenizer, WINDOW)


@pytest.fixture
def memory(model: Any) -> Any:
    stored = model.new_memory()
    for name, text in (("a.txt", FILLER * 4 + VICAR + FILLER * 3), ("b.txt", FILLER * 2 + TEA)):
        model.ingest(text, stored, name)
    return stored


def asked(model: Any) -> Any:
    return lambda question: model.tokenizer(f"Q: {question} A:").input_ids


def test_masses_are_those_of_one_softmax(
    family: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all scores at once in float64, in steps of a few keys, of some, and in one."""
    model = make_wide(tokenizer, WINDOW, family)
    memory = model.new_memory()
    model.ingest(FILLER * 5, memory)
    ids = tokenizer("Who is it?").input_ids
    found = question_queries(model, memory, ids, range(2, 7))
    assert sorted(found) == [1, 3]
    passages = cut(memory, tokenizer, 20, 40)
    for layer, queries in found.items():
        keys = memory[layer].keys().double().repeat_interleave(2, 0)  # (H, N, D)
        dense = (queries.scale * queries.queries.double() @ keys.mT).softmax(-1)
        pairs = zip(passages.starts, passages.stops, strict=True)
        expected = torch.stack([dense[..., start:stop].sum(-1) for start, stop in pairs], dim=-1)
        for numbers in (1000, 2000, 1 << 22):
            monkeypatch.setattr(attention, "STEP_NUMBERS", numbers)
            masses = passage_masses(memory, layer, queries, passages)
            assert masses.shape == (4, 5, len(passages))
            torch.testing.assert_close(masses.double(), expected, atol=1e-5, rtol=1e-4)


def test_queries_are_those_of_the_tokens_asked_for(model: Any, memory: Any) -> None:
    ids = asked(model)("Who is it?")
    every, some = (question_queries(model, memory, ids, tokens) for tokens in (range(len(ids)), range(3, 6)))
    for layer in every:
        torch.testing.assert_close(every[layer].queries[:, 3:6], some[layer].queries)


@pytest.mark.parametrize("index", ["exact", "IVF4,Flat"])
def test_masses_of_what_is_retrieved(model: Any, index: str) -> None:
    attach_memory(model, MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, index=index, top_k=7))
    memory = model.new_memory()
    model.ingest(FILLER * 6, memory)
    passages = cut(memory, model.tokenizer, 20, 40)
    queries = question_queries(model, memory, asked(model)("Who?"), range(3, 6))[3]
    masses = passage_masses(memory, 3, queries, passages)
    torch.testing.assert_close(masses.sum(-1), torch.ones(4, 3))
    products, slots = memory[3].search(queries.queries.reshape(2, -1, 8), 7)
    weights = (queries.scale * products).softmax(-1).reshape(12, 7)
    of_slot = np.repeat(np.arange(len(passages)), passages.stops - passages.starts)
    expected = torch.zeros(12, len(passages))
    for row, (places, shares) in enumerate(zip(slots.reshape(12, 7).tolist(), weights.tolist(), strict=True)):
        for place, share in zip(places, shares, strict=True):
            expected[row, of_slot[place]] += share if place >= 0 else 0.0
    torch.testing.assert_close(masses.reshape(12, -1), expected)


def test_what_any_question_attends_to_does_not_count() -> None:
    chance = torch.full((4,), 0.25)
    sinks = torch.tensor([[0.19, 0.0, 0.0, 0.001]])
    masses = torch.tensor([[[0.9, 0.0, 0.0, 0.1], [0.0, 0.0, 1.0, 0.0]]])
    small = chance / 100
    least = TIMES_EXPECTED * 0.0025 / (1 + (TIMES_EXPECTED - 1) * 0.0025)
    scores = above_chance(masses, small, sinks)
    assert scores.shape == (1, 4)
    assert scores[0, 0] == 0  # a sink, however much it receives up to TIMES_EXPECTED times
    assert scores[0, 2] == pytest.approx(1 - least)
    assert scores[0, 3] == pytest.approx(0.1 - least)
    assert above_chance(masses, chance, sinks).nonzero().tolist() == [[0, 2]]  # a quarter by chance, all of it here


@pytest.mark.parametrize("seed", range(8))
def test_fused_ranks(seed: int) -> None:
    rng = random.Random(seed)
    rankings = [[rng.randrange(6) for _ in range(6)] for _ in range(1 + seed % 3)]
    order = fuse([np.asarray(scores, dtype=float) for scores in rankings])
    named = {place for scores in rankings for place, score in enumerate(scores) if score > 0}
    assert set(order) == named
    assert len(order) == len(named)
    for one in named:
        for other in named:
            if all(scores[one] > scores[other] for scores in rankings):
                assert order.index(one) < order.index(other)


def test_words() -> None:
    texts = ["The vicar of Highbury.", "Tea in the garden, tea at five.", "The garden of the vicar.", ""]
    index = WordIndex(texts)
    assert index.scores("TEA?").argmax() == 1
    assert index.scores("Where is HIGHBURY, vicar?").argmax() == 0
    assert index.scores("Who?").tolist() == [0, 0, 0, 0]
    assert index.scores("vicar")[1] == index.scores("vicar")[3] == 0
    assert WordIndex(["", ""]).scores("tea").tolist() == [0, 0]
    engaged = WordIndex(["Anne's engagement was long.", "Nobody engages him.", "A lodging in Bath."])
    assert (engaged.scores("To whom is she engaged?") > 0).tolist() == [True, True, False]
    assert engaged.scores("Where do they lodge?").argmax() == 2


@pytest.mark.parametrize("way", WAYS)
def test_finder(model: Any, memory: Any, way: str) -> None:
    finder = Finder(model, memory, asked(model))
    every = finder.find("Who is the vicar of Highbury?", 1000, way)
    assert all(0 <= passage.share <= 1 for passage in every)
    if way == "attention":
        shares = [passage.share for passage in every]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
    else:
        assert sum(passage.share for passage in every) <= 1 + 1e-6
    if way == "bm25":
        assert "vicar of Highbury" in every[0].text
        assert every[0].document == "a.txt"
    assert [one.start for one in finder.find("Who is the vicar of Highbury?", 2, way)] == [
        one.start for one in every[:2]
    ]
    for passage in every:
        assert finder.text(passage) == model.tokenizer.decode(memory.token_ids(slice(passage.start, passage.stop)))


def test_finder_follows_the_memory(model: Any, memory: Any) -> None:
    finder = Finder(model, memory, asked(model))
    assert "Tea" in finder.find("When is tea taken?", 1, "bm25")[0].text
    memory.drop_document("b.txt")
    assert "Tea" not in "".join(one.text for one in finder.find("When is tea taken?", 9, "bm25"))
    model.ingest(TEA, memory, "c.txt")
    assert finder.find("When is tea taken?", 1, "bm25")[0].document == "c.txt"
    memory.reset()
    assert finder.find("When is tea taken?", 5) == []


def test_heads_that_are_chosen_decide(model: Any, memory: Any) -> None:
    finder, question, config = Finder(model, memory, asked(model)), "Who is the vicar?", model.memory_config
    scores = finder.head_scores(question)
    model.memory_config = replace(config, retrieval_heads=((3, 2), (4, 0)))  # layer 4 has no memory
    alone = scores[3][2].double() / scores[3][2].double().sum()
    found = {one.start: one.share for one in finder.find(question, 1000, "attention")}
    places = {
        int(start): float(share) for start, share in zip(finder.passages().starts, alone, strict=True) if share > 0
    }
    assert found == pytest.approx(places)
    model.memory_config = config
    assert {one.start: one.share for one in finder.find(question, 1000, "attention")} != found


def test_settings_of_heads() -> None:
    config = MemoryConfig(mem_layers=(1, 3), retrieval_heads=[[3, 1], [1, 0], [3, 1]])  # type: ignore[list-item]
    assert config.retrieval_heads == ((1, 0), (3, 1))
    assert MemoryConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="pairs of a layer and a head"):
        MemoryConfig(retrieval_heads=((1, 2, 3),))  # type: ignore[arg-type]


def test_another_way_is_refused(model: Any, memory: Any) -> None:
    with pytest.raises(ValueError, match="choose one of attention, bm25, both"):
        Finder(model, memory, asked(model)).find("Who?", 1, "guessing")


def test_common() -> None:
    rng = random.Random(0)
    for _ in range(50):
        one, other = ([rng.randrange(2) for _ in range(5)] for _ in range(2))
        length = common(one, other)
        assert one[:length] == other[:length]
        assert length == 5 or one[length] != other[length]


def test_the_best_passage_stands_next_to_the_question() -> None:
    text = with_passages("Who?", [("a.txt", "The  best\nof all."), ("b.txt", "The second.")])
    assert text.index("b.txt") < text.index("The second.") < text.index("a.txt") < text.index("The best of all.")
    assert text.endswith("Who?")


def test_queries_hold_their_scale(model: Any, memory: Any) -> None:
    found = question_queries(model, memory, asked(model)("Who?"), range(1))
    assert all(isinstance(one, Queries) and one.scale == pytest.approx(8**-0.5) for one in found.values())


def test_words_are_found_without_starting_jax(tmp_path: Path) -> None:
    """bm25s imports JAX where it is installed, which takes most of a GPU's memory."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("print('started')")
    (tmp_path / "jax/lax.py").write_text("top_k = lambda scores, k: None")
    code = (
        f"{forks.FORGET}for name in list(sys.modules): name.split('.')[0] == 'bm25s' and sys.modules.pop(name)\n"
        "from fot.retrieval.words import WordIndex; assert 'jax' not in sys.modules; "
        "print(WordIndex(['a cat', 'a dog']).scores('dogs').argmax()); import jax"
    )
    found = forks.run("-c", code, more={"PYTHONPATH": str(tmp_path)})
    assert (found.returncode, found.stdout) == (0, "1\nstarted\n"), found.stderr
