"""A memory as a folder is the same as in RAM, and so are its indexes."""

from pathlib import Path

import forks
import pytest
import torch
from disk_helpers import HEADS, LAYERS, append, assert_same, forge, make, save_two, vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memory.atomic
import memory.disk
import memory.vectors
from memory import DocumentNote, Memory, faiss_factory, faiss_heads
from memory.disk import verify


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and many segments."""
    monkeypatch.setattr(memory.vectors, "FIRST_BLOCK", 4)
    monkeypatch.setattr(memory.vectors, "LAST_BLOCK", 16)
    monkeypatch.setattr(memory.disk, "SEGMENT_TOKENS", 25)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_two(tmp_path / "m")


@pytest.mark.parametrize("dtype", memory.vectors.VECTOR_DTYPES)
@pytest.mark.usefixtures("small")
def test_opened_is_what_was_saved(dtype: str, tmp_path: Path) -> None:
    store = make(key_dtype=dtype, value_dtype=dtype, top_k=7)
    append(store, 40, document="a")
    append(store, 30, 50, document=None)
    append(store, 21, 90, document="b")
    store.metadata = {"model": "tiny", "nested": {"list": [1, 2]}}
    store.notes["a"] = DocumentNote("abc", complete=False)
    store.save(tmp_path / "m")
    opened = Memory.open(tmp_path / "m")
    assert_same(opened, store)
    assert opened.metadata == store.metadata
    assert opened.notes == {"a": DocumentNote("abc", complete=False), "b": DocumentNote()}
    assert (opened.fingerprint, opened.top_k, opened.index, opened.layers) == ("weights", 7, "exact", LAYERS)
    assert len([path for path in (tmp_path / "m").iterdir() if path.name.startswith("segment")]) == 4
    assert verify(tmp_path / "m") == []
    assert Memory.open(tmp_path / "m", index="Flat", top_k=2)[1].search(vectors(3), 2)[1].shape == (HEADS, 3, 2)


def test_clusters_open_a_memory_that_was_saved_with_a_number_of_pairs(tmp_path: Path) -> None:
    """They attend to a share of the keys; the folder keeps its own index and number."""
    store = make(top_k=7)
    append(store, 300, document="a")
    store.save(tmp_path / "m")
    for index in ("clusters", "clusters;share=0.5"):
        opened = Memory.open(tmp_path / "m", index=index)
        assert (opened.index, opened.top_k) == (index, None)
        assert opened[1].attend(vectors(3), scale=0.3)[0].isfinite().all()
    assert Memory.open(tmp_path / "m", index="Flat").top_k == Memory.open(tmp_path / "m").top_k == 7
    with pytest.raises(ValueError, match="top_k is 5, but clusters attends to a share of the keys"):
        Memory.open(tmp_path / "m", index="clusters", top_k=5)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from(["a", "b", "c", None]), st.integers(1, 40)),
    st.tuples(st.just("drop"), st.sets(st.sampled_from(["a", "b", "c"]), min_size=1)),
    st.sampled_from([("flush",), ("compact",), ("reopen",), ("save",)]),
)


@pytest.mark.usefixtures("small")
@given(operations=st.lists(OPERATIONS, max_size=14), dtype=st.sampled_from(["float32", "int8"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_is_the_same_on_disk_and_in_ram(
    operations: list[tuple], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("history") / "m"
    ram = make(key_dtype=dtype)
    ram.save(path)
    disk = Memory.open(path, "a")
    for step, (what, *details) in enumerate(operations):
        if what == "append":
            for store in (ram, disk):
                append(store, details[1], 100 * step, document=details[0])
        elif what == "drop" and details[0] <= set(ram.documents()):
            assert sum(map(ram.drop_document, details[0])) == disk.drop_documents(details[0])
        elif what in ("flush", "reopen"):
            disk.flush()
            assert_same(Memory.open(path), ram)
        elif what == "compact":
            disk.compact()
        elif what == "save":
            disk.save(path.with_name(f"other{step}"))
            assert_same(Memory.open(path.with_name(f"other{step}")), ram)
        if what == "reopen":
            disk.close()
            disk = Memory.open(path, "a")
        assert_same(disk, ram)
    disk.flush()
    disk.close()
    assert verify(path) == []
    assert_same(Memory.open(path), ram)


def test_appending_leaves_old_segments_alone(saved: Path) -> None:
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in saved.glob("segment*")}
    with Memory.open(saved, "a") as store:
        append(store, 10, 80)
        store.flush()
        store.flush()
        append(store, 10, 90)
        store.flush()
        for name, (inode, content) in before.items():
            assert ((saved / name).stat().st_ino, (saved / name).read_bytes()) == (inode, content)
        assert len(list(saved.glob("segment*"))) == 3
        assert all(store._content.layers[n].keys.mapped_length == 70 for n in LAYERS)


def test_dropping_frees_its_space_when_compacted(saved: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in saved.glob("segment*"))

    whole = size()
    with Memory.open(saved, "a") as store:
        store.drop_document("a")
        assert Memory.open(saved).documents() == {"b": 20}
        assert size() == whole
        store.compact()
    assert size() < 0.5 * whole
    assert Memory.open(saved).documents() == {"b": 20}


def test_documents_are_dropped_together_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory import disk as module

    commits, commit = list[Path](), module.commit
    monkeypatch.setattr(module, "commit", lambda folder, manifest: (commits.append(folder), commit(folder, manifest)))
    with Memory.open(saved, "a") as store:
        with pytest.raises(KeyError, match="no document 'z' in this memory; it holds a, b"):
            store.drop_documents(["a", "z"])
        assert Memory.open(saved).documents() == store.documents() == {"a": 30, "b": 20}
        assert store.drop_documents([]) == 0
        assert not commits
        append(store, 4, 80, document="c")  # not on disk yet
        assert store.drop_documents(["c", "a", "b"]) == 54
        assert len(commits) == 1
        assert len(store) == len(Memory.open(saved)) == 0
        assert not store.notes
        append(store, 6, 90, document="a")
        store.flush()
    assert Memory.open(saved).documents() == {"a": 6}
    assert verify(saved) == []


def test_readers_keep_what_they_opened(saved: Path) -> None:
    reader, wanted = Memory.open(saved), make()
    append(wanted, 30, document="a")
    append(wanted, 20, 50, document="b")
    with Memory.open(saved, "a") as store:
        append(store, 10, 80)
        store.flush()
        store.drop_document("b")
        store.compact()
    assert_same(reader, wanted)
    assert Memory.open(saved).documents() == {"a": 40}


def test_a_clone_grows_apart_from_the_folder(saved: Path) -> None:
    opened = Memory.open(saved)
    copy = opened.clone()
    append(copy, 5, 70)
    assert (len(copy), len(opened), len(Memory.open(saved))) == (55, 50, 50)
    assert torch.equal(copy[1].keys()[:, :50], opened[1].keys())


def test_opening_reads_no_vector(tmp_path: Path) -> None:
    store = Memory((0,), 4, 64, index="exact")
    big = torch.randn(4, 40_000, 64)
    store.append({0: big}, {0: big}, range(40_000))
    store.save(tmp_path / "m")
    save_two(tmp_path / "small")
    code = f"""
