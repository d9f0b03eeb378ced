"""A memory's folder is whole whatever happens: killed writers, full disks, two writers, readers that write."""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_helpers import HEADS, LAYERS, ROOT, append, assert_same, make, save_two, vectors
from forks import Fork

import memory.atomic
import memory.disk
import memory.vectors
from memory import Memory
from memory.disk import verify


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_two(tmp_path / "m")


def grow(path: Path) -> None:
    with Memory.open(path, "a") as store:
        append(store, 10, 80)
        store.flush()


def shrink(path: Path) -> None:
    with Memory.open(path, "a") as store:
        store.drop_document("a")


def shrink_and_compact(path: Path) -> None:
    with Memory.open(path, "a") as store:
        store.drop_document("a")
        append(store, 10, 80)
        store.compact()


def replace(path: Path) -> None:
    store = make(index="IVF2,Flat")
    append(store, 80, 200, document="new")
    store.save(path)


def moments_of(change: Callable[[Path], None], path: Path, folder: Path) -> list[Path]:
    """Copies of ``path``: what kill -9 leaves of it at each moment when the disk is touched, and what is there at last.

    What a process holds in buffers of its own is in no copy, as it dies with the process.
    """
    copies: list[Path] = []

    def keep() -> None:
        copies.append(folder / str(len(copies)))
        if path.exists():
            shutil.copytree(path, copies[-1])

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            keep()
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync", "unlink", "open"):
            patch.setattr(os, name, noting(getattr(os, name)))
        patch.setattr(memory.atomic, "open", noting(open), raising=False)
        change(path)
    keep()
    return copies


@pytest.mark.parametrize(
    ("change", "empty"),
    [(grow, False), (shrink, False), (shrink_and_compact, False), (replace, False), (replace, True)],
)
def test_killed_at_each_moment(
    change: Callable[[Path], None], empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.disk, "SEGMENT_TOKENS", 60)
    if not empty:
        store = make(index="IVF2,Flat")
        append(store, 80, document="a")
        append(store, 20, 50, document="b")
        store.save(tmp_path / "m")
    seen, contents = set(), set()
    copies = moments_of(change, tmp_path / "m", tmp_path)
    for path in copies:
        content = tuple(sorted((file.name, file.read_bytes()) for file in path.iterdir())) if path.exists() else ()
        if content in contents:  # as at the moment before
            continue
        contents.add(content)
        seen.add(state(path))
        if (path / "manifest.json").exists():
            assert verify(path) == []
            Memory.open(path, "a").close()  # removes what was left
            assert {entry.name for entry in path.iterdir()} == {
                "lock", "manifest.json", *(part.file for part in memory.disk.read_manifest(path).files())
            }  # fmt: skip
            assert state(path) in seen
    assert len(copies) > 6
    expected = {grow: 2, shrink: 2, shrink_and_compact: 3, replace: 2}[change]
    assert len(seen) == expected, seen


def state(path: Path) -> Any:
    if not (path / "manifest.json").exists():
        return None
    opened = Memory.open(path)
    wanted = torch.cat([opened[n].search(vectors(3), 3)[0].flatten() for n in LAYERS])
    return tuple(opened.documents().items()), tuple(wanted.round(decimals=3).tolist())


ENDLESS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from disk_helpers import append
from memory import Memory
store = Memory.open({path!r}, "a")
for seed in range(100_000):
    append(store, 10, seed, document=f"{{seed % 7}}")
    store.flush()
    if seed % 5 == 4:
        store.drop_document(f"{{seed % 7}}")
        store.compact()
    print(seed, flush=True)
"""


def test_killed_for_real(saved: Path) -> None:
    code = ENDLESS.format(root=str(ROOT), tests=str(ROOT / "tests"), path=str(saved))
    process = Fork("-c", code)
    while not process.stdout.startswith("0\n"):
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert verify(saved) == []
    with Memory.open(saved, "a") as store:  # the lock went with the process
        assert store.documents()["b"] == 20
        append(store, 10, 999, document="later")
        store.flush()
    assert Memory.open(saved).documents()["later"] == 10


@pytest.mark.parametrize("change", [grow, shrink_and_compact, replace])
def test_a_failing_disk_changes_nothing(
    change: Callable[[Path], None], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"m could not be written \(No space left on device\), and nothing .* was changed"
    ):
        change(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_failed_flush_can_be_repeated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Memory.open(saved, "a") as store:
        append(store, 10, 80)
        monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            store.flush()
        monkeypatch.undo()
        assert len(store) == 60
        store.flush()
    assert Memory.open(saved).documents() == {"a": 40, "b": 20}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk(tiny_disk: Path) -> None:
    store = make()
    append(store, 500, document="a")
    store.save(tiny_disk / "m")
    files = sorted(path.name for path in (tiny_disk / "m").iterdir())
    with Memory.open(tiny_disk / "m", "a") as grown:
        append(grown, 5000, 2, document="b")
        with pytest.raises(OSError, match="No space left on device"):
            grown.flush()
    big = make()
    append(big, 5000)
    for path in (tiny_disk / "m", tiny_disk / "other"):
        with pytest.raises(OSError, match="No space left on device"):
            big.save(path)
    assert sorted(path.name for path in (tiny_disk / "m").iterdir()) == files
    assert not (tiny_disk / "other").exists()
    assert_same(Memory.open(tiny_disk / "m"), store)


def test_read_only_folder(tiny_disk: Path) -> None:
    store = make()
    append(store, 50)
    store.save(tiny_disk / "m")
    (tiny_disk / "m" / "lock").unlink()
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    assert_same(Memory.open(tiny_disk / "m"), store)
    for attempt in (lambda: Memory.open(tiny_disk / "m", "a"), lambda: store.save(tiny_disk / "m")):
        with pytest.raises(OSError, match=r"m cannot be written to \(Read-only file system\)"):
            attempt()


def test_two_writers(saved: Path) -> None:
    with Memory.open(saved, "a") as store:
        for attempt in (lambda: Memory.open(saved, "a"), lambda: make().save(saved)):
            with pytest.raises(BlockingIOError, match=r"m is already open for writing"):
                attempt()
        assert len(Memory.open(saved)) == 50
        append(store, 1, 99)
        store.flush()
    Memory.open(saved, "a").close()


def test_read_only_memories_do_not_change(saved: Path) -> None:
    opened = Memory.open(saved)
    for attempt in (lambda: append(opened, 3), lambda: opened.drop_document("a"), opened.flush, opened.compact):
        with pytest.raises(ValueError, match=r"m was opened read-only: open it with .*mode='a'"):
            attempt()
    with pytest.raises(ValueError, match="cannot be reset"):
        opened.reset()
    assert len(opened) == 50
    closed = Memory.open(saved, "a")
    closed.close()
    closed.close()
    with pytest.raises(ValueError, match="m is closed"):
        append(closed, 3)
    assert closed[1].search(vectors(2), 3)[1].shape == (HEADS, 2, 3)
    with pytest.raises(ValueError, match="has no folder yet"):
        make().flush()


def test_closing_does_not_flush(saved: Path) -> None:
    with Memory.open(saved, "a") as store:
        append(store, 10, 80)
    assert len(Memory.open(saved)) == 50
