"""Small memories, and folders of them."""

import json
from pathlib import Path
from typing import Any

import torch

from memory import Memory

HEADS, DIM, LAYERS = 2, 8, (1, 4)
ROOT = Path(__file__).resolve().parents[1]


def make(**options: Any) -> Memory:
    return Memory(LAYERS, HEADS, DIM, **({"index": "exact", "fingerprint": "weights"} | options))


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))


def append(store: Memory, count: int, seed: int = 0, document: str | None = "a") -> None:
    keys, values = vectors(count, seed), vectors(count, seed + 1000)
    spans = [(seed + i, seed + i + 1) for i in range(count)]
    ids = range(seed, seed + count)
    store.append({n: keys + n for n in LAYERS}, {n: values - n for n in LAYERS}, ids, document=document, spans=spans)


def save_two(path: Path) -> Path:
    """A folder with documents a and b, of 30 and 20 tokens."""
    store = make()
    append(store, 30, document="a")
    append(store, 20, 50, document="b")
    store.save(path)
    return path


def assert_same(found: Memory, wanted: Memory) -> None:
    assert found.token_ids().tolist() == wanted.token_ids().tolist()
    assert found.documents() == {name: count for name, count in wanted.documents().items() if count}
    assert [found.source(slot) for slot in range(len(found))] == [wanted.source(slot) for slot in range(len(wanted))]
    for number in LAYERS:
        assert torch.equal(found[number].keys(), wanted[number].keys())
        assert torch.equal(found[number].values(), wanted[number].values())
        if len(wanted):
            hits, expected = (store[number].search(vectors(3, 7), 9) for store in (found, wanted))
            assert torch.equal(hits[1], expected[1])
            torch.testing.assert_close(hits[0], expected[0])
            # Blocks of other sizes are summed in another order.
            torch.testing.assert_close(
                found[number].attend(vectors(3, 7), scale=0.3), wanted[number].attend(vectors(3, 7), scale=0.3)
            )


def forge(folder: Path, entry: str, **changes: Any) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    target = manifest if entry == "" else manifest[entry][0] if isinstance(manifest[entry], list) else manifest[entry]
    target.update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))
