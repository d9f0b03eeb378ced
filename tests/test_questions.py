"""The questions about novels: their form, how answers are marked, and the run over a tiny model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast
from wide import make_wide

from fot.cli import main
from fot.evaluation import questions
from fot.evaluation.intervals import wilson
from fot.evaluation.questions import CEILING, ROWS, WITHOUT, books, holds, is_right, load_questions, normalised

MEASURED = ("persuasion", "pride_and_prejudice", "sherlock_holmes")
TUNED_ON = ("northanger_abbey",)
WINDOW = 420


def test_books_and_numbers() -> None:
    assert books() == sorted([*MEASURED, *TUNED_ON])
    assert [len(load_questions(book)) for book in MEASURED] == [20, 20, 20]
    assert len(load_questions(TUNED_ON[0])) >= 10
    with pytest.raises(ValueError, match=r"no questions about 'emma'.*persuasion"):
        load_questions("emma")


@pytest.mark.parametrize("book", [*MEASURED, *TUNED_ON])
def test_questions_are_whole(book: str) -> None:
    found = load_questions(book)
    assert len({one.question for one in found}) == len(found)
    for one in found:
        assert one.question.endswith("?")
        assert not is_right(one.question, one.answers), one
        assert one.quotes
        for quote in one.quotes:
            assert len(quote) >= 20, quote
            assert " ".join(quote.split()) == quote
            assert is_right(quote, one.answers), (quote, one.answers)


@pytest.mark.slow
@pytest.mark.parametrize("book", [*MEASURED, *TUNED_ON])
def test_quotes_are_verbatim(book: str) -> None:
    """With FOT_NOVELS=FOLDER, made by examples/fetch_novels.py: each quote stands in its book, once."""
    if "FOT_NOVELS" not in os.environ:
        pytest.skip("the folder of the novels is not given: FOT_NOVELS=FOLDER")
    text = " ".join((Path(os.environ["FOT_NOVELS"]) / f"{book}.txt").read_text("utf-8").split())
    for one in load_questions(book):
        assert [text.count(quote) for quote in one.quotes] == [1] * len(one.quotes), one.quotes


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("He has TEN  THOUSAND\na year.", ["ten thousand"], True),
        ("He has 10,000 a year.", ["ten thousand", "10,000"], True),
        ("It was Mr. Gray's shop.", ["Gray"], True),
        ("At Fullerton\u2019s end", ["Fullerton"], True),
        ("The collar-bone.", ["collar bone"], True),
        ("An attorneyship", ["attorney"], False),
        ("Often.", ["ten"], False),
        ("", ["ten"], False),
    ],
)
def test_is_right(text: str, answers: list[str], right: bool) -> None:
    assert is_right(text, answers) == right


def test_holds() -> None:
    quote = "His collar-bone was found to be dislocated"
    assert holds(f"It is so. {quote}, and such injury", [quote])
    assert holds("so: his collar-bone was\n found to be", [quote])  # most of it, at a passage's end
    assert not holds("His collar-bone hurt.", [quote])
    assert holds("The other one is here, whole.", [quote, "other one is here"])
    assert not holds("", [quote])


def test_normalised() -> None:
    assert normalised(" The _Vicar's_  house--at Five o'clock! ") == "the vicar house at five oclock"


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (60, 60, 0.9398, 1.0)]
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_wide(tokenizer, WINDOW)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[questions.Question]:
    asked = load_questions("persuasion")[:3]
    monkeypatch.setattr(questions, "load_questions", lambda book: asked)
    return asked


@pytest.fixture
def memory(model: Any, few: list[questions.Question]) -> Any:
    stored = model.new_memory()
    between = "\n\n" + "It was a dark evening in the old town, and nobody would have gone out. " * 2 + "\n\n"
    model.ingest(between.join(one.quotes[0] for one in few), stored, "persuasion.txt")
    return stored


def test_run(model: Any, memory: Any, few: list[questions.Question], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str, bool]] = []
    before = questions.Conversation.say

    def say(self: Any, text: str, **options: Any) -> Any:
        said.append((text, options["reread"], self.memory is not None))
        return before(self, text, **options)

    monkeypatch.setattr(questions.Conversation, "say", say)
    reported: list[Any] = []
    found = questions.run(model, {"persuasion": memory}, max_new_tokens=3, num_passages=2, report=reported.append)
    assert len(reported) == len(found["answers"]) == 3 * len(ROWS)
    assert list(found["rows"]) == list(ROWS)
    assert not found["interrupted"]
    for row, counts in found["rows"].items():
        answers = [one for one in found["answers"] if one["row"] == row]
        assert counts["correct"] == sum(one["correct"] for one in answers)
        assert counts["correct_interval"] == wilson(counts["correct"], 3)
        assert counts["books"]["persuasion"]["questions"] == 3
        assert ("listed" in counts) == (row not in (WITHOUT, CEILING))
        for one, question in zip(answers, few, strict=True):
            assert one["question"] == question.question
            places = [place for place, text in enumerate(one["passages"], 1) if holds(text["text"], question.quotes)]
            assert one["listed"] == (places[0] if places else None)
    assert found["rows"]["bm25"]["listed"] >= 2
    asked = dict(zip(ROWS, said[: len(ROWS)], strict=True))
    assert [(reread, has) for _, reread, has in asked.values()] == [
        ("off", True), ("attention", True), ("bm25", True), ("both", True), ("off", False), ("off", False),
    ]  # fmt: skip
    assert all(asked[row][0] == few[0].question for row in ROWS if row != CEILING)
    assert few[0].quotes[0] in asked[CEILING][0]
    assert asked[CEILING][0].endswith(few[0].question)


def test_interrupted(model: Any, memory: Any) -> None:
    def stop(result: Any) -> None:
        raise KeyboardInterrupt

    found = questions.run(model, {"persuasion": memory}, rows=["bm25", CEILING], max_new_tokens=1, report=stop)
    assert found["interrupted"]
    assert list(found["rows"]) == ["bm25"]
    assert len(found["answers"]) == 1


def test_the_memory_of_another_book(model: Any, few: list[questions.Question]) -> None:
    memory = model.new_memory()
    model.ingest("Nothing of the kind is told here.", memory)
    with pytest.raises(ValueError, match="give the memory of the book"):
        questions.run(model, {"persuasion": memory}, rows=[CEILING])


@pytest.fixture
def command(model: Any, memory: Any, tmp_path: Path) -> Callable[..., int]:
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    memory.save(tmp_path / "persuasion.memory")
    options = ["--dtype", "float32", "--device", "cpu", "--local-context", str(WINDOW), "--max-new-tokens", "2"]
    return lambda *more: main(["eval", "questions", str(tmp_path / "model"), *options, *more])


def test_command(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    book, out = f"persuasion={tmp_path / 'persuasion.memory'}", tmp_path / "out.json"
    assert command("--book", book, "--rows", "bm25,without text", "-v", "--json", str(out)) == 0
    shown = capsys.readouterr()
    assert "passage listed" in shown.out
    result = json.loads(out.read_text())
    assert list(result["rows"]) == ["bm25", "without text"]
    assert result["tokens"]["persuasion"] > 100
    assert len(result["answers"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--book", "emma=emma.txt"], "no questions about 'emma'"),
        (["--book", "persuasion=none.txt"], "none.txt"),
        (["--book", "persuasion=none.txt", "--rows", "guess"], "--rows names 'guess'"),
    ],
)
def test_mistakes(
    make_model: ModelMaker,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["eval", "questions", str(tmp_path), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
