"""Synthetic retrieval: what is asked was told, and only answers count."""

import copy
import inspect
import random
import re
from collections.abc import Iterator
from string import Formatter
from typing import Any

import pytest

import training.tasks
from fot import pretrained
from fot.checkpoint import cache_dir
from fot.evaluation import needles, passkey
from fot.smollm2 import SMOLLM2_FOLDER
from fot.tasks import dictionary, wordings, words
from fot.tasks.task import Task
from fot.tasks.wordings import KINDS, draw, forbidden, render
from fot.tasks.words import WORDS
from training.hiding import Stretch, filler_from
from training.tasks import Sample, SyntheticRetrieval, draw_facts

TEXT = (
    "It was a dark evening in the old town, and nobody would have gone out without need. The clerk put down his pen, "
    "looked at the lamp and sighed.\n\ndef area(width, height):\n    return width * height  # in metres\n\n"
) * 20
SAMPLES = 60
# Subjects of fot.evaluation.needles.
HELD_OUT = re.compile(r"sandwich|\bbest\b|phone|\bborn\b|birth|reached|thing to do", re.IGNORECASE)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def real_tokenizer() -> Any:
    """That of smollm2-135m, which makes the space before a number a token."""
    folder = cache_dir() / SMOLLM2_FOLDER
    if not folder.exists():
        pytest.skip("smollm2-135m is not in the cache")
    return pretrained.load_tokenizer(pretrained.resolve("smollm2-135m"))


@pytest.fixture(scope="module", params=["bytes", pytest.param("smollm2", marks=pytest.mark.slow)])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("tokenizer" if request.param == "bytes" else "real_tokenizer")


def make_task(tokenizer: Any, **settings: Any) -> SyntheticRetrieval:
    defaults = {"windows": 3, "window": 700, "text_share": 0.0}
    return SyntheticRetrieval(tokenizer, filler_from([encode(tokenizer, TEXT)]), **(defaults | settings))


@pytest.fixture(scope="module")
def samples(any_tokenizer: Any) -> list[Sample]:
    task = make_task(any_tokenizer)
    return [task.sample(random.Random(seed)) for seed in range(SAMPLES)]


def statements(sample: Sample) -> Iterator[tuple[int, int, list[int]]]:
    """(first position, number of the fact, tokens)."""
    return ((place, piece.fact, piece.ids) for place, piece in sample.placed if piece.answer is None)


def test_documents_have_exact_lengths(samples: list[Sample]) -> None:
    for sample in samples:
        assert len(sample.ids) == len(sample.weights) == 3 * 700 + 1


def test_weighted_tokens_are_the_answers_and_their_ends(any_tokenizer: Any, samples: list[Sample]) -> None:
    """Read off ids and weights alone; only then compared with what the sample says of itself."""
    for sample in samples:
        runs: list[list[int]] = []
        for place, weight in enumerate(sample.weights):
            assert weight in (0.0, 1.0)
            if weight and not sample.weights[place - 1]:
                runs.append([])
            if weight:
                runs[-1].append(sample.ids[place])
        asked = [sample.facts[piece.fact].value for _, piece in sample.placed if piece.answer]
        assert [any_tokenizer.decode(run[:-1]).strip(" ") for run in runs] == asked
        assert all(any_tokenizer.decode(run[-1:])[0] in ".\n\";})':" for run in runs)


def test_answers_begin_where_a_prompt_ends(any_tokenizer: Any, samples: list[Sample]) -> None:
    for _, piece in (placed for sample in samples for placed in sample.placed):
        if piece.answer:
            prompt = any_tokenizer.decode(piece.ids[: piece.answer[0]])
            assert encode(any_tokenizer, prompt) == piece.ids[: piece.answer[0]]
            assert not prompt.endswith(" ")


def test_facts_lie_in_earlier_windows_and_questions_in_the_last(samples: list[Sample]) -> None:
    near = 0
    for sample in samples:
        told = {fact: place for place, fact, _ in statements(sample)}
        assert len(told) == len(list(statements(sample)))
        questions = [(place, piece) for place, piece in sample.placed if piece.answer]
        assert questions
        for place, piece in sample.placed:
            assert sample.ids[place : place + len(piece.ids)] == piece.ids
            assert (place < 1400) == (place + len(piece.ids) <= 1400)
        for place, piece in questions:
            assert place >= 1400
            assert told[piece.fact] < place
        near += sum(place >= 1400 for place in told.values())
        assert any(told[piece.fact] < 1400 for _, piece in questions)
    assert 0 < near < 0.2 * sum(len(list(statements(sample))) for sample in samples)


