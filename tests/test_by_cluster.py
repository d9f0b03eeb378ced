"""Folders whose vectors lie cluster after cluster, for memories larger than RAM: nothing else may change."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_clusters import LAYER, SCALE, error, queries, short_segments, store, topics  # noqa: F401 - a fixture
from torch import Tensor

from fot.cli import main
from memory import Memory, VectorBlocks, disk
from memory.atomic import file_sha256
from memory.disk import verify
from memory.vectors import VECTOR_DTYPES, packed

KINDS = ["float32", "bfloat16", "int8"]


def by_cluster(folder: Path, *parts: tuple[Tensor, Tensor], dtype: str = "float32") -> Memory:
    """A folder that is written so, and the memory as it was in RAM."""
    memory = store("clusters;share=0.2", *parts, key_dtype=dtype, value_dtype=dtype)
    memory.save(folder)
    with Memory.open(folder, mode="a") as opened:
        written: list[int] = []
        opened.compact(by_cluster=True, progress=written.append)
        assert sum(written) == len(memory)
        assert_same(opened, memory)
    return memory


def assert_same(found: Memory, wanted: Memory, *, clusters: bool = True) -> None:
    """Token by token; attention by clusters, too, unless these may be others."""
    asked, slots = queries(5), torch.randint(len(wanted), (2, 3, 40), generator=torch.Generator().manual_seed(0))
    assert found.token_ids().tolist() == wanted.token_ids().tolist()
    assert found.documents() == wanted.documents()
    one, other = found[LAYER], wanted[LAYER]
    for chosen in (None, slots):
        assert torch.equal(one.keys(chosen), other.keys(chosen))
        assert torch.equal(one.values(chosen), other.values(chosen))
    for some in (slice(None), slice(5, 733), slice(-7, None), slice(30, len(wanted) + 9), slice(9, 4)):
        assert torch.equal(one.keys(some), other.keys()[:, some])
        assert torch.equal(one.values(some), other.values()[:, some])
    with pytest.raises(IndexError, match="a slice with step 2"):
        one.keys(slice(0, 9, 2))
    assert torch.equal(one.search(asked, 9)[1], other.search(asked, 9)[1])
    count = min(700, len(wanted))
    pairs = [[layer.attend_newest(asked, count=count, scale=SCALE) for layer in (one, other)]]
    if clusters:
        pairs.append([layer.attend(asked, scale=SCALE) for layer in (one, other)])
    for output, expected in pairs:
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)  # blocks are summed in another order


def segments(folder: Path) -> list[Path]:
    return [folder / part["file"] for part in json.loads((folder / "manifest.json").read_text())["segments"]]


@pytest.mark.parametrize("dtype", KINDS)
def test_nothing_changes_but_the_order_on_disk(tmp_path: Path, dtype: str) -> None:
    memory = by_cluster(tmp_path / "m", topics(1300), dtype=dtype)
    assert_same(Memory.open(tmp_path / "m"), memory)
    assert error(Memory.open(tmp_path / "m", index="exact"), memory, queries(4)) < 0.1
    assert not verify(tmp_path / "m")
    learnt, (segment,) = memory._indexed[LAYER].learnt(), segments(tmp_path / "m")
    assert learnt is not None
    on_disk, order = load_file(segment), learnt.clusters.order.long()
    for first in (0, 512):
        here = slice(first, first + 512)
        wanted = memory[LAYER].keys(order[:, here] + first)
        scales = on_disk.get(f"keys_scales.{LAYER}", torch.ones(1, 1300, 1))[:, here]
        assert torch.equal(on_disk[f"keys.{LAYER}"][:, here].float() * scales, wanted)
    # What is not clustered yet is as it was.
    assert torch.equal(on_disk[f"places.{LAYER}"][0, 1024:].long(), torch.arange(1024, 1300))


@pytest.mark.parametrize("dtype", KINDS)
def test_dropping_appending_and_compacting_go_on(tmp_path: Path, dtype: str) -> None:
    """A dropped document takes a piece out of a stretch; the rest of it is still found by its places."""
    parts = [topics(count, seed) for seed, count in enumerate((700, 300, 1300, 40))]
    kinds = {"key_dtype": dtype, "value_dtype": dtype}
    by_cluster(tmp_path / "m", *parts, dtype=dtype)
    with Memory.open(tmp_path / "m", mode="a") as memory:
        memory.drop_document("part 1")
        memory.append({LAYER: parts[1][0]}, {LAYER: parts[1][1]}, range(300), document="part 4")
        memory.flush()
        wanted = store("exact", parts[0], **kinds)
        for number, (keys, values) in ((2, parts[2]), (3, parts[3]), (4, parts[1])):
            wanted.append({LAYER: keys}, {LAYER: values}, range(keys.shape[1]), document=f"part {number}")
        assert_same(memory, wanted, clusters=False)
    assert_same(Memory.open(tmp_path / "m", index="exact"), wanted)
    assert_same(Memory.open(tmp_path / "m").clone(), wanted, clusters=False)
    assert not verify(tmp_path / "m")
    with Memory.open(tmp_path / "m", mode="a") as memory:
        memory.compact()  # stays as it is
        assert_same(memory, wanted, clusters=False)
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["by_cluster"]
    (segment,) = segments(tmp_path / "m")
    rows, ends = load_file(segment)[f"places.{LAYER}"].long(), (0, 512, 724, 1236, 1748, 2260)
    for first, stop in pairwise(ends):
        stretch = rows[:, first:stop]
        assert torch.equal(stretch.sort(dim=1).values, torch.arange(first, stop).expand(2, -1))
        assert (stretch.diff() != 1).any()
    assert error(Memory.open(tmp_path / "m"), wanted, queries(4)) < 0.1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    memory, folder = store("clusters", topics(1300)), tmp_path / "m"
    memory.save(folder)
    for options in ([], ["--by-cluster"]):
        assert main(["memory", "compact", str(folder), *options]) == 0
        assert main(["memory", "info", str(folder)]) == 0
        assert ("cluster after cluster" in " ".join(capsys.readouterr().out.split())) == bool(options)
    assert main(["memory", "verify", str(folder)]) == 0
    assert_same(Memory.open(folder), memory)


def test_another_folder_is_written_in_order(tmp_path: Path) -> None:
    """An older version of fot reads it."""
    memory = by_cluster(tmp_path / "m", topics(1300))
    Memory.open(tmp_path / "m").save(tmp_path / "plain")
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert "by_cluster" not in manifest
    assert_same(Memory.open(tmp_path / "plain"), memory)


def test_without_clusters_there_is_nothing_to_write_by(tmp_path: Path) -> None:
    store("exact", topics(100)).save(tmp_path / "m")
    before = (tmp_path / "m" / "manifest.json").read_bytes()
    with (
        Memory.open(tmp_path / "m", mode="a") as memory,
        pytest.raises(ValueError, match=r"100 tokens has no clusters to write by: .* index='clusters'"),
    ):
        memory.compact(by_cluster=True)
    assert (tmp_path / "m" / "manifest.json").read_bytes() == before


def test_a_damaged_order_loses_no_vector(tmp_path: Path) -> None:
    """Its stretch is written in the order of the slots."""
    memory = store("clusters", topics(1300))
    memory.save(tmp_path / "m")
    learnt = memory._indexed[LAYER].learnt()
    assert learnt is not None
    order = learnt.clusters.order.clone()
    order[:, 3] = order[:, 4]
    damage(tmp_path / "m", "index", f"order.{LAYER}", order)
    with Memory.open(tmp_path / "m", mode="a") as opened:
        opened.compact(by_cluster=True)
        assert torch.equal(opened[LAYER].keys(), memory[LAYER].keys())
    (segment,) = segments(tmp_path / "m")
    rows = load_file(segment)[f"places.{LAYER}"].long()
    assert torch.equal(rows[:, :512], torch.arange(512).expand(2, -1))
    assert (rows[:, 512:1024].diff() != 1).any()


def damage(folder: Path, kind: str, name: str, values: Tensor) -> None:
    """Write other numbers into a tensor of the only segment or of the index, with the size and hash that fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    part = manifest["learnt"] if kind == "index" else manifest["segments"][0]
    save_file(load_file(folder / part["file"]) | {name: values}, folder / part["file"])
    part |= {"bytes": (folder / part["file"]).stat().st_size, "sha256": file_sha256(folder / part["file"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_verify_finds_two_vectors_at_one_place(tmp_path: Path) -> None:
    by_cluster(tmp_path / "m", topics(1300))
    damage(tmp_path / "m", "segment", f"places.{LAYER}", torch.zeros(2, 1300, dtype=torch.int16))
    assert verify(tmp_path / "m") == [f"{segments(tmp_path / 'm')[0]}: two vectors of layer {LAYER} are at one place"]


@pytest.mark.parametrize("place", [1300, -1])
def test_places_outside_of_the_segment_are_an_error(tmp_path: Path, place: int) -> None:
    by_cluster(tmp_path / "m", topics(1300))
    damage(tmp_path / "m", "segment", f"places.{LAYER}", torch.full((2, 1300), place, dtype=torch.int16))
    with pytest.raises(IndexError):
        Memory.open(tmp_path / "m")[LAYER].keys()
    with pytest.raises(IndexError):
        Memory.open(tmp_path / "m")[LAYER].attend(queries(3), scale=SCALE)


def test_larger_than_ram_it_is_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system is told to read little at a time."""
    memory, told = by_cluster(tmp_path / "m", topics(1300), dtype="int8"), []
    tell = disk.read_at_random
    monkeypatch.setattr(disk, "read_at_random", lambda tensor: (told.append(tensor.shape), tell(tensor)))
    assert_same(Memory.open(tmp_path / "m"), memory)
    assert not told
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    assert_same(Memory.open(tmp_path / "m"), memory)
    assert sum(shape[1] for shape in told) > 0
    assert not caplog.records
    # Where it is not written so, people are told what to do.
    memory.save(tmp_path / "plain")
    assert_same(Memory.open(tmp_path / "plain"), memory)
    assert "`fot memory compact --by-cluster`" in caplog.text


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_blocks_with_places_read_as_those_without(data: st.DataObject) -> None:
    """Whatever part of them is kept, and whatever lies before and behind them."""
    kind = data.draw(st.sampled_from(KINDS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    plain, arranged = (VectorBlocks(2, 4, VECTOR_DTYPES[kind]) for _ in range(2))
    for _ in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(1, 40))
        vectors, scales = torch.randn(2, length, 4, generator=generator), None
        if kind == "int8":
            vectors, scales = packed(vectors)
        vectors = vectors.to(VECTOR_DTYPES[kind])
        places = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
        first = data.draw(st.integers(0, length - 1))
        inside = slice(first, data.draw(st.integers(first + 1, length)))
        rows = torch.arange(2).unsqueeze(1), places[:, inside]
        plain.map(vectors[rows], None if scales is None else scales[rows])
        arranged.map(vectors, scales, places[:, inside].short())
    more = torch.randn(2, data.draw(st.integers(0, 30)), 4, generator=generator)
    for blocks in (plain, arranged):
        blocks.append(more)
    slots = torch.arange(len(plain))[torch.rand(len(plain), generator=generator) < 0.7]
    for one, other in ((arranged, plain), (arranged.kept(slots), plain.kept(slots))):
        assert len(one) == len(other)
        assert one.mapped_length == other.mapped_length
        assert one.nbytes() == other.nbytes() + 2 * 2 * other.mapped_length  # of the places
        if not len(other):
            continue
        start = data.draw(st.integers(0, len(other) - 1))
        stop = data.draw(st.integers(start, len(other)))
        assert torch.equal(one.take_range(start, stop, torch.float32), other.take_range(start, stop, torch.float32))
        lying, ordered = (torch.cat([*one.blocks(torch.float32, ordered=way)], dim=1) for way in (False, True))
        assert torch.equal(ordered, other.take_range(0, len(other), torch.float32))
        assert torch.equal(lying.sort(dim=1).values, ordered.sort(dim=1).values)
        asked = torch.randint(len(other), (2, 9), generator=generator).sort(dim=1).values
        assert torch.equal(one.gather(asked, torch.float32), other.gather(asked, torch.float32))
        assert torch.equal(one.gather_heads(slice(None), asked), other.gather_heads(slice(None), asked))
        assert torch.equal(one.gather_heads(slice(1, 2), asked[1:]), other.gather_heads(slice(1, 2), asked[1:]))
