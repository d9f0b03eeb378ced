"""The store keeps what it is given, in order, whatever the pieces it comes in."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memory.vectors
from memory import Memory, attention_mass_recall
from memory.tokens import DocumentNote
from memory.vectors import VECTOR_DTYPES, VectorBlocks

HEADS, DIM, LAYERS = 2, 8, (1, 4)

# Rounding of one number: half a unit in the last of 24, 8 and 11 bits; 1/127 of the largest in a vector, halved.
PRECISION = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "int8": 1 / 250}


def make(**options: Any) -> Memory:
    return Memory(LAYERS, HEADS, DIM, **({"index": "exact"} | options))


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))


def append(memory: Memory, count: int, seed: int = 0, **source: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = vectors(count, seed), vectors(count, seed + 1000)
    memory.append({n: keys + n for n in LAYERS}, {n: values - n for n in LAYERS}, range(count), **source)
    return keys, values


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks with few vectors."""
    monkeypatch.setattr(memory.vectors, "FIRST_BLOCK", 4)
    monkeypatch.setattr(memory.vectors, "LAST_BLOCK", 16)


@given(st.lists(st.integers(0, 40), max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_are_a_list_of_vectors(sizes: list[int], data: st.DataObject) -> None:
    blocks = VectorBlocks(HEADS, DIM, torch.float32)
    everything = torch.empty(HEADS, 0, DIM)
    for seed, size in enumerate(sizes):
        blocks.append(vectors(size, seed))
        everything = torch.cat([everything, vectors(size, seed)], dim=1)
    total = everything.shape[1]
    assert len(blocks) == total
    assert torch.equal(torch.cat([everything[:, :0], *blocks.blocks(torch.float32)], dim=1), everything)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert torch.equal(blocks.take_range(start, stop, torch.float32), everything[:, start:stop])
    if total:
        slots = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=2, max_size=20))).repeat(HEADS, 1)
        assert torch.equal(blocks.gather(slots, torch.float32), everything[:, slots[0]])
    blocks.truncate(stop)
    blocks.append(vectors(3, 77))
    expected = torch.cat([everything[:, :stop], vectors(3, 77)], dim=1)
    assert torch.equal(blocks.take_range(0, len(blocks), torch.float32), expected)


def test_appending_copies_nothing_stored() -> None:
    """Time in the window, not in what is stored: blocks stay where they are, and no block is larger than the last."""
    blocks = VectorBlocks(HEADS, DIM, torch.float32)
    blocks.append(vectors(10))
    places = [block.data.data_ptr() for block in blocks._blocks]
    for seed in range(20):
        blocks.append(vectors(10, seed))
    assert [block.data.data_ptr() for block in blocks._blocks][: len(places)] == places
    assert max(map(len, blocks._blocks)) == memory.vectors.LAST_BLOCK
    assert blocks.nbytes() <= (len(blocks) + memory.vectors.LAST_BLOCK) * HEADS * DIM * 4