def test_statements_name_entity_and_value(any_tokenizer: Any, samples: list[Sample]) -> None:
    for sample in samples:
        for _, number, ids in statements(sample):
            text, fact = any_tokenizer.decode(ids), sample.facts[number]
            assert fact.value in text
            assert fact.entity.lower() in text.lower()


def test_some_facts_are_never_asked_and_some_twice(samples: list[Sample]) -> None:
    never = twice = 0
    for sample in samples:
        asked = [piece.fact for _, piece in sample.placed if piece.answer]
        never += len({fact for _, fact, _ in statements(sample)} - set(asked))
        twice += len(asked) - len(set(asked))
    assert never > SAMPLES / 10
    assert twice > SAMPLES / 10


def test_distractors_share_relation_or_entity_but_never_both() -> None:
    rng = random.Random(0)
    same_relation = same_entity = 0
    for _ in range(100):
        facts = draw_facts(KINDS, 8, 0.7, rng)
        assert len({(fact.entity, fact.relation) for fact in facts}) == 8
        assert len({fact.value for fact in facts}) == 8
        for one in facts:
            others = [fact for fact in facts if fact is not one]
            same_relation += any((fact.kind, fact.relation) == (one.kind, one.relation) for fact in others)
            same_entity += any(fact.entity == one.entity for fact in others)
    assert same_relation > 250
    assert same_entity > 250
    lonely = [draw_facts(KINDS, 8, 0.0, rng) for _ in range(100)]
    assert sum(8 - len({fact.entity for fact in facts}) for facts in lonely) < 10


def test_the_same_rng_gives_the_same_document(tokenizer: Any) -> None:
    task: Task = make_task(tokenizer, text_share=0.3)
    assert task.document(random.Random(1)) == task.document(random.Random(1))
    assert task.document(random.Random(1))[0] != task.document(random.Random(2))[0]


def test_text_weight_and_share(tokenizer: Any) -> None:
    task = make_task(tokenizer, text_share=0.3, text_weight=0.05)
    sample = task.sample(random.Random(0))
    text = len(sample.ids) - sum(len(piece.ids) for _, piece in sample.placed)
    assert sample.weights.count(0.05) == pytest.approx(0.3 * text, rel=0.2)
    inside = [sample.weights[place + i] for place, piece in sample.placed for i in range(len(piece.ids))]
    assert set(inside) == {0.0, 1.0}
    assert sample.weights[0] == 0.0


def test_text_between_is_consecutive(tokenizer: Any) -> None:
    text = list(range(5000))
    task = SyntheticRetrieval(tokenizer, lambda rng, count: [Stretch(7, 50, text[:count])], windows=2, window=600)
    sample = task.sample(random.Random(0))
    hidden = {place + i for place, piece in sample.placed for i in range(len(piece.ids))}
    between = [token for place, token in enumerate(sample.ids) if place not in hidden]
    assert between == text[: len(between)]
    said = {passage.start + i: passage.first + i - 50 for passage in sample.passages for i in range(passage.length)}
    assert said == {place: token for place, token in enumerate(sample.ids) if place not in hidden}
    assert {passage.text for passage in sample.passages} == {7}
    assert len(sample.passages) <= len(sample.placed) + 1
    assert task.document(random.Random(0)).passages == sample.passages


def test_bos_comes_first_where_the_model_expects_it(tokenizer: Any) -> None:
    class WithBos:
        add_bos_token = True
        bos_token_id = tokenizer.bos_token_id
        decode = tokenizer.decode

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return tokenizer(text, add_special_tokens=add_special_tokens)

    sample = make_task(WithBos()).sample(random.Random(0))
    assert sample.ids[0] == tokenizer.bos_token_id
    assert len(sample.ids) == 3 * 700 + 1
    assert all(place >= 1 for place, _ in sample.placed)


