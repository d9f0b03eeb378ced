"""Needles in a novel: facts hidden in a long text, each asked for in one line, from the memory.

Subjects, names and wordings are in no training document (``fot.tasks.wordings``): results are zero-shot.
"""

import copy
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fot.ask import Conversation
from fot.chat import has_template, question_text
from fot.compat import CACHE
from fot.evaluation.answers import greedy_answer, without_memory
from fot.tasks.haystack import bos, encode, hide
from memory import Memory


def _words(text: str) -> list[str]:
    return text.split()


_CITIES = _words(
    "Lisbon Porto Madrid Seville Lyon Turin Naples Palermo Athens Vienna Prague Krakow Riga Tallinn Oslo Bergen Aarhus "
    "Dublin Leeds Bristol Ghent Utrecht Bremen Leipzig Zurich Denver Boston Chicago Toronto Bogota Quito Havana "
    "Nairobi Accra Cairo Osaka Busan Perth"
)
_ACTIVITIES = (
    "watch the swans",
    "eat oysters",
    "listen to the organ",
    "rent a rowing boat",
    "sketch the fishermen",
)
_PLACES = (
    "by the old lighthouse",
    "in the botanical park",
    "under the railway arches",
    "on the cathedral steps",
)
_FILLINGS = ("smoked eel", "roast pork", "fried halloumi", "pickled herring", "grilled aubergine", "duck liver")
_BREADS = ("on rye bread", "in a seeded bun", "on toasted sourdough", "in warm flatbread")
_FIRST_NAMES = _words(
    "Alastair Bettina Casper Delphine Eamon Franziska Gideon Henrietta Isidore Jocasta Kendrick Lavinia Magnus Nadine "
    "Octavia Percival Rosalind Sebastian Theodora Ulrich Verena Wendell Xenia Yolanda Zachary"
)
_LAST_NAMES = _words(
    "Abernathy Birkett Crowhurst Dunsmore Eastlake Fennimore Galloway Hathersage Ingleby Jellicoe Kirkbride Lockhart "
    "Merriweather Northcott Ormsby Prendergast Quigley Ravenscroft Sotheby Thistlewood Underhill Vandermeer Whitcombe "
    "Yarwood"
)


# Longest reply in chat.
CHAT_TOKENS = 32


@dataclass(frozen=True)
class Needle:
    """A fact to hide in a long text.

    Attributes:
        kind: what sort of fact it is.
        subject: what it is about; distinct among needles of a kind that are drawn together.
        statement: the sentence to hide.
        asked: the question, as one would put it to a person.
        stem: a sentence that answers it, up to the answer.
        answer: what must follow, without the space between.
    """

    kind: str
    subject: str
    statement: str
    asked: str
    stem: str
    answer: str

    @property
    def question(self) -> str:
        """Ends so that a plain language model goes on with the answer."""
        return f"{self.asked} {self.stem}"


def draw_needles(rng: random.Random, count: int) -> list[Needle]:
    """Needles about a city's best sandwich and best pastime, and people's phone numbers and birthplaces, in turn.

    Subjects differ, and so do answers, so that the answer to another needle is always wrong.

    Raises:
        ValueError: more are asked for than there are distinct answers.
    """
    makers = (_sandwich, _pastime, _phone_number, _birthplace)
    most = len(makers) * len(_ACTIVITIES) * len(_PLACES)  # the kind with the fewest answers
    if not 0 <= count <= most:
        raise ValueError(f"there are no {count} needles with distinct answers: ask for at most {most}")
    needles: list[Needle] = []
    while len(needles) < count:
        needle = makers[len(needles) % len(makers)](rng)
        same = [(other.kind, other.subject) == (needle.kind, needle.subject) for other in needles]
        if not any(same) and all(needle.answer != other.answer for other in needles):
            needles.append(needle)
    return needles


@dataclass(frozen=True)
class Haystack:
    """A text with needles.

    Attributes:
        ids: exactly as many token ids as were asked for.
        needles: in the order in which they lie there.
        depths: share of the text that lies before each, 0..1.
    """

    ids: list[int]
    needles: list[Needle]
    depths: list[float]


@dataclass(frozen=True)
class Answer:
    """What a model answered to one needle's question.

    Attributes:
        kind: of the needle.
        depth: where the needle was, 0 (start) to 1 (end).
        expected: the right answer.
        answer: what the model wrote.
        correct: it begins with the right answer, and not with a longer word or number; in chat, it holds it somewhere,
            in upper or lower case.
        tokens_right: share of the answer's tokens that are the model's likeliest, each after the right ones before it;
            in chat too the sentence up to the answer is given. No passage is read again for it.
        without: ``correct`` and ``tokens_right`` of the plain model that sees the question alone.
        whole_text: the same of the plain model that sees the whole text in one context, where it has positions for
            that: what the model itself can do. ``correct`` here is whether all tokens are right.
    """

    kind: str
    depth: float
    expected: str
    answer: str
    correct: bool
    tokens_right: float
    without: dict[str, float]
    whole_text: dict[str, float] | None = None