@pytest.mark.parametrize("index", ["exact", "auto", "clusters", "Flat", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "PQ4x4"])
def test_appending_nothing_changes_nothing(index: str) -> None:
    """An empty piece of a text, before there is anything and after; it makes no document, either."""
    store, queries = make(index=index), vectors(3, 9)
    append(store, 0, document="empty")
    assert not len(store)
    append(store, 200, document="full")
    before = store[1].attend(queries, scale=0.3)
    append(store, 0, document="empty")
    assert store.documents() == {"full": 200}
    assert "empty" not in store
    for found, expected in zip(store[1].attend(queries, scale=0.3), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", VECTOR_DTYPES)
def test_dtypes_round_as_little_as_they_can(dtype: str) -> None:
    store = make(key_dtype=dtype, value_dtype=dtype)
    keys, values = append(store, 50)
    for number in LAYERS:
        for kept, given_ in ((store[number].keys(), keys + number), (store[number].values(), values - number)):
            error = (kept - given_).abs() / given_.abs().amax(-1, keepdim=True)
            assert error.max() <= PRECISION[dtype]
    slots = torch.randint(50, (HEADS, 3, 5))
    assert torch.equal(store[1].values(slots)[0], store[1].values()[0][slots[0]])


def test_int8_is_a_quarter_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = {}
    for dtype in VECTOR_DTYPES:
        store = Memory((0,), 1, 64, value_dtype=dtype, index="exact")
        store.append({0: torch.zeros(1, 1024, 64)}, {0: torch.zeros(1, 1024, 64)}, range(1024))
        sizes[dtype] = store.nbytes()["values"] // 1024
    assert sizes == {"float32": 256, "bfloat16": 128, "float16": 128, "int8": 64 + 2}


@pytest.mark.parametrize("top_k", [None, 5])
def test_attend_equals_softmax(top_k: int | None) -> None:
    store = make(top_k=top_k)
    append(store, 70)
    queries = vectors(9, seed=5)
    output, lse = store[4].attend(queries, scale=0.3)
    logits = 0.3 * queries @ store[4].keys().mT
    if top_k is not None:
        floor = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    torch.testing.assert_close(output, logits.softmax(-1) @ store[4].values(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 90), st.integers(1, 100), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_search_equals_sorting(stored: int, k: int, num_queries: int) -> None:
    store = make()
    append(store, stored)
    queries = vectors(num_queries, seed=stored)
    scores, slots = store[1].search(queries, k)
    expected_scores, expected_slots = (queries @ store[1].keys().mT).topk(min(k, stored), dim=-1)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


def test_empty_memory() -> None:
    store = make()
    output, lse = store[1].attend(vectors(3), scale=1.0)
    assert output.eq(0).all()
    assert lse.eq(-torch.inf).all()
    scores, slots = store[1].search(vectors(3), 5)
    assert scores.shape == slots.shape == (HEADS, 3, 0)
    assert len(store) == 0
    assert store[1].backend is None


def test_sources() -> None:
    store = make()
    append(store, 3, document="a", spans=[(0, 2), (2, 3), (3, 9)])
    append(store, 2)
    append(store, 2, document="b")
    append(store, 1, document="a", spans=[(9, 12)])
    assert store.documents() == {"a": 4, "b": 2}
    found = [(store.source(slot).document, store.source(slot).span) for slot in range(8)]
    nowhere = (None, None)
    assert found == [("a", (0, 2)), ("a", (2, 3)), ("a", (3, 9)), nowhere, nowhere, ("b", None), ("b", None),
                     ("a", (9, 12))]  # fmt: skip
    with pytest.raises(IndexError, match=r"slot 8 is outside 0\.\.7"):
        store.source(8)


def test_drop_forgets_one_document() -> None:
    kept, whole = make(value_dtype="int8"), make(value_dtype="int8")
    for seed, (document, count) in enumerate([("a", 30), ("b", 25), ("a", 7), ("c", 11)]):
        append(whole, count, seed, document=document)
        if document != "a":
            append(kept, count, seed, document=document)
    assert whole.drop_document("a") == 37
    assert len(whole) == len(kept) == 36
    assert whole.documents() == kept.documents() == {"b": 25, "c": 11}
    assert whole.source(26).document == "c"
    queries = vectors(4, seed=3)
    for number in LAYERS:
        assert torch.equal(whole[number].keys(), kept[number].keys())
        torch.testing.assert_close(whole[number].values(), kept[number].values(), atol=1e-6, rtol=0)
        torch.testing.assert_close(whole[number].attend(queries, scale=1.0), kept[number].attend(queries, scale=1.0))
    append(whole, 5, 9, document="a")
    assert whole.documents() == {"b": 25, "c": 11, "a": 5}
    with pytest.raises(KeyError, match=r"no document 'z' in this memory; it holds b, c, a"):
        whole.drop_document("z")


def test_reset_and_clone() -> None:
    store = make()
    append(store, 20, document="a")
    copy = store.clone()
    append(copy, 5, 1, document="b")
    assert (len(store), len(copy)) == (20, 25)
    assert torch.equal(copy[1].keys()[:, :20], store[1].keys())
    store.reset()
    assert len(store) == 0
    assert store.documents() == {}
    assert sum(store.nbytes().values()) == 0
    append(store, 4)
    assert len(store) == len(store[1]) == 4
    assert len(copy) == 25


def test_interrupted_append_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    append(store, 20)
    before = store[1].keys()
    last = store._indexed[LAYERS[-1]]

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append(store, 20, 1)
    assert len(store) == len(store[1]) == 20
    assert torch.equal(store[1].keys(), before)
    monkeypatch.undo()
    append(store, 3, 2)
    assert len(store) == len(store[1]) == len(last) == 23


@pytest.mark.parametrize("index", ["exact", "IVF2,Flat", "HNSW4"])
@given(lengths=st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 40)))
@settings(max_examples=15, deadline=None)
def test_truncated_is_as_if_it_had_not_grown(index: str, lengths: tuple[int, int, int]) -> None:
    first, more, later = lengths
    kept, grown = make(index=index), make(index=index)
    for store in (kept, grown):
        if first:
            append(store, first, 1, document="one")
    append(grown, more, 2, document="two")
    grown.notes["two"] = DocumentNote()
    grown.truncate(first + more)
    assert len(grown) == first + more
    grown.truncate(first)
    assert (grown.documents(), grown.document_runs(), grown.notes) == (kept.documents(), kept.document_runs(), {})
    for store in (kept, grown):
        append(store, later, 3, document="three")
    assert grown.token_ids().tolist() == kept.token_ids().tolist()
    assert grown.document_runs() == kept.document_runs()
    for layer in LAYERS:
        assert torch.equal(grown[layer].keys(), kept[layer].keys())
        assert torch.equal(grown[layer].values(), kept[layer].values())
        if index != "HNSW4":  # a graph depends on the portions in which it was built
            for one, other in zip(*(s[layer].search(vectors(3, 9), 5) for s in (kept, grown)), strict=True):
                assert torch.equal(one, other)


