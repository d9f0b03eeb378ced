"""A trace made up for tests of what is drawn: English text, several documents, a memory of any length.

``python tests/inspection_demo.py OUT.html`` writes its page.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fot.inspection.page import write_page
from fot.inspection.result import Found, Token, Trace
from fot.inspection.strip import Strip
from memory import Memory

LAYERS = (8, 12, 16, 24)
HEADS = 9
TOP = 32

PROMPT = "Whom did the vicar of Highbury marry, and what did Mrs. Weston say of it?"
ANSWER = (
    " Mr. Elton, the vicar of Highbury, married Miss Augusta Hawkins of Bristol. Mrs. Weston said that he had been "
    "quick about it, and that one must be civil to the bride."
)
SENTENCES = (
    "Mr. Elton returned, a very happy man; he had gone away rejected and mortified. ",
    "The charming Augusta Hawkins was in possession of an independent fortune of ten thousand pounds. ",
    "“He has been very quick about it,” said Mrs. Weston; “one must be civil to the bride, whoever she may be.” ",
    "Highbury, the large and populous village almost amounting to a town, was reasonably pleased with the match. ",
)
FILLER = (
    "The evening was quiet and conversable as such evenings generally were, and the tea came in at its usual hour. ",
    "There was a strange rumour in the town that the bridge would be closed until the spring.\n",
    "She walked to the end of the lane, looked at the orchard, and came back without having met anybody. ",
    "A letter had been expected since Tuesday, and when it came it said very little about the journey. ",
    "Nothing could be more natural than his wish to speak, nor more tiresome than the length of it.\n\n",
)
DOCUMENTS = {"emma.txt": 0.62, "persuasion.txt": 0.27, "letters/1811-04.md": 0.08, "notes <draft> & “quotes”.txt": 0.03}


class Words:
    """A tokenizer of words with the space before them, and of single marks."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        parts = re.findall(r" ?\w+|\s|[^\w\s]", text)
        for part in parts:
            if part not in self._ids:
                self._ids[part] = len(self._texts)
                self._texts.append(part)
        return [self._ids[part] for part in parts]

    def decode(self, ids: Sequence[int], **options: bool) -> str:
        return "".join(self._texts[number] for number in ids)


def demo_trace(memory_tokens: int = 262_144, *, prompt: str = PROMPT, answer: str = ANSWER, seed: int = 0) -> Trace:
    """A trace of 4 layers x 9 heads whose heads look at a few telling places, at the first token, and about."""
    rng, tokenizer = np.random.default_rng(seed), Words()
    memory, telling = _memory(memory_tokens, tokenizer, rng)
    asked, answered = tokenizer.encode(prompt), tokenizer.encode(answer)
    ids = asked + answered
    tokens = [Token(number, tokenizer.decode([number]), at >= len(asked)) for at, number in enumerate(ids)]
    positions = np.arange(len(ids) - 1)
    found = _found(positions, positions >= len(asked) - 1, telling, memory_tokens, rng)
    strip = Strip(len(LAYERS))
    strip.fit(memory_tokens)
    runs = memory.document_runs()
    for layer in range(len(LAYERS)):
        share = found.share[found.chose, layer]
        strip.add(layer, found.slot[found.chose, layer].ravel(), share.ravel().astype(float), runs)
        tail = rng.gamma(0.6, 1.0, 4096)
        strip.add(
            layer, np.linspace(0, memory_tokens - 1, 4096).astype(int), 0.4 * share.sum() * tail / tail.sum(), runs
        )
    return Trace(tokens, LAYERS, found, [memory], None, [strip], True, tokenizer)


def _memory(length: int, tokenizer: Words, rng: np.random.Generator) -> tuple[Memory, list[int]]:
    """A memory of that many tokens, and the slots where the telling sentences begin."""
    filler = [tokenizer.encode(sentence) for sentence in FILLER]
    memory, telling = Memory([0], 1, 1, key_dtype="int8", value_dtype="int8", index="exact"), []
    for name, share in DOCUMENTS.items():
        wanted = length - len(memory) if name == list(DOCUMENTS)[-1] else round(length * share)
        ids: list[int] = []
        while len(ids) < wanted:
            if name == "emma.txt" and len(ids) > wanted * (0.1 + 0.22 * len(telling)) and len(telling) < len(SENTENCES):
                telling.append(len(ids))
                ids += tokenizer.encode(SENTENCES[len(telling) - 1])
            ids += filler[rng.integers(len(filler))]
        lengths = [len(tokenizer.decode([number])) for number in ids[:wanted]]
        ends = np.cumsum(lengths)
        nothing = {0: torch.zeros(1, wanted, 1)}
        memory.append(nothing, nothing, ids[:wanted], document=name, spans=np.stack([ends - lengths, ends], axis=1))
    return memory, telling


def _found(
    positions: np.ndarray, chose: np.ndarray, telling: list[int], length: int, rng: np.random.Generator
) -> Found:
    shape = (len(positions), len(LAYERS), HEADS, TOP)
    at_passage = np.asarray(telling)[rng.integers(0, len(telling), shape)] + rng.integers(0, 18, shape)
    kind = rng.random(shape)
    slot = np.where(kind < 0.6, at_passage, np.where(kind < 0.66, 0, rng.integers(0, length, shape)))
    slot = np.minimum(slot, length - 1)
    head_gain = rng.uniform(0.5, 4.0, (1, len(LAYERS), HEADS, 1))
    raw = rng.normal(0, 1, shape) + head_gain * (kind < 0.6) + 2.0 * (kind < 0.66)
    score = np.sort(raw, axis=-1)[..., ::-1] * 2 + 4
    slot = np.take_along_axis(slot, np.argsort(-raw, axis=-1), axis=-1)
    knn = np.exp(score - score.max(-1, keepdims=True))
    knn = 0.75 * knn / knn.sum(-1, keepdims=True)
    wants = rng.beta(1.2, 3.0, (len(positions), 1, 1)) * rng.uniform(0.4, 1.6, (1, len(LAYERS), HEADS))
    local = 1 - np.clip(wants, 0.01, 0.97)
    share = knn * (1 - local[..., None])
    focus = rng.beta(4, 2, shape)
    arrays = (local, np.zeros(shape, np.int64), slot, score, knn, share, focus)
    kinds = (np.float32, np.int64, np.int64, np.float32, np.float32, np.float32, np.float32)
    return Found(positions, chose, *(array.astype(kind) for array, kind in zip(arrays, kinds, strict=True)))


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), demo_trace(), title=PROMPT, model="smollm2-135m-fot")