def test_filler_goes_on_with_other_texts() -> None:
    fill = filler_from([[1, 2, 3], [], [7] * 50])
    for seed in range(20):
        for count in (40, 400):
            assert sum(len(stretch.ids) for stretch in fill(random.Random(seed), count)) == count
    assert fill(random.Random(0), 0) == []
    texts = {stretch.text for seed in range(20) for stretch in fill(random.Random(seed), 400)}
    assert len(texts) == 2
    with pytest.raises(ValueError, match="empty"):
        filler_from([[]])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"windows": 1}, "at least 2"),
        ({"facts": (3, 2)}, "least <= most"),
        ({"text_share": 1.5}, "text_share=1.5"),
        ({"near_share": 1.0}, "near_share"),
        ({"text_weight": -1.0}, "negative"),
        ({"kinds": ()}, "kinds"),
        ({"chat_share": 1.5}, "chat_share=1.5"),
        ({"chat_share": 0.3}, "no chat template"),
    ],
)
def test_bad_settings_are_refused(tokenizer: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_task(tokenizer, **settings)


def test_short_windows_and_bad_fillers_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="make windows longer"):
        make_task(tokenizer, window=20).document(random.Random(0))
    with pytest.raises(ValueError, match="gave 3 tokens, but"):
        SyntheticRetrieval(tokenizer, lambda rng, count: [Stretch(0, 0, [5, 5, 5])]).document(random.Random(0))
    dull = encode(tokenizer, "The grass is " + "green. ") * 900
    with pytest.raises(ValueError, match="The grass is green"):
        SyntheticRetrieval(tokenizer, lambda rng, count: [Stretch(0, 0, dull[:count])]).document(random.Random(0))


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)


@pytest.fixture
def chat_tokenizer(any_tokenizer: Any) -> Any:
    """With a chat template: the model's own where it has one."""
    if getattr(any_tokenizer, "chat_template", None):
        return any_tokenizer
    with_template = copy.deepcopy(any_tokenizer)
    with_template.chat_template = TEMPLATE
    return with_template


def test_chat_questions_stand_as_a_model_is_asked(chat_tokenizer: Any) -> None:
    """The prompt is what generation starts from; of the reply the value counts fully, the other words like text."""
    task = make_task(chat_tokenizer, chat_share=0.5, text_weight=0.25)
    asked = chats = sentences = 0
    for seed in range(SAMPLES):
        sample = task.sample(random.Random(seed))
        for place, piece in sample.placed:
            asked += piece.answer is not None
            first, last = piece.reply
            if piece.answer is None or not last:
                continue
            chats += 1
            prompt, reply = (chat_tokenizer.decode(ids) for ids in (piece.ids[:first], piece.ids[first:last]))
            question = re.findall(r"user\W*?[\n ](.*?)<[/|]", prompt, re.DOTALL)[-1]
            user = [{"role": "user", "content": question}]
            assert prompt == chat_tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            fact = sample.facts[piece.fact]
            assert fact.value in reply
            assert reply.endswith(chat_tokenizer.eos_token)
            sentences += reply.removesuffix(chat_tokenizer.eos_token).rstrip(".") != fact.value
            start, end = piece.answer
            assert chat_tokenizer.decode(piece.ids[start:end]).strip(" ") == fact.value
            weights = sample.weights[place : place + len(piece.ids)]
            assert set(weights[:first]) | set(weights[last:]) <= {0.0}
            assert set(weights[start : end + 1]) == {1.0}
            assert set(weights[first:start] + weights[end + 1 : last]) <= {0.25}
    assert 0.3 * asked < chats < 0.6 * asked
    assert 0.2 * chats < sentences < 0.6 * chats


def test_a_template_that_adds_to_replies_is_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE.replace("{{ m.content }}", "[{{ m.content }}]")
    task = make_task(other, chat_share=1.0, kinds=KINDS[:1])
    with pytest.raises(ValueError, match="chat_share to 0"):
        task.document(random.Random(0))


# What must not be trained on.


@pytest.mark.parametrize(
    "text",
    [
        "The pass key is 12.",
        "PASS-KEY",
        "my_passkey",
        "Here we go.",
        "the sun is yellow",
        "The code is 12. Remember it.",
        "The vault code is 12. Keep that. 12 is the vault code.",
        "What is the vault code? The vault code is 12",
        "There is an important info hidden inside",
    ],
)
def test_forbidden_finds_what_the_passkey_test_says(text: str) -> None:
    assert forbidden(text)
    assert not forbidden("The code of Anna's locker is 12. What is the code of Anna's locker? Answer: 12.")


