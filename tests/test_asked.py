"""Questions that people asked: their passages are there, they are put as `fot ask` puts them, only answers count."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import configuration
from test_chat import make_tokenizer
from train_helpers import losses, train
from transformers import AutoModelForCausalLM
from wide import make_wide

from fot.ask import Conversation
from fot.chat import prompt_ids
from fot.retrieval.prompt import with_passages
from fot.tasks.task import Task
from training.asked import AskedPassage, read_asked
from training.hiding import filler_from
from training.questions import AskedDocument, PassageQuestions, as_said

FILLER = "It was a dark evening in the old town, and nobody would have gone out without need. " * 40
NAMES = ("Anna", "Boris", "Clara", "David", "Edith", "Frank")
PLACES = ("the mill", "the inn", "a barn", "the tower", "the old wood", "a boat")
PASSAGES = [
    AskedPassage(
        f'Once {name} lived in {place}. {name} had {hens} hens. "Come here!" said {name} to them.\nThey came.',
        f"{name.lower()}.txt",
        [(f"Where did {name} live?", [f"in {place}"]), (f"How many hens had {name}?", [f"{hens}", f"{hens} hens."])],
    )
    for hens, (name, place) in enumerate(zip(NAMES, PLACES, strict=True), 3)
]
WINDOWS, WINDOW, DOCUMENTS = 3, 700, 60


@pytest.fixture(scope="module")
def chatty(tokenizer: Any) -> Any:
    return make_tokenizer(tokenizer, "chatml")


def make_task(tokenizer: Any, **settings: Any) -> PassageQuestions:
    filler = filler_from([tokenizer(FILLER, add_special_tokens=False).input_ids])
    defaults = {"windows": WINDOWS, "window": WINDOW, "passages": (2, 4), "text_share": 0.0}
    return PassageQuestions(tokenizer, filler, **({"asked": PASSAGES} | defaults | settings))


@pytest.fixture(scope="module")
def task(chatty: Any) -> PassageQuestions:
    return make_task(chatty, near_share=0.4)


@pytest.fixture(scope="module")
def documents(task: PassageQuestions) -> list[AskedDocument]:
    return [task.sample(random.Random(seed)) for seed in range(DOCUMENTS)]


def turns(text: str) -> list[tuple[str, str]]:
    """(what the user says, the reply) of each chat in a text."""
    mark, end = re.escape("<|im_start|>"), re.escape("<|im_end|>")
    return re.findall(f"{mark}user\n(.*?){end}\n{mark}assistant\n(.*?){end}", text, re.DOTALL)


def test_passages_stand_before_their_questions(task: PassageQuestions, documents: list[AskedDocument]) -> None:
    """Read off the ids alone: whole in an earlier window, between empty lines, or in front of the question."""
    far = near = only_near = 0
    for document in documents:
        ids = document.laid.ids
        assert len(ids) == len(document.laid.weights) == WINDOWS * WINDOW + 1
        earlier = task.tokenizer.decode(ids[: WINDOW * (WINDOWS - 1)])
        found = turns(task.tokenizer.decode(ids[WINDOW * (WINDOWS - 1) :]))
        assert len(found) == len(document.asked) > 0
        for (said, reply), (number, question, is_near) in zip(found, document.asked, strict=True):
            passage = task.kept[number]
            (answers,) = (answers for other, answers in passage.questions if other == question)
            assert reply in {as_said(answer) for answer in answers}
            told = f"\n\n{passage.text}\n\n" in earlier
            if is_near:
                assert f"From {passage.title}:\n{' '.join(passage.text.split())[:40]}" in said
                assert said.endswith(f"\nAnswer in a few words. {question}")
            else:
                assert told
                assert said == question
            far, near, only_near = far + (not is_near), near + is_near, only_near + (is_near and not told)
    assert 0.2 * far < near < far
    assert 0 < only_near < near


def test_questions_stand_as_a_model_is_asked(task: PassageQuestions, documents: list[AskedDocument]) -> None:
    """The prompt that the answer follows is that of `fot ask`, token by token."""
    for document in documents:
        for _, piece in document.laid.placed:
            if piece.answer is None:
                continue
            ((said, _),) = turns(task.tokenizer.decode(piece.ids))
            prompt = prompt_ids(task.tokenizer, [{"role": "user", "content": said}])
            assert piece.ids[: piece.answer[0]] == prompt


def test_near_questions_are_the_turns_that_fot_ask_makes(chatty: Any) -> None:
    """A conversation whose memory is the passage reads the same in front of the same question."""
    (passage,) = (one for one in PASSAGES if one.title == "anna.txt")
    model = make_wide(chatty, 1024)
    memory = model.new_memory()
    model.ingest(passage.text, memory, passage.title)
    question = passage.questions[0][0]
    asked = Conversation(model, memory).prepare(question).ids
    task = make_task(chatty, asked=[passage], near_share=1.0, passages=(1, 1), window=1024)
    document = task.sample(random.Random(0))
    prompts = [piece.ids[: piece.answer[0]] for _, piece in document.laid.placed if piece.answer]
    assert asked in prompts


def test_only_answers_and_their_ends_count(task: PassageQuestions, documents: list[AskedDocument]) -> None:
    for document in documents:
        counted = [n for n, weight in zip(document.laid.ids, document.laid.weights, strict=True) if weight]
        assert set(document.laid.weights) == {0.0, 1.0}
        replies = task.tokenizer.decode(counted).split("<|im_end|>")
        assert len(replies) == len(document.asked) + 1
        assert replies.pop() == ""
        replies_said = [reply for _, reply in turns(task.tokenizer.decode(document.laid.ids))]
        assert replies == replies_said


def test_a_share_of_the_real_text_counts_passages_included(chatty: Any) -> None:
    laid = make_task(chatty, text_share=0.5, text_weight=0.25).sample(random.Random(3)).laid
    real = {place for start, length, *_ in laid.passages for place in range(start, start + length)}
    counted = {place for place, weight in enumerate(laid.weights) if weight == 0.25}
    assert counted <= real
    assert 0.4 * len(real) < len(counted) < 0.6 * len(real)
    told = [(place, piece) for place, piece in laid.placed if piece.answer is None]
    assert told
    for place, piece in told:
        assert (place, len(piece.ids), piece.text, 0) in laid.passages
        assert counted & set(range(place, place + len(piece.ids)))


def test_a_passage_has_the_same_name_in_every_document(documents: list[AskedDocument]) -> None:
    names: dict[int, set[int | None]] = {}
    for document in documents:
        for _, piece in document.laid.placed:
            if piece.answer is None:
                names.setdefault(piece.fact, set()).add(piece.text)
    assert len(names) == len(PASSAGES)
    assert all(len(found) == 1 for found in names.values())
    assert len(set.union(*names.values())) == len(PASSAGES)


def test_shares_of_near_questions(chatty: Any) -> None:
    for share, expected in ((0.0, {False}), (1.0, {True})):
        task = make_task(chatty, near_share=share)
        assert {near for seed in range(20) for *_, near in task.sample(random.Random(seed)).asked} == expected


def test_no_two_passages_of_a_document_have_one_title(chatty: Any) -> None:
    """They may hold the same sentences."""
    again = [AskedPassage(f"{one.text} {one.text}", one.title, one.questions) for one in PASSAGES]
    task = make_task(chatty, asked=[*PASSAGES, *again], passages=(6, 6), window=2000, near_share=0.0)
    for seed in range(20):
        told = [task.kept[piece.fact].title for _, piece in task.sample(random.Random(seed)).laid.placed if piece.text]
        assert len(told) == len(set(told)) == 6


def test_long_passages_are_cut_for_reading_again(chatty: Any) -> None:
    """The part with the answer stands in front, at most as long as a passage of `fot ask`, beside parts of others."""
    text = "".join(f"The hen of number {n} laid an egg near the gate. " for n in range(12)) + "Gus lives in Rome."
    long = AskedPassage(text, "gus.txt", [("Where does Gus live?", ["Rome"])])
    task = make_task(chatty, asked=[long, *PASSAGES], near_share=1.0, passages=(3, 3), window=900)
    seen = 0
    for seed in range(40):
        document = task.sample(random.Random(seed))
        for said, reply in turns(chatty.decode(document.laid.ids)):
            sources = re.findall(r"From (\w+\.txt):\n(.*?)\n\n", said, re.DOTALL)
            assert 1 <= len(sources) <= 3
            assert all(len(part) <= 130 for _, part in sources)
            if reply == "Rome.":
                assert "Rome" in dict(sources)["gus.txt"]
                assert said == with_passages("Where does Gus live?", sources[::-1])
                seen += 1
    assert seen


def test_the_same_rng_gives_the_same_document(chatty: Any, task: PassageQuestions) -> None:
    one, other = task, make_task(chatty, near_share=0.4)
    made: list[Task] = [one, other]
    assert len({str(each.document(random.Random(1))) for each in made}) == 1
    assert one.document(random.Random(1)) != one.document(random.Random(2))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("in the  mill", "In the mill."),
        ("Yes!", "Yes!"),
        ('"go away."', '"go away."'),
        ("anna said \u201cno\u201d", "Anna said \u201cno\u201d."),
        ("3", "3."),
    ],
)
def test_answers_are_written_as_people_write(answer: str, said: str) -> None:
    assert as_said(answer) == said


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"windows": 1}, "at least 2"),
        ({"passages": (3, 2)}, "least <= most"),
        ({"text_share": 1.5}, "text_share=1.5"),
        ({"near_share": -1.0}, "near_share=-1.0"),
        ({"text_weight": -1.0}, "negative"),
        ({"window": 20}, "none of 6 passages fits .* longer"),
    ],
)
def test_bad_settings_are_refused(chatty: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_task(chatty, **settings)


def test_what_does_not_fit_is_refused(tokenizer: Any, chatty: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        make_task(tokenizer)
    with pytest.raises(ValueError, match="no room for a question: make windows longer"):
        make_task(chatty, windows=12, window=40).document(random.Random(0))
    dull = filler_from([chatty("The grass is " + "green. ").input_ids * 400])
    with pytest.raises(ValueError, match="The grass is green"):
        PassageQuestions(chatty, dull, PASSAGES, windows=2, window=700).document(random.Random(0))


GOOD = {"passage": "A cat sat.", "question": "Who sat?", "answers": ["a cat"]}


def test_rows_with_one_passage_belong_together(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"passage": "Other."}, GOOD | {"question": "Which animal?"}, GOOD | {"title": "cat.txt"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    found = read_asked(str(file))
    assert [(one.text, one.title, len(one.questions)) for one in found] == [
        ("A cat sat.", "", 2), ("Other.", "", 1), ("A cat sat.", "cat.txt", 1),
    ]  # fmt: skip
    assert found[0].questions[1] == ("Which animal?", ["a cat"])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON in UTF-8"),
        (b"[1]", r"\[1\], no object"),
        (json.dumps(GOOD | {"passage": " "}).encode(), 'passage is " "'),
        (json.dumps(GOOD | {"question": 3}).encode(), "question is 3"),
        (json.dumps({"passage": "A cat."}).encode(), "question is null"),
        (json.dumps(GOOD | {"title": None}).encode(), "title is null"),
        (json.dumps(GOOD | {"answers": "a cat"}).encode(), 'answers is "a cat"'),
        (json.dumps(GOOD | {"answers": []}).encode(), r"answers is \[\]"),
        (json.dumps(GOOD | {"answers": ["a", 3]}).encode(), "it must be a list of texts"),
        (b"[" * 100_000, "no JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_files_are_refused(line: bytes, part: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2.*{part}.*write") as refused:
        read_asked(str(file))
    assert "\n" not in str(refused.value)


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no rows: add lines"):
        read_asked(str(tmp_path / "rows.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"none.jsonl; correct path"):
        read_asked(str(tmp_path / "none.jsonl"))


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, chatty: Any) -> None:
    plain = AutoModelForCausalLM.from_config(configuration("llama", max_position_embeddings=512))
    plain.save_pretrained(tmp_path / "model")
    chatty.save_pretrained(tmp_path / "model")
    (tmp_path / "asked.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "text.txt").write_text(FILLER)
    recipe = tmp_path / "recipe.yaml"
    task = {"kind": "questions", "path": str(tmp_path / "asked.jsonl"), "passages": [1, 2], "weight": 1}
    settings = {
        "model": str(tmp_path / "model"), "memory": {"mem_layers": [1], "local_context": 200}, "lanes": 2, "windows": 2,
        "tasks": [task | {"filler": [{"path": str(tmp_path / "text.txt")}]}], "steps": 4, "save_every": 2,
        "dtype": "float32",
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    assert train(recipe, tmp_path / "whole") == 0
    for steps in (2, 4):
        assert train(recipe, tmp_path / "parts", f"steps={steps}", "--resume") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
