"""``benchmarks/peers.py``: how peers are read, written down and gone on with. What they cost is not tested."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peer_measure
import peer_readers
import peers

SETTING = {"shape": "random", "device": "cpu", "dtype": "float32"}
FIGURES = {"tokens_per_second": 100.0, "decode_ms": 5.0, "bytes_per_token": 64.0, "peak_bytes": 10**8}


@pytest.fixture
def job(make_model: ModelMaker, tmp_path: Path) -> peer_readers.Job:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    return peer_readers.Job(str(folder), "cpu", "float32", 1, 600, None, str(tmp_path))


@torch.no_grad()
def test_readers_of_the_same_attention_agree(job: peer_readers.Job) -> None:
    """Full attention and a memory that is read whole give the same within one window; a new text forgets the last."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (24,), generator=draw).tolist()
    found = []
    for name in ("fot exact", "transformers, dynamic cache"):
        reader = peer_readers.PEERS[name].open(job)
        reader.read(ids[::-1])
        reader.read(ids[:10])
        first = reader.feed(ids[10:12], 2)
        found.append(np.concatenate([first, reader.feed(ids[12:13], 1)]))
        assert reader.held_bytes() > 0
    assert found[0].shape[0] == 3
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


@torch.no_grad()
def test_a_measurement_has_all_columns(job: peer_readers.Job) -> None:
    ids = torch.randint(3, 60, (530,), generator=torch.Generator().manual_seed(1)).tolist()
    material = {"passkey": [{"text": ids[:80], "question": ids[:4]}] * 2, "text": ids}
    found = peer_measure.measure(job, "transformers, dynamic cache", material)
    assert len(found["answers"]) == 2
    assert found["answers"][0] == found["answers"][1]
    assert found["perplexity"] > 1
    assert all(found[name] > 0 for name in FIGURES)


@torch.no_grad()
def test_speeds_are_of_the_real_text(job: peer_readers.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal windows, as the passkey's text has them, fot reads one: that would flatter it."""
    ids = torch.randint(3, 60, (530,), generator=torch.Generator().manual_seed(1)).tolist()
    trial = {"text": ids[:80], "question": ids[:4]}
    reads: list[list[int]] = []
    read = peer_readers.Compared.read
    monkeypatch.setattr(peer_readers.Compared, "read", lambda self, some: (reads.append(list(some)), read(self, some)))
    for real in (ids, None):
        reads.clear()
        found = peer_measure.measure(job, "transformers, dynamic cache", {"passkey": [trial], "text": real})
        assert len(found["answers"]) == 1
        assert reads[1:] == ([ids[:80]] if real is None else [ids[: -2 * peer_measure.SCORED], ids[:80]])


def test_perplexity_is_that_of_torch() -> None:
    logits, targets = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)), [3, 1, 4, 1, 5, 9, 2]
    expected = math.exp(float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets))))
    assert peer_readers.perplexity(logits.numpy(), targets) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError("a context of 8,192 tokens\nmore"), "a context of 8,192 tokens"),
        (ModuleNotFoundError("No module named 'kvpress'"), "ModuleNotFoundError: No module named 'kvpress'"),
    ],
)
def test_a_peer_says_why_it_failed(error: Exception, said: str) -> None:
    assert peer_measure.reason(error) == said


def test_a_table_says_what_failed_and_what_is_past_the_positions() -> None:
    row = {"peer": "transformers, dynamic cache", "tokens": 9000, "right": 0, "asked": 1, "perplexity": 99.5}
    assert peers.cells(row | FIGURES, 8192)[-3:] == ["0 of 1", "99.50", "past its 8,192 positions"]
    assert peers.cells(row | FIGURES, 16384)[-1] == ""
    failed = peers.cells({"peer": "fot exact", "tokens": 9000, "failed": "out of memory"}, 8192)
    assert (len(failed), failed[-1]) == (len(peers.HEADER), "out of memory")


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are kept; longer texts are not tried after one that was too long; what lacked an option is tried again."""
    asked = []

    def apart(name: str, length: int, *rest: Any) -> dict[str, Any]:
        asked.append((name, length))
        if name == "fot IVF":
            return {"failed": "out of memory"}
        if length == 300 and len(asked) < 6:
            raise KeyboardInterrupt
        return FIGURES | {"answers": [[1]], "perplexity": None}

    monkeypatch.setattr(peers, "apart", apart)
    words = ["peers.py", "--shape", "random", "--out", str(tmp_path), "--lengths", "200,300"]
    words += ["--peers", "fot IVF;fot exact;LongLLaMA's code"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    assert asked == [("fot IVF", 200), ("fot exact", 200), ("fot exact", 300)]
    rows = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
    assert [row.get("failed") for row in rows] == [
        "out of memory", None, "not measured: give --longllama", "out of memory at 200"
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*words, "--longllama", str(tmp_path)])
    asked[:] = [("", 0)] * 6
    peers.main()
    assert asked[6:] == [("LongLLaMA's code", 200), ("fot exact", 300), ("LongLLaMA's code", 300)]
    assert capsys.readouterr().out.count("out of memory") == 4
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 6


def test_no_measurement_begins_after_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--shape", "random", "--minutes", "0", "--peers", "fot exact"])
    peers.main()
    assert "2 rows are left" in capsys.readouterr().err


def test_an_unknown_peer_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--peers", "fot exact;nobody"])
    with pytest.raises(SystemExit) as stop:
        peers.main()
    assert stop.value.code == 2
    assert "'nobody' is no peer" in capsys.readouterr().err


def test_texts_that_are_too_short_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passkey's filler would stand in for what they lack, and its equal windows flatter fot."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 64}')
    monkeypatch.setattr(
        peers, "make_checkpoint", lambda shape, model, folder: shutil.copytree(tmp_path / "model", folder)
    )
    monkeypatch.setattr(peers, "tokens_of", lambda texts, tokenizer: [5] * 300)
    monkeypatch.setattr(sys, "argv", ["peers.py", "a.txt", "--lengths", "200,301", "--peers", "fot exact"])
    with pytest.raises(SystemExit, match="the texts have 300 tokens, and 301 are to be read: name more texts"):
        peers.main()