def test_thousands_of_wordings_hold_nothing_forbidden() -> None:
    """Statements and questions before any document could be rejected for them."""
    rng = random.Random(0)
    for _ in range(2000):
        for fact in draw_facts(KINDS, 8, 0.7, rng):
            slots = (fact.entity, fact.relation, fact.value, rng)
            told = render(rng.choice(fact.kind.statements), *slots)
            asked = render(rng.choice(fact.kind.questions), *slots)
            text = f"{told} {asked}"
            assert not forbidden(text), text
            assert not HELD_OUT.search(text), text


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_documents_hold_nothing_of_the_passkey_test(tokenizer: Any, count: int) -> None:
    """Compared with the test's own words, not with what ``forbidden`` knows of them. ``-m slow`` takes thousands."""
    said = [passkey.TASK, passkey.NEEDLE.split("{key}")[0], *passkey.FILLER.split(". "), passkey.QUESTION]
    sentences = [sentence.strip(". ").lower() for part in said for sentence in re.split(r"[.?] ", part)]
    assert "remember it" not in sentences  # it stands between the two keys
    sentences += ["remember it", "pass key", "passkey", "pass-key", "quiz you"]
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    tasks = (
        make_task(tokenizer, windows=2, window=500, facts=(4, 6)),
        make_task(with_template, windows=2, window=500, facts=(4, 6), chat_share=1.0),
    )
    for seed in range(count):
        text = tokenizer.decode(tasks[seed % 2].document(random.Random(seed))[0]).lower()
        assert not [sentence for sentence in sentences if sentence in text]


def test_no_chat_turn_has_the_shape_of_the_passkey_question(tokenizer: Any) -> None:
    """ "What is X?" answered by "X is ..." would be it, with the template's marks between."""
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    task = make_task(with_template, chat_share=1.0)
    replies = 0
    for seed in range(300):
        for _, piece in task.sample(random.Random(seed)).placed:
            if piece.reply[1]:
                turn = with_template.decode(piece.ids).replace("</s>", "").replace("assistant> ", " ")
                assert not forbidden(turn.replace("user> ", "")), turn
                replies += 1
    assert replies > 500


def test_sources_hold_nothing_forbidden() -> None:
    """Templates and word lists; and the sources, but for the lines that say what is forbidden."""
    listed = [word for some in WORDS.values() for word in some]
    templates = [template for kind in KINDS for template in kind.statements + kind.questions + kind.relations]
    for text in listed + templates:
        assert not forbidden(text), text
        assert not HELD_OUT.search(text), text
    kinds = inspect.getsource(wordings).split("_KINDS = r")[1]
    assert "grass" not in inspect.getsource(training.tasks)
    for source in (kinds, inspect.getsource(words), inspect.getsource(dictionary)):
        assert "passkey" not in source.lower()
        assert not forbidden(source)


def test_every_kind_has_enough_wordings() -> None:
    assert len(KINDS) >= 20
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert len(set(kind.statements)) >= 8, kind.name
        assert len(set(kind.questions)) >= 6, kind.name
        assert len(kind.relations) >= 6, kind.name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_templates_say_what_they_must(kind: Any) -> None:
    for template in kind.statements + kind.questions:
        slots = [name for _, name, _, _ in Formatter().parse(template) if name]
        assert {"e", "E", "u"} & set(slots), template
        assert {"r", "R", "u"} & set(slots), template
        assert "v" in slots, template
    for template in kind.questions:
        slots = [name for _, name, _, _ in Formatter().parse(template) if name]
        assert slots.index("v") == len(slots) - 1, template


@pytest.mark.slow
def test_hardly_any_question_is_lost_to_the_tokenizer(real_tokenizer: Any) -> None:
    task = make_task(real_tokenizer)
    rng = random.Random(0)
    lost = total = 0
    for kind in KINDS:
        for template in kind.questions:
            head = render(template.split("{v}")[0], draw(kind.entity, rng), kind.relations[0], "", rng)
            whole = task._encode(head + draw(kind.value, rng))
            prompt = task._encode(head.rstrip(" "))
            total += 1
            lost += whole[: len(prompt)] != prompt
    assert lost <= 0.02 * total


def test_needles_are_of_words_that_are_not_trained_on() -> None:
    trained = {word.lower() for listed in WORDS.values() for words in listed for word in words.split()}
    lists = (needles._CITIES, needles._FIRST_NAMES, needles._LAST_NAMES)
    assert not trained & {word.lower() for words in lists for word in words}
    for needle in needles.draw_needles(random.Random(0), 80):
        assert HELD_OUT.search(needle.statement)
        assert not forbidden(f"{needle.statement} {needle.question} {needle.answer}")
