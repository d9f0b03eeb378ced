"""Long texts and questions about them, in the forms of three published benchmarks, by our own code and words.

RULER (arXiv 2404.06654): needles with one key or several, one value or several, variables that pass a value on, common
and frequent words; its prompts' wording. NoLiMa (arXiv 2502.05167): a question that shares no word with what answers
it. BABILong (arXiv 2406.10149): facts of bAbI's form in a novel, of which the latest counts.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fot.tasks.haystack import bos, encode, hide
from fot.tasks.words import WORDS

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Probe:
    """A text and a question about it.

    Attributes:
        ids: token ids of the text, about as many as were asked for.
        question: what is asked when the text has been read.
        stem: how the answer begins.
        answers: what it must hold, all of it.
        tokens: most tokens of the answer.
    """

    ids: list[int]
    question: str
    stem: str
    answers: tuple[str, ...]
    tokens: int


def make_probe(task: str, tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
    """One text of a task with its question.

    Args:
        task: one of ``TASKS``.
        tokenizer: of the model.
        texts: token ids of real texts, for the tasks that hide something in one.
        length: tokens of the text; lists of words may have a few less.
        rng: draws everything.

    Raises:
        ValueError: What must be in the text takes more tokens.
    """
    return TASKS[task](tokenizer, texts, length, rng)


def _needles(keys: int, values: int, queries: int) -> Callable[..., Probe]:
    """RULER's needles: ``keys`` of them with ``values`` each, of which ``queries`` keys are asked for."""

    def make(tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
        names: dict[str, list[str]] = {}
        while len(names) < keys:
            name = f"{rng.choice(WORDS['adjective'])}-{rng.choice(WORDS['noun'])}"
            names[name] = [str(rng.randrange(1_000_000, 10_000_000)) for _ in range(values)]
        told = [
            f"One of the special magic numbers for {name} is: {value}."
            for name, some in names.items()
            for value in some
        ]
        rng.shuffle(told)
        ids = hide(tokenizer, texts, told, length, rng).ids
        asked = rng.sample(list(names), queries)
        answers = tuple(value for name in asked for value in names[name])
        what = asked[0] if queries == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
        number, are = ("number", "is") if len(answers) == 1 else ("numbers", "are")
        question = f"What {are} all the special magic numbers for {what} mentioned in the provided text?"
        if len(answers) == 1:
            question = f"What is the special magic number for {what} mentioned in the provided text?"
        stem = f"The special magic {number} for {what} mentioned in the provided text {are}"
        return Probe(ids, question, stem, answers, 12 * len(answers))

    return make


def _variables(tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
    """RULER's variable tracking: one value passed on four times."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(rng.choice(letters) for _ in range(5)) for _ in range(5)]
    value = str(rng.randrange(10_000, 100_000))
    told = [f"VAR {names[0]} = {value}"]
    told += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    stem = (
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        f"value {value}, they are:"
    )
    return Probe(hide(tokenizer, texts, told, length, rng).ids, question, stem, tuple(names), 40)


def _common_words(tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
    """RULER's common words: ten words ten times as often as the others."""
    often, seldom, count = 30, 3, 10
    size = max(1, len(encode(tokenizer, " ".join(f"{number}. {_word(rng)}" for number in range(500, 600)))) // 100)
    total = max(length // (size + 1), count * often + seldom)
    common = _different_words(rng, count)
    words = common * often
    others = _different_words(rng, (total - len(words)) // seldom, but=common)
    words += others * seldom
    rng.shuffle(words)
    ids = bos(tokenizer) + encode(tokenizer, " ".join(f"{number}. {word}" for number, word in enumerate(words, 1)))
    if len(ids) > 1.2 * length:
        raise ValueError(f"a list with {count} common words takes {len(ids)} tokens, more than {length}: ask for more")
    question = "Question: What are the 10 most common words in the above list?"
    return Probe(ids, question, "Answer: The top 10 words that appear most often in the list are:", tuple(common), 60)


def _frequent_words(tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
    """RULER's frequent words: how often a word comes falls with the square of its rank; the first is noise."""
    words = _different_words(rng, 40)
    weights = [1 / rank**2 for rank in range(2, len(words) + 2)]
    drawn: list[str] = []
    ids = bos(tokenizer)
    while len(ids) < length:
        some = [word if rng.random() > 0.5 else "..." for word in rng.choices(words, weights, k=50)]
        drawn += some
        ids += encode(tokenizer, " " + " ".join(some))
    answers = sorted(words, key=lambda word: -drawn.count(word))[:3]
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    stem = "Answer: According to the coded text above, the three most frequently appeared words are:"
    return Probe(ids[:length], question, stem, tuple(answers), 24)


# What is told of a person, and a question that shares no word with it: the model must know what joins them.
REWORDED = (
    ("{} lives next to the Eiffel Tower", "has been to Paris"),
    ("{} lives next to the Kiasma museum", "has been to Finland"),
    ("{} rents a flat that looks on the Colosseum", "lives in Rome"),
    ("{} walks past Big Ben on the way to the office", "works in London"),
    ("{} takes insulin before every meal", "has diabetes"),
    ("{} cannot drink milk", "must avoid lactose"),
    ("{} never eats meat", "is a vegetarian"),
    ("{} flies a Boeing for a living", "is a pilot"),
    ("{} pulls teeth all day", "is a dentist"),
    ("{} bakes bread from three in the morning", "runs an oven at night"),
    ("{} was born on Christmas", "has a birthday in December"),
    ("{} speaks only Portuguese at home", "may come from Brazil"),
    ("{} wears glasses and still bumps into doors", "has poor eyesight"),
    ("{} climbed Mount Everest", "has been to Nepal"),
    ("{} took a photograph of the Statue of Liberty", "has been to New York"),
    ("{} saw the pyramids at Giza", "has been to Egypt"),
)


def _reworded(tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
    name = rng.choice(WORDS["first"])
    told, asked = rng.choice(REWORDED)
    ids = hide(tokenizer, texts, [f"Actually, {told.format(name)}."], length, rng).ids
    return Probe(ids, f"Question: Which character {asked}?", f"Answer: The character who {asked} is", (name,), 6)


ROOMS = ("kitchen", "garden", "office", "bathroom", "bedroom", "hallway")
MOVES = ("went to", "moved to", "travelled to", "journeyed to", "went back to")


def _moves(tokenizer: Any, texts: Texts, length: int, rng: random.Random) -> Probe:
    """bAbI's first task: people change rooms; where is one of them?"""
    people = rng.sample(WORDS["first"], 4)
    where: dict[str, str] = {}
    told = []
    for _ in range(10):
        person = rng.choice(people)
        where[person] = rng.choice([room for room in ROOMS if room != where.get(person)])
        told.append(f"{person} {rng.choice(MOVES)} the {where[person]}.")
    asked = rng.choice(list(where))
    ids = hide(tokenizer, texts, told, length, rng).ids
    return Probe(ids, f"Question: Where is {asked} now?", f"Answer: {asked} is in the", (where[asked],), 4)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS["syllable"]) for _ in range(3))


def _different_words(rng: random.Random, count: int, but: Sequence[str] = ()) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        word = _word(rng)
        if word not in but:
            words[word] = None
    return list(words)


TASKS: dict[str, Callable[[Any, Texts, int, random.Random], Probe]] = {
    "single": _needles(1, 1, 1),
    "multikey": _needles(4, 1, 1),
    "multivalue": _needles(1, 4, 1),
    "multiquery": _needles(4, 1, 4),
    "variables": _variables,
    "common": _common_words,
    "frequent": _frequent_words,
    "reworded": _reworded,
    "moves": _moves,
}
