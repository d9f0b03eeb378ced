"""Sources and loaders for the tests of training data."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fot.tasks.task import Document
from training.batches import Batch, DocumentLoader

BOS, EOS = 1, 2


@dataclass
class Counting:
    """Document n is ``length`` times the same token; the last one alone is a target."""

    name: str = "counting"
    length: int = 9

    def document(self, rng: random.Random) -> Document:
        ids = [rng.randrange(3, 200) for _ in range(self.length)]
        return Document(ids, [0.0] * (self.length - 1) + [1.0])


def write_texts(folder: Path, count: int, *, seed: int = 0, longest: int = 40, suffix: str = ".txt") -> list[str]:
    """Files of random words, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    texts = [f"{n}:{seed} " + "".join(rng.choices("abcdef ", k=rng.randrange(longest))) for n in range(count)]
    for n, text in enumerate(texts):
        (folder / f"{n:03}{suffix}").write_text(text, encoding="utf-8")
    return texts


def loader_of(sources: Any, tokenizer: Any, **changed: Any) -> DocumentLoader:
    sources = sources if isinstance(sources, list) else [sources]
    return DocumentLoader(sources, tokenizer, **({"lanes": 2, "windows": 2, "window": 4} | changed))


def lane_streams(batches: list[Batch], lanes: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and labels of each lane, padding left out."""
    inputs: list[list[int]] = [[] for _ in range(lanes)]
    labels: list[list[int]] = [[] for _ in range(lanes)]
    for batch in batches:
        for row, lane in enumerate(batch.lane.tolist()):
            real = ~batch.padding[row]
            inputs[lane] += batch.input_ids[row][real].tolist()
            labels[lane] += batch.labels[row][real].tolist()
    return inputs, labels


def split_documents(stream: list[int], tokenizer: Any) -> list[str]:
    """Texts between BOS and EOS, without the last one, which may not have ended."""
    assert stream[0] == BOS
    documents = []
    for part in "".join(chr(n) for n in stream).split(chr(EOS) + chr(BOS))[:-1]:
        ids = [ord(character) for character in part.lstrip(chr(BOS))]
        assert BOS not in ids
        assert EOS not in ids
        documents.append(tokenizer.decode(ids))
    return documents


def same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in Batch.__dataclass_fields__)


def write_rows(folder: Path, kind: str, count: int = 11) -> str:
    """Two files of rows, as a glob."""
    folder.mkdir(parents=True)
    for part in range(2):
        rows = [{"id": n, "text": f"{part}/{n} " + "x" * (n * 5 % 17)} for n in range(count)]
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(folder / f"{part}.parquet", batch_size=4)
        else:
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"*.{kind}")
