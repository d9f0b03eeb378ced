"""A memory shared out over processes says what one process says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_memory_run import SEGMENT, answers

from memory import Memory, clusters, sharded
from memory.disk import verify

RUN = Path(__file__).with_name("shared_memory_run.py")
TOKENS = 4 * SEGMENT + 44


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
    command = [sys.executable, str(RUN)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "m"), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 3], errors
    expected = answers(memory, queries)
    for name in ("exact", "clust"):
        found = torch.load(tmp_path / f"{name}.pt")
        for what, wanted in expected.items():
            torch.testing.assert_close(found[what], wanted, atol=1e-5, rtol=1e-5)
    said = (tmp_path / "error").read_text()
    assert "rank 1 of the 2" in said
    assert "start all ranks again" in said
    assert not verify(tmp_path / "m")