def make_haystack(
    tokenizer: Any, texts: Sequence[Sequence[int]], length: int, count: int, rng: random.Random
) -> Haystack:
    """Needles at random depths of running text, which goes on from a random place and starts again where it ends.

    Args:
        tokenizer: of the model.
        texts: token ids of real texts.
        length: tokens of the whole.
        count: needles.
        rng: draws needles, text and depths.

    Raises:
        ValueError: the needles alone take more tokens.
    """
    needles = draw_needles(rng, count)
    rng.shuffle(needles)
    found = hide(tokenizer, texts, [needle.statement for needle in needles], length, rng)
    return Haystack(found.ids, needles, found.depths)


@torch.no_grad()
def run(
    model: Any,
    texts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    needles: int = 8,
    trials: int = 4,
    chat: bool = False,
    reread: str = "off",
    seed: int = 0,
    report: Callable[[int, Answer], None] = lambda length, answer: None,
    progress: Any = None,
) -> dict[str, Any]:
    """Answers by kind of needle and length, with memory and without.

    Each text is read once into a memory, from which all its questions are asked; a question alone is the local window.

    Args:
        model: a ``FoTForCausalLM`` with ``tokenizer``.
        texts: token ids of real texts.
        lengths: tokens of text and needles together.
        needles: of each text.
        trials: texts of each length.
        chat: put questions in the tokenizer's chat template, as ``fot ask`` does, and let the model word its reply.
        reread: in chat, how passages are found that are read again in front of a question, as ``Conversation.say``
            takes it; ``off``: the answer comes from the memory alone.
        seed: draws needles, texts and depths.
        report: called with length and answer, after each question.
        progress: a tqdm bar that is moved by each token read, or None.

    Returns:
        ``{"results": [...], "interrupted": bool}``, one entry a length: ``length``, ``ingest_tokens_per_second``,
        ``memory_bytes``, ``answers`` (fields of ``Answer``), and ``kinds``: for each kind and for ``all`` of them
        ``questions``, ``correct`` (share), ``begun`` (share whose tokens are all right, the sentence up to the answer
        given, which is what ``correct`` of ``whole_text`` is), ``tokens_right``, and the same of a model ``without``
        memory and of the ``whole_text``.
        Ctrl-C ends the run and keeps the answers that were given.

    Raises:
        ValueError: ``chat`` and a tokenizer without a chat template, or ``reread`` without ``chat``.
    """
    if reread != "off" and not chat:
        raise ValueError(f"reread is {reread!r}, but passages are read again in chat alone: ask with chat (--chat)")
    if chat and not has_template(model.tokenizer):
        raise ValueError("this model's tokenizer has no chat template: ask without chat")
    results: list[dict[str, Any]] = []
    interrupted = False
    try:
        for length in lengths:
            rng = random.Random(f"{seed}/{length}")
            haystacks = [make_haystack(model.tokenizer, texts, length, needles, rng) for _ in range(trials)]
            results.append({"length": length, "answers": [], "ingest_seconds": 0.0, "ingest_tokens": 0})
            for haystack in haystacks:
                memory = _read(model, haystack, results[-1], progress)
                read_whole = _read_whole(model, haystack, chat)
                reading = None if reread == "off" else (Conversation(model, memory), reread)
                for needle, depth in zip(haystack.needles, haystack.depths, strict=True):
                    answer = replace(ask(model, needle, depth, memory, chat, reading), whole_text=read_whole(needle))
                    results[-1]["answers"].append(answer)
                    report(length, answer)
    except KeyboardInterrupt:
        interrupted = True
    return {"results": [_summary(entry) for entry in results if entry["answers"]], "interrupted": interrupted}


def ask(
    model: Any,
    needle: Needle,
    depth: float,
    memory: Memory,
    chat: bool = False,
    reading: tuple[Conversation, str] | None = None,
) -> Answer:
    """One question, with the memory and without; the memory is not written to.

    ``reading``: a conversation with this memory and a way to find passages, which are read again before the reply.
    """
    prompt, target = question_ids(model.tokenizer, needle, chat)
    asked, most, marks = prompt, len(target) + 1, _begins_with  # one token more shows whether a word or number goes on
    if chat:
        asked, most, marks = encode(model.tokenizer, question_text(model.tokenizer, needle.asked)), CHAT_TOKENS, _holds
    plain = greedy_answer(model, asked, most)
    if reading is None:
        text = greedy_answer(model, asked, most, memory=memory)
    else:
        text = reading[0].anew().say(needle.asked, max_new_tokens=most, reread=reading[1]).text
    without = {
        "correct": float(marks(plain, needle.answer)),
        "tokens_right": _tokens_right(model, prompt, target, None),
    }
    right = _tokens_right(model, prompt, target, memory)
    return Answer(needle.kind, depth, needle.answer, text, marks(text, needle.answer), right, without)


def _read(model: Any, haystack: Haystack, entry: dict[str, Any], progress: Any) -> Memory:
    start = time.perf_counter()
    memory = model.new_memory()
    model.ingest(haystack.ids, memory, progress=False if progress is None else progress)
    entry["ingest_seconds"] += time.perf_counter() - start
    entry["ingest_tokens"] += len(haystack.ids)
    entry["memory_bytes"] = sum(memory.nbytes().values())
    return memory


