"""Clusters in a memory's folder: saved, restored without work, of any format, and refused if damaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from disk_helpers import forge
from safetensors.torch import load_file, save_file
from test_clusters import (  # noqa: F401 - fixtures
    DIM,
    HEADS,
    LAYER,
    SCALE,
    error,
    queries,
    short_segments,
    store,
    topics,
    two_levels,
)
from torch import Tensor

from memory import Memory, cluster_table, clusters, disk
from memory.clusters import ClusterIndex
from memory.disk import verify


def test_a_dropped_document_takes_its_keys_out_of_the_clusters(tmp_path: Path) -> None:
    parts = [topics(count, seed) for seed, count in enumerate((700, 300, 1300, 40))]
    store("clusters;share=0.9999", *parts).save(tmp_path / "m")
    with Memory.open(tmp_path / "m", mode="a") as memory:
        memory.prepare()
        memory.drop_document("part 1")
        kept = memory._indexed[LAYER].learnt()
        assert kept is not None
        # Of slots 512..1024 some are gone; 1024..2048 moved as they were.
        assert kept.clusters.stretches[:, :2].tolist() == [[0, 512], [724, 512], [1236, 512]]
        exact = store("exact", *(parts[number] for number in (0, 2, 3)))
        assert error(memory, exact, queries(7)) < 1e-5
        built = memory._indexed[LAYER].learnt()
        assert built is not None
        assert built.clusters.stretches[:, :2].tolist() == [[0, 512], [512, 212], [724, 512], [1236, 512]]
    assert error(Memory.open(tmp_path / "m"), exact, queries(7)) < 1e-5
    assert not verify(tmp_path / "m")


def test_saved_clusters_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = topics(1700)
    memory = store("clusters", data)
    memory.save(tmp_path / "m")

    def never(*_: Any) -> None:
        raise AssertionError("clustered again")

    monkeypatch.setattr(clusters, "cluster", never)
    opened = Memory.open(tmp_path / "m")
    asked = queries(4)
    for found, wanted in zip(
        opened[LAYER].attend(asked, scale=SCALE), memory[LAYER].attend(asked, scale=SCALE), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    # With another share they are the same clusters.
    assert error(Memory.open(tmp_path / "m", index="clusters;share=0.9999"), store("exact", data), asked) < 1e-5


def test_what_was_appended_later_is_clustered_and_flushed(tmp_path: Path) -> None:
    first, second = topics(700, 1), topics(900, 2)
    store("clusters", first).save(tmp_path / "m")
    with Memory.open(tmp_path / "m", mode="a") as memory:
        memory.append({LAYER: second[0]}, {LAYER: second[1]}, range(900), document="b")
        memory.prepare()
        memory.flush()
    found = Memory.open(tmp_path / "m")._indexed[LAYER].learnt()
    assert found is not None
    assert found.known == 1536


def test_int8_vectors_are_saved_restored_and_near(tmp_path: Path) -> None:
    """At little more than half the bytes of bfloat16, scales and all."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, HEADS, 2048, 64, generator=generator)
    sizes, memories = {}, {}
    for dtype in ("bfloat16", "int8"):
        memory = Memory([LAYER], HEADS, 64, index="clusters;share=0.1", key_dtype=dtype, value_dtype=dtype)
        memory.append({LAYER: keys}, {LAYER: values}, range(2048), document="a")
        sizes[dtype], memories[dtype] = memory.nbytes()["keys"] + memory.nbytes()["values"], memory
    assert sizes["int8"] <= 0.55 * sizes["bfloat16"]
    memories["int8"].save(tmp_path / "m")
    opened, asked = Memory.open(tmp_path / "m"), torch.randn(HEADS, 4, 64, generator=generator)
    assert opened.key_dtype == opened.value_dtype == "int8"
    for found, wanted in zip(
        opened[LAYER].attend(asked, scale=0.1), memories["int8"][LAYER].attend(asked, scale=0.1), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    exact = Memory([LAYER], HEADS, 64, index="exact")
    exact.append({LAYER: keys}, {LAYER: values}, range(2048))
    whole = Memory.open(tmp_path / "m", index="clusters;share=0.9999")
    assert 0 < error(whole, exact, asked, 0.1) < 0.02


def test_a_memory_opened_to_read_says_that_its_clusters_are_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("memory.indexed.SEGMENT", 512)
    store("exact", topics(1100)).save(tmp_path / "m")

    def said(**options: Any) -> list[str]:
        caplog.clear()
        Memory.open(tmp_path / "m", **options).close()
        return [record.getMessage() for record in caplog.records if "holds no clusters" in record.getMessage()]

    assert not said()
    (message,) = said(index="clusters")
    assert "of its 1,100 tokens" in message
    assert "prepare() and flush() save them" in message
    with Memory.open(tmp_path / "m", mode="a", index="clusters") as memory:
        memory.prepare()
        memory.flush()
    assert not said(index="clusters")


@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_that_nobody_has_asked_is_saved_with_the_others(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that reads its memory while it stores a text asks every layer but the last."""
    monkeypatch.setattr("memory.indexed.SEGMENT", 512)
    keys, values = topics(1100)
    Memory([1, 2], HEADS, DIM, index="clusters").save(tmp_path / "m")
    with Memory.open(tmp_path / "m", mode="a") as memory:
        memory.append(dict.fromkeys((1, 2), keys), dict.fromkeys((1, 2), values), range(1100))
        memory[1].attend(queries(1), scale=0.1)
        if whole:
            memory.flush()
        else:  # as it was written before: a later flush adds what lacks
            disk.flush(memory._content, memory._folder, {1: memory._indexed[1].learnt()})
    if not whole:
        Memory.open(tmp_path / "m").close()
        assert "holds no clusters" in caplog.text
        with Memory.open(tmp_path / "m", mode="a") as memory:
            memory.prepare()
            memory.flush()
    caplog.clear()
    monkeypatch.setattr(ClusterIndex, "_cluster", lambda *args: pytest.fail("made again"))
    with Memory.open(tmp_path / "m") as memory:
        found = [memory[layer].attend(queries(1), scale=0.1) for layer in (1, 2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert "holds no clusters" not in caplog.text


def as_first_version(folder: Path) -> None:
    """Make a memory's folder what the first format had: float32 scales and clusters, none of them coarse."""
    for part, entry in ((next(folder.glob("index-*")), "learnt"), (next(folder.glob("segment-*")), "segments")):
        tensors = load_file(part)
        for name in list(tensors):
            scales = f"{name.partition('.')[0].removeprefix('mean_').removesuffix('s')}_scales.{LAYER}"
            scales = {f"spread_scales.{LAYER}": ""}.get(scales, scales)
            if entry == "learnt" and name.startswith(("mean", "cov", "slope")) and scales in tensors:
                tensors[name] = tensors[name].float() * tensors[scales].float()
        old = {
            name: one.float() if one.dtype == torch.bfloat16 else one.int() if name.startswith("counts") else one
            for name, one in tensors.items()
            if entry == "segments" or not ("scales" in name or name.startswith("coarse"))
        }
        save_file(old, part)
        forge(folder, entry, bytes=part.stat().st_size)
    forge(folder, "", version=1)


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_memory_of_the_first_format_opens_and_grows(tmp_path: Path, dtype: str) -> None:
    data, more = topics(1700), topics(900, seed=1)
    kinds = {"key_dtype": dtype, "value_dtype": dtype}
    memory, asked = store("clusters;share=0.05", data, **kinds), queries(4)
    memory.save(tmp_path / "m")
    as_first_version(tmp_path / "m")
    old = Memory.open(tmp_path / "m")
    for found, wanted in zip(*(one[LAYER].attend(asked, scale=SCALE) for one in (old, memory)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    memory.append({LAYER: more[0]}, {LAYER: more[1]}, range(900), document="more")
    with Memory.open(tmp_path / "m", mode="a") as grown:
        grown.append({LAYER: more[0]}, {LAYER: more[1]}, range(900), document="more")
        grown.prepare()
        grown.flush()
        grown.compact()
    grown = Memory.open(tmp_path / "m")
    assert torch.equal(grown[LAYER].keys(), memory[LAYER].keys())
    for found, wanted in zip(*(one[LAYER].attend(asked, scale=SCALE) for one in (grown, memory)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_coarse_clusters_are_saved_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    parts = [topics(count, seed) for seed, count in enumerate((1500, 300, 1300))]
    memory = store("clusters;share=0.02", *parts, key_dtype=dtype, value_dtype=dtype)
    memory.save(tmp_path / "m")
    wanted = memory[LAYER].attend(queries(4), scale=SCALE)
    made = []

    def assign(means: Tensor, number: int, most: int, of: Any = cluster_table.assign) -> Tensor:
        made.append(len(means))
        return of(means, number, most)

    monkeypatch.setattr(cluster_table, "assign", assign)
    monkeypatch.setattr(clusters, "cluster", None)
    opened = Memory.open(tmp_path / "m")
    for found, before in zip(opened[LAYER].attend(queries(4), scale=SCALE), wanted, strict=True):
        assert torch.equal(found, before)
    assert opened._indexed[LAYER].learnt().coarse is not None
    assert not made
    monkeypatch.undo()
    assert not verify(tmp_path / "m")
    # A document that is dropped takes the groups behind it; those before are as they were.
    with Memory.open(tmp_path / "m", mode="a") as changed:
        before = changed._indexed[LAYER].learnt()
        changed.drop_document("part 1")
        kept = changed._indexed[LAYER].learnt()
    assert before.coarse.stretches[:, :2].sum(1).tolist()[-1] == before.clusters.counts.shape[1]
    assert kept.coarse.stretches.tolist() == before.coarse.stretches[:1].tolist()
    assert not verify(tmp_path / "m")


def test_int8_with_all_that_clusters_store_is_little_more_than_half_of_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk and in RAM; what is kept for a token whatever its vectors are, 16 bytes, does not count."""
    monkeypatch.setattr(clusters, "SEGMENT", 8192)
    monkeypatch.setattr("memory.vectors.FIRST_BLOCK", 16384)  # no free room
    monkeypatch.setattr(cluster_table, "assign", lambda keys, number, *_: torch.arange(len(keys)) % number)
    monkeypatch.setattr("memory.clustering.assign", lambda keys, number, *_: torch.arange(len(keys)) % number)
    memory = Memory([LAYER], 1, 64, index="clusters", key_dtype="int8", value_dtype="int8")
    keys, values = torch.randn(2, 1, 16 * 8192, 64)
    memory.append({LAYER: keys}, {LAYER: values}, range(16 * 8192), document="a")
    memory.save(tmp_path / "m")
    assert memory._indexed[LAYER].learnt().coarse is not None
    wanted = 0.55 * 2 * 2 * 64 * len(memory)
    sizes = memory.nbytes()
    assert sizes["keys"] + sizes["values"] + sizes["index"] < wanted
    assert sum(path.stat().st_size for path in (tmp_path / "m").iterdir()) - 16 * len(memory) < wanted


def test_an_older_memory_opens_with_clusters(tmp_path: Path) -> None:
    data = topics(1100)
    store("exact", data).save(tmp_path / "m")
    opened = Memory.open(tmp_path / "m", index="clusters;share=0.9999")
    assert error(opened, store("exact", data), queries(3)) < 1e-5


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("what", ["order", "counts", "stretches", "coarse_order", "coarse_counts", "coarse_stretches"])
def test_forged_clusters_are_refused(tmp_path: Path, what: str) -> None:
    """Numbers that would look up keys outside the memory, or clusters that are none."""

    store("clusters", topics(1100)).save(tmp_path / "m")
    part = next((tmp_path / "m").glob("index-*"))
    tensors = load_file(part)
    tensors[f"{what}.{LAYER}"].view(-1)[1] += 600
    save_file(tensors, part)
    forge(tmp_path / "m", "learnt", bytes=part.stat().st_size)
    assert any("index-" in problem for problem in verify(tmp_path / "m"))
    with pytest.raises(ValueError, match="is damaged or belongs to another memory"):
        Memory.open(tmp_path / "m")[LAYER].attend(queries(1), scale=SCALE)