def test_what_lies_on_disk_is_not_truncated(tmp_path: Path) -> None:
    store = make()
    append(store, 10)
    store.save(tmp_path / "memory")
    opened = Memory.open(tmp_path / "memory")
    opened.truncate(10)
    with pytest.raises(ValueError, match="cannot be truncated: drop documents from it instead"):
        opened.truncate(9)
    assert len(opened) == 10


class TestBadInput:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("part", ["keys", "values"])
    def test_numbers(self, bad: float, part: str) -> None:
        store = make()
        given_ = {"keys": {n: vectors(4) for n in LAYERS}, "values": {n: vectors(4) for n in LAYERS}}
        given_[part][4][1, 2, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinite, so nothing was stored"):
            store.append(given_["keys"], given_["values"], range(4))
        assert len(store) == len(store[1]) == len(store[4]) == 0

    @pytest.mark.parametrize("part", ["key", "value"])
    @pytest.mark.parametrize(
        ("dtype", "number", "shown"),
        [
            ("float16", 1e5, "1e+05, more than float16"),
            ("float16", -65520.0, "-6.552e+04, more than float16"),
            ("bfloat16", 3.4e38, "3.4e+38, more than bfloat16"),
            ("float32", 1e300, "1e+300, more than float32"),
            ("int8", 1e300, "1e+300, more than int8"),
        ],
    )
    def test_numbers_too_large_for_their_dtype(self, dtype: str, number: float, shown: str, part: str) -> None:
        """They would be infinite once they are stored."""
        store = make(**{f"{part}_dtype": dtype})
        append(store, 3)
        given_ = {what: {n: vectors(4).double() for n in LAYERS} for what in ("key", "value")}
        given_[part][4][1, 2, 3] = number
        message = f"a {part} of layer 4 is {shown} can hold, so nothing was stored: use a memory with {part}_dtype="
        with pytest.raises(ValueError, match=re.escape(message)):
            store.append(given_["key"], given_["value"], range(4))
        assert len(store) == len(store[1]) == len(store[4]) == 3
        if dtype == "float16":
            given_[part][4][1, 2, 3] = 65519.0  # rounded to 65504, the largest
            store.append(given_["key"], given_["value"], range(4))
            assert all(getattr(store[4], f"{what}s")().isfinite().all() for what in given_)

    def test_shapes(self) -> None:
        store, good = make(), {n: vectors(4) for n in LAYERS}
        with pytest.raises(ValueError, match=r"keys belong to layers \[1\], but this memory has layers \[1, 4\]"):
            store.append({1: vectors(4)}, good, range(4))
        with pytest.raises(ValueError, match=r"values of layer 4 have 3 tokens, but there are 4 token ids"):
            store.append(good, {1: vectors(4), 4: vectors(3)}, range(4))
        with pytest.raises(ValueError, match=r"shape \(2, 4, 9\); this memory takes \(2, tokens, 8\)"):
            store.append({1: torch.zeros(2, 4, 9), 4: vectors(4)}, good, range(4))
        with pytest.raises(ValueError, match="1 spans for 4 token ids"):
            store.append(good, good, range(4), spans=[(0, 1)])
        with pytest.raises(ValueError, match="queries have shape"):
            store[1].search(torch.zeros(3, 1, DIM), 1)
        assert len(store) == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"key_dtype": "int4"}, "key_dtype is 'int4'; choose one of float32"),
            ({"top_k": 0}, "top_k is 0"),
            ({"index": "Nonsense99"}, "Nonsense99"),
        ],
    )
    def test_settings(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(**options)

    def test_search(self) -> None:
        store = make()
        append(store, 4)
        with pytest.raises(ValueError, match="k is 0"):
            store[1].search(vectors(2), 0)
        with pytest.raises(IndexError, match=r"slot 4 is outside 0\.\.3"):
            store[1].values(torch.full((HEADS, 1), 4))
        with pytest.raises(KeyError, match=r"layer 7 has no memory; memory layers are \[1, 4\]"):
            store[7]


def test_nbytes_by_part() -> None:
    store = make()
    append(store, 28)
    sizes = store.nbytes()
    assert set(sizes) == {"keys", "values", "index", "tokens"}
    assert sizes["keys"] == sizes["values"] == 28 * HEADS * DIM * 4 * len(LAYERS)
    assert "28 tokens" in store.describe()


def test_custom_index() -> None:
    class Newest:
        """Attends to the newest pair alone."""

        def __init__(self, keys: VectorBlocks, values: VectorBlocks) -> None:
            self.values = values

        def add(self, keys: torch.Tensor) -> None: ...

        def search(self, queries: torch.Tensor, k: int) -> Any: ...

        def attend(self, queries: torch.Tensor, *, scale: float) -> Any:
            newest = self.values.take_range(len(self.values) - 1, len(self.values), queries.dtype)
            return newest.expand_as(queries), torch.zeros(queries.shape[:2])

        def nbytes(self) -> int:
            return 0

        def describe(self) -> str:
            return "newest"

    store = make(index=Newest)
    _, values = append(store, 9)
    output, _ = store[1].attend(vectors(3), scale=1.0)
    assert torch.equal(output, (values - 1)[:, -1:].expand(-1, 3, -1))
    assert "newest" in store.describe()


def test_attention_mass_recall() -> None:
    queries, keys = vectors(6), vectors(40, seed=1)
    mass = (0.5 * queries @ keys.mT).softmax(-1)
    hits = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(40), (HEADS, 6, 1)), axis=-1)[..., :7])
    expected = mass.gather(-1, hits).sum(-1)
    torch.testing.assert_close(attention_mass_recall(queries, keys, hits, scale=0.5), expected)
    everything = torch.arange(40).expand(HEADS, 6, 40)
    torch.testing.assert_close(attention_mass_recall(queries, keys, everything, scale=0.5), torch.ones(HEADS, 6))
    padded = torch.cat([hits, torch.full_like(hits, -1)], dim=-1)
    torch.testing.assert_close(attention_mass_recall(queries, keys, padded, scale=0.5), expected)
    with pytest.raises(ValueError, match=r"slot 40 is outside 0\.\.39"):
        attention_mass_recall(queries, keys, hits + 40 - hits, scale=0.5)