def _read_whole(model: Any, haystack: Haystack, chat: bool = False) -> Callable[[Needle], dict[str, float] | None]:
    """Reads the text in one context, if the model has as many positions; gives what each question then gets."""
    asked = [question_ids(model.tokenizer, needle, chat) for needle in haystack.needles]
    longest = max((len(prompt) + len(target) for prompt, target in asked), default=0)
    if len(haystack.ids) + longest > model.config.max_position_embeddings:
        return lambda needle: None
    with without_memory(model) as plain:
        read = plain(torch.tensor([haystack.ids], device=plain.device), use_cache=True, logits_to_keep=1)
    cache = getattr(read, CACHE)

    def marks(needle: Needle) -> dict[str, float]:
        prompt, target = question_ids(model.tokenizer, needle, chat)
        prompt = prompt[0 if chat else len(bos(model.tokenizer)) :]  # the text goes on
        ids = torch.tensor([prompt + target[:-1]], device=model.device)
        with without_memory(model) as plain:
            logits = plain(ids, logits_to_keep=len(target), **{CACHE: copy.deepcopy(cache)}).logits[0]
        right = (logits.argmax(-1).cpu() == torch.tensor(target)).float()
        return {"correct": float(right.all()), "tokens_right": float(right.mean())}

    return marks


def question_ids(tokenizer: Any, needle: Needle, chat: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of the question with the sentence up to the answer, and of the answer."""
    first = [] if chat else bos(tokenizer)
    text = question_text(tokenizer, needle.asked) + needle.stem if chat else f"\n{needle.question}"
    prompt, whole = first + encode(tokenizer, text), first + encode(tokenizer, f"{text} {needle.answer}")
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    return prompt, encode(tokenizer, f" {needle.answer}")  # a tokenizer that joins them


def _tokens_right(model: Any, prompt: list[int], target: list[int], memory: Memory | None) -> float:
    ids = torch.tensor([prompt + target[:-1]], device=model.device)
    logits = model(ids, memory=memory, use_cache=False, logits_to_keep=len(target)).logits[0]
    return float((logits.argmax(-1).cpu() == torch.tensor(target)).float().mean())


def _begins_with(text: str, expected: str) -> bool:
    rest = text.lstrip().removeprefix(expected)
    return rest != text.lstrip() and not rest[:1].isalnum()


def _holds(text: str, expected: str) -> bool:
    # A reply may begin with the value, which then has a capital that the text does not have.
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text, re.IGNORECASE) is not None


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    answers: list[Answer] = entry["answers"]
    kinds = {
        kind: [answer for answer in answers if answer.kind == kind] for kind in dict.fromkeys(a.kind for a in answers)
    }
    return {
        "length": entry["length"],
        "ingest_tokens_per_second": entry["ingest_tokens"] / entry["ingest_seconds"],
        "memory_bytes": entry["memory_bytes"],
        "kinds": {kind: _shares(found) for kind, found in sorted(kinds.items())} | {"all": _shares(answers)},
        "answers": [asdict(answer) for answer in answers],
    }


def _shares(answers: Sequence[Answer]) -> dict[str, Any]:
    whole = [answer.whole_text for answer in answers if answer.whole_text is not None]
    with_memory = [{"correct": float(answer.correct), "tokens_right": answer.tokens_right} for answer in answers]
    return {
        "questions": len(answers),
        **_mean(with_memory),
        "without": _mean([answer.without for answer in answers]),
        "whole_text": _mean(whole) if whole else None,
    }


def _mean(marks: Sequence[dict[str, float]]) -> dict[str, float]:
    marks = [mark | {"begun": float(mark["tokens_right"] == 1)} for mark in marks]
    return {name: sum(mark[name] for mark in marks) / len(marks) for name in ("correct", "begun", "tokens_right")}


def _sandwich(rng: random.Random) -> Needle:
    city, answer = rng.choice(_CITIES), f"{rng.choice(_FILLINGS)} {rng.choice(_BREADS)}"
    stem = f"The best sandwich in {city} is"
    return Needle("sandwich", city, f"{stem} {answer}.", f"Which sandwich should one try in {city}?", stem, answer)


def _pastime(rng: random.Random) -> Needle:
    city, answer = rng.choice(_CITIES), f"{rng.choice(_ACTIVITIES)} {rng.choice(_PLACES)}"
    stem = f"The best thing to do in {city} is to"
    return Needle("pastime", city, f"{stem} {answer}.", f"How should one spend a day in {city}?", stem, answer)


def _phone_number(rng: random.Random) -> Needle:
    person, answer = _person(rng), f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}"
    stem = f"{person} can be reached by phone at"
    return Needle("phone", person, f"{stem} {answer}.", f"What is the phone number of {person}?", stem, answer)


def _birthplace(rng: random.Random) -> Needle:
    person, answer = _person(rng), rng.choice(_CITIES)
    stem = f"{person} was born in"
    return Needle("birthplace", person, f"{stem} {answer}.", f"Where is {person} from?", stem, answer)


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