import psutil
from memory import Memory
small = Memory.open({str(tmp_path / "small")!r})  # libraries come into memory as they are used
small[1].keys().sum()
rss = psutil.Process().memory_info().rss
opened = Memory.open({str(tmp_path / "m")!r})
print(psutil.Process().memory_info().rss - rss)
opened[0].keys().sum()
print(psutil.Process().memory_info().rss - rss)
"""
    done = forks.run("-c", code)
    assert done.returncode == 0, done.stderr
    opening, reading = map(int, done.stdout.split())
    assert opening < 10e6 < 41e6 < reading  # 41 MB of keys, as much of values


# --- indexes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "IVF,Flat", "Flat"])
def test_indexes_come_back_as_they_were(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_factory, "FIRST_LISTS_AT", 512)
    store = make(index=index)
    for seed in range(3):
        append(store, 500, seed, document=f"{seed}")
    before = store[1].search(vectors(20, 5), 10)
    store.save(tmp_path / "m")
    opened = Memory.open(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("index*"))) == index.startswith("IVF")
    if index.startswith("IVF"):  # no k-means
        monkeypatch.setattr(faiss_heads.InvertedHead, "trained", None)
    after = opened[1].search(vectors(20, 5), 10)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0], before[0])
    assert opened[1].describe() == store[1].describe()
    if index.startswith("IVF"):
        ours, theirs = opened._learnt()[1], store._learnt()[1]
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.centroids, theirs.centroids)
        assert torch.equal(ours.lists, theirs.lists)
        assert torch.equal(ours.codec, theirs.codec)


def test_a_graph_is_built_from_the_keys_again(tmp_path: Path) -> None:
    store = make(index="HNSW8;efSearch=256")
    append(store, 300)
    store.save(tmp_path / "m")
    opened = Memory.open(tmp_path / "m")
    assert list((tmp_path / "m").glob("index*")) == []
    assert torch.equal(opened[1].search(vectors(20, 5), 3)[1], store[1].search(vectors(20, 5), 3)[1])


def test_an_index_follows_appends_and_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(index="IVF8,Flat;nprobe=8")
    append(store, 600, 1, document="a")
    append(store, 600, 2, document="b")
    store.save(tmp_path / "m")
    monkeypatch.setattr(faiss_heads.InvertedHead, "trained", None)
    exact = make()
    append(exact, 600, 2, document="b")
    append(exact, 100, 3, document="c")
    append(exact, 100, 4, document="d")
    with Memory.open(tmp_path / "m", "a") as grown:
        append(grown, 100, 3, document="c")
        grown.flush()
        grown.drop_document("a")
        append(grown, 100, 4, document="d")
        grown.flush()
        assert_hits(grown, exact)
        grown.flush()
    assert verify(tmp_path / "m") == []
    assert_hits(Memory.open(tmp_path / "m"), exact)
    with Memory.open(tmp_path / "m", "a") as grown:
        grown.compact()
    assert verify(tmp_path / "m") == []
    assert_hits(Memory.open(tmp_path / "m"), exact)
    assert_hits(Memory.open(tmp_path / "m").clone(), exact)


def assert_hits(found: Memory, exact: Memory) -> None:
    for number in LAYERS:
        hits, expected = (store[number].search(vectors(20, 5), 10) for store in (found, exact))
        assert torch.equal(hits[1], expected[1])  # all lists are probed
        assert found[number].describe().startswith("IVF8")


@pytest.mark.parametrize(
    ("tensor", "change"),
    [("lists.1", 10_000), ("lists.1", -5), ("centroids.4", float("nan")), ("codec.1", float("inf"))],
)
def test_a_damaged_index_is_named_before_faiss_sees_it(tensor: str, change: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    store = make(index="IVF8,SQ8")
    append(store, 600)
    store.save(tmp_path / "m")
    (part,) = (tmp_path / "m").glob("index*")
    tensors = load_file(part)
    tensors[tensor][0, 0] = change
    save_file(tensors, part)
    forge(tmp_path / "m", "learnt", bytes=part.stat().st_size, sha256=memory.atomic.file_sha256(part))
    opened = Memory.open(tmp_path / "m")
    with pytest.raises(ValueError, match=r"index-000001\.safetensors is damaged .*index='exact'"):
        opened[int(tensor[-1])].search(vectors(2), 3)
    assert "index-000001.safetensors" in verify(tmp_path / "m")[0]
    assert Memory.open(tmp_path / "m", index="exact")[1].search(vectors(2), 3)[1].max() < 600