def test_what_python_asks_of_a_memory(tmp_path: Path) -> None:
    """An empty memory is there all the same; ``in`` asks for documents; ``repr`` is a line."""
    store = make()
    assert store
    assert len(store) == 0
    assert "a" not in store
    append(store, 20, document="a")
    append(store, 3, 20)
    assert "a" in store
    assert "b" not in store
    assert None not in store
    assert 1 not in store
    with pytest.raises(TypeError, match="not iterable"):
        iter(store)
    assert repr(store).startswith("<Memory: 23 tokens, 1 documents, layers ")
    assert "\n" not in repr(store)
    store.save(tmp_path / "m")
    assert str(tmp_path / "m") in repr(Memory.open(tmp_path / "m"))
    store.drop_document("a")
    assert "a" not in store


def test_a_copy_lists_the_documents_that_it_holds() -> None:
    store = make()
    for name, count in (("a", 3), ("none", 0), ("b", 4), ("c", 5)):
        append(store, count, document=name)
        store.notes[name] = DocumentNote(name)
    assert store.clone().documents() == store.documents() == {"a": 3, "b": 4, "c": 5}
    copy = store.kept(torch.tensor([1, 8, 9]))
    assert copy.documents() == {"a": 1, "c": 2}
    assert [copy.source(slot).document for slot in range(3)] == ["a", "c", "c"]
    assert "b" not in copy
    assert copy.notes == {name: DocumentNote(name) for name in ("a", "none", "c")}
    assert store.documents() == {"a": 3, "b": 4, "c": 5}


@pytest.mark.parametrize("dtype", VECTOR_DTYPES)
def test_append_again_copies_to_the_last_bit(dtype: str) -> None:
    store = make(key_dtype=dtype, value_dtype=dtype)
    append(store, 40, document="one")
    store.append_again(13, 38, document="two", spans=[(i, i + 1) for i in range(25)])
    assert store.token_ids().tolist() == [*range(40), *range(13, 38)]
    assert store.documents() == {"one": 40, "two": 25}
    assert store.source(41).span == (1, 2)
    for number in store.layers:
        for name in ("keys", "values"):
            blocks = getattr(store._content.layers[number], name)
            first, again = (list(zip(*blocks.stored(*run), strict=True)) for run in ((13, 38), (40, 65)))
            assert torch.equal(torch.cat(first[0], dim=1), torch.cat(again[0], dim=1))
            if dtype == "int8":
                assert torch.equal(torch.cat(first[1], dim=1), torch.cat(again[1], dim=1))
    for start, stop in ((-1, 3), (5, 4), (60, 66)):
        with pytest.raises(ValueError, match=r"are not all in this memory, which holds 0\.\.64"):
            store.append_again(start, stop)
