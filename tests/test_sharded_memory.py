"""A memory shared out over processes says what one process says."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_memory_run import SEGMENT, answers

from memory import Memory, clusters, sharded
from memory.disk import verify

RUN = Path(__file__).with_name("shared_memory_run.py")
TOKENS = 4 * SEGMENT + 44


@settings(deadline=None)  # on a loaded machine any example may take long
@given(st.integers(0, 200_000), st.integers(1, 9))
def test_shares_are_whole_stretches(tokens: int, ranks: int) -> None:
    bounds = sharded.shares(tokens, ranks)
    assert len(bounds) == ranks
    assert [slot for start, stop in bounds for slot in (start, stop)][1:-1:2] == [start for start, _ in bounds][1:]
    assert (bounds[0][0], bounds[-1][1]) == (0, tokens)
    assert all(start % sharded.SEGMENT == 0 or start == tokens for start, _ in bounds)
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 2 * sharded.SEGMENT
    assert sizes[0] or not tokens


def test_two_processes_equal_one_and_a_dead_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "SEGMENT", SEGMENT)
    torch.manual_seed(0)
    memory = Memory([2, 5], 2, 8, index="exact")
    keys, values = torch.randn(2, 2, 2, TOKENS, 8)
    memory.append({2: keys[0], 5: keys[1]}, {2: values[0], 5: values[1]}, range(TOKENS), document="a")
    memory.save(tmp_path / "m")
    queries = torch.randn(2, 5, 8)
    torch.save(queries, tmp_path / "queries.pt")
    processes = [Fork(RUN, str(rank), tmp_path / "m", tmp_path) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 3], [process.stderr for process in processes]
    expected = answers(memory, queries)
    for name in ("exact", "clust"):
        found = torch.load(tmp_path / f"{name}.pt")
        for what, wanted in expected.items():
            torch.testing.assert_close(found[what], wanted, atol=1e-5, rtol=1e-5)
    said = (tmp_path / "error").read_text()
    assert "rank 1 of the 2" in said
    assert "start all ranks again" in said
    assert not verify(tmp_path / "m")


def test_threads_ask_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question, its queries and the replies follow one another on the wire."""
    wire = []

    def pass_on(*_: Any, **__: Any) -> None:
        wire.append(threading.get_ident())
        time.sleep(0.001)

    for name, act in (("get_rank", 0), ("get_world_size", 2), ("get_backend", "gloo")):
        monkeypatch.setattr(sharded.dist, name, lambda _, act=act: act)
    monkeypatch.setattr(sharded.dist, "send", pass_on)
    monkeypatch.setattr(sharded.dist, "recv", pass_on)
    memory = Memory([2], 2, 8, index="exact")
    memory.append({2: torch.ones(2, 5, 8)}, {2: torch.ones(2, 5, 8)}, range(5))
    layer = sharded._ShardedLayer(memory[2], 2, [(0, 5), (5, 9)], sharded._Link(None, Path("m")))

    def ask() -> None:
        for _ in range(5):
            layer.search(torch.ones(2, 1, 8), 3)
            layer.attend(torch.ones(2, 1, 8), scale=0.3)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wire) == 2 * 10 * 4
    assert all(len(set(wire[start : start + 4])) == 1 for start in range(0, len(wire), 4))
