"""Documents reach the batches whole and in order, mixed as asked, and a stopped loader goes on where it was."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import BOS, EOS, Counting, lane_streams, loader_of, same, split_documents, write_rows, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batches import NO_DOCUMENT, DocumentLoader, Piece, TaskSource, take
from training.data import DocumentStream
from training.reader import tokenize
from training.sources import DataSource

# Lanes


@pytest.mark.parametrize(("lanes", "windows", "window"), [(1, 1, 5), (2, 2, 4), (3, 4, 16)])
def test_lanes_hold_whole_documents_with_eos_bos_between(
    tmp_path: Path, tokenizer: Any, lanes: int, windows: int, window: int
) -> None:
    texts = write_texts(tmp_path, 12)
    loader = loader_of(DataSource(str(tmp_path)), tokenizer, lanes=lanes, windows=windows, window=window)
    inputs, _ = lane_streams([next(loader) for _ in range(1200 // (windows * window))], lanes)
    found = Counter(text for stream in inputs for text in split_documents(stream, tokenizer))
    assert set(found) == set(texts)
    assert max(found.values()) - min(found.values()) <= lanes + 1  # what is being read aside, as often as each other


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8), count=st.integers(1, 20))
def test_cutting_keeps_every_token_and_its_successor(lengths: list[int], count: int) -> None:
    ids = np.arange(sum(lengths), dtype=np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    pieces = [
        Piece(n, ids[start : start + length], np.full(length, n, np.float32), n)
        for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    seen: list[int] = []
    while sum(map(len, pieces)) > 1:
        before = sum(map(len, pieces))
        span, pieces = take(pieces, count)
        assert len(span.inputs) == min(count, before - 1)
        assert (span.targets == span.inputs + 1).all()
        owner = np.searchsorted(np.cumsum(lengths), span.inputs, side="right")
        assert (span.documents == owner).all()
        assert (span.weights == np.searchsorted(np.cumsum(lengths), span.targets, side="right")).all()
        seen += span.inputs.tolist()
    assert seen == ids[:-1].tolist()


def test_labels_are_next_tokens_across_windows_and_steps(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path, 6)
    inputs, labels = lane_streams(
        [batch for batch, _ in zip(loader_of(DataSource(str(tmp_path)), tokenizer), range(60), strict=False)], 2
    )
    for stream, targets in zip(inputs, labels, strict=True):
        for here, after, target in zip(stream, stream[1:], targets, strict=False):
            assert target == (-100 if here == EOS else after)
        assert EOS in targets
        assert EOS in stream


def test_rows_are_ordered_by_lane_then_window(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path, 3, longest=400)
    batch = next(loader_of(DataSource(str(tmp_path)), tokenizer, lanes=3, windows=2, window=4))
    assert batch.input_ids.shape == batch.labels.shape == batch.weights.shape == batch.padding.shape == (6, 4)
    assert batch.lane.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.index.tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.labels[0, -1] == batch.input_ids[1, 0]
    dtypes = [batch.input_ids.dtype, batch.labels.dtype, batch.weights.dtype, batch.padding.dtype]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.bool]
    assert same(batch.to("cpu"), batch)


def test_a_row_belongs_to_the_document_of_most_of_its_tokens(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a" * 9)  # BOS a*9 EOS: 11 tokens
    (tmp_path / "b.txt").write_text("b" * 99)
    loader = loader_of(DataSource(str(tmp_path)), tokenizer, lanes=1, windows=30, window=4)
    for _ in range(3):
        batch = next(loader)
        for row, document in zip(batch.input_ids, batch.document.tolist(), strict=True):
            letters = tokenizer.decode(row[row > 2])
            assert letters.count("ab"[document]) >= 2 or len(letters) < 4
            if len(set(letters)) == 1:
                assert "ab"[document] == letters[0]


def test_short_documents_align_to_steps_with_padding(tmp_path: Path, tokenizer: Any) -> None:
    texts = write_texts(tmp_path, 5, longest=30)
    loader = loader_of(DataSource(str(tmp_path)), tokenizer, lanes=1, align_documents=True)
    found: list[str] = []
    labels: list[int] = []
    while len(found) < 5:
        batch = next(loader)
        if batch.input_ids[0, 0] == BOS:
            labels = []
        real = ~batch.padding
        assert (batch.labels[batch.padding] == -100).all()
        assert (batch.weights[batch.padding] == 0).all()
        assert (batch.weights[real] == 1).all()
        assert EOS not in batch.input_ids[real]
        assert batch.document.tolist() == [batch.document[0] if used else NO_DOCUMENT for used in real.any(-1).tolist()]
        assert real.flatten().int().diff().max() <= 0  # padding only follows
        labels += batch.labels[real].tolist()
        if labels[-1] == EOS:
            found.append(tokenizer.decode(labels[:-1]))
    assert sorted(found) == sorted(texts)


def test_one_token_for_bos_and_eos_stands_once_between_documents(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer = _with_special(tokenizer, bos_token="</s>")
    write_texts(tmp_path, 4)
    loader = loader_of(DataSource(str(tmp_path)), tokenizer, lanes=1)
    (inputs,), (labels,) = lane_streams([next(loader) for _ in range(40)], 1)
    assert inputs[0] == EOS
    assert inputs.count(EOS) > 4
    assert all(not (a == b == EOS) for a, b in pairwise(inputs))
    assert labels[:-1] == inputs[1:]


def test_tokenizers_without_special_tokens_just_join_documents(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("abc")
    loader = loader_of(DataSource(str(tmp_path)), _with_special(tokenizer, bos_token=None, eos_token=None), lanes=1)
    (inputs,), (labels,) = lane_streams([next(loader)], 1)
    assert tokenizer.decode(inputs) == "abcabcab"
    assert [n for n, label in enumerate(labels) if label == -100] == [2, 5]


def test_special_tokens_spelt_out_in_a_text_are_characters(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("<s>x</s>y")
    assert len(tokenize(tokenizer, "<s>x</s>y")) == 9
    assert tokenizer("<s>")["input_ids"] == [BOS]  # the tokenizer itself is as it was
    batch = next(loader_of(DataSource(str(tmp_path)), tokenizer, lanes=1, windows=1, window=11))
    assert batch.input_ids[0].tolist().count(BOS) == batch.input_ids[0].tolist().count(EOS) == 1


def _with_special(tokenizer: Any, **tokens: Any) -> Any:
    from copy import deepcopy

    changed = deepcopy(tokenizer)
    for name, token in tokens.items():
        setattr(changed, name, token)
    return changed


# Mixing


def test_texts_are_mixed_by_tokens(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path / "long", 5, longest=300)
    write_texts(tmp_path / "short", 50, seed=1, longest=9)
    sources = [DataSource(str(tmp_path / "long"), weight=3), DataSource(str(tmp_path / "short"))]
    loader = loader_of(sources, tokenizer, windows=4, window=16)
    documents = torch.cat([next(loader).document for _ in range(200)])
    share = sum(loader.origin(document).startswith(str(tmp_path / "long")) for document in documents.tolist())
    assert share / len(documents) == pytest.approx(0.75, abs=0.03)
    tokens = [entry["tokens"] for entry in loader.progress().values()]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)
    assert all(entry["epoch"] > 1 for entry in loader.progress().values())


def test_tasks_take_steps_of_their_own_and_texts_go_on(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(97 + n % 26) for n in range(2000)))
    loader = loader_of([DataSource(str(tmp_path), weight=2), TaskSource(Counting())], tokenizer)
    rows: dict[bool, list[Any]] = {True: [], False: []}
    text: list[list[int]] = [[], []]
    starts = [-1, -1]
    for _ in range(60):
        batch = next(loader)
        for lane in (0, 1):
            mine = batch.lane == lane
            generated = "counting" in loader.origin(int(batch.document[mine][0]))
            rows[generated].append(batch.weights[mine].flatten().tolist())
            if not generated:
                starts[lane] = int(batch.position[mine][0, 0]) if starts[lane] < 0 else starts[lane]
                text[lane] += batch.input_ids[mine].flatten().tolist()
    assert len(rows[True]) / 120 == pytest.approx(1 / 3, abs=0.02)
    assert all(weights == [0.0] * 7 + [1.0] for weights in rows[True])
    whole = "".join(chr(97 + n % 26) for n in range(2000))
    assert min(starts) == 0
    assert 1000 <= max(starts) <= 1010  # of two lanes that read the only text, one starts halfway on
    for stream, start in zip(text, starts, strict=True):
        letters = stream[1:] if start == 0 else stream  # without BOS
        assert tokenizer.decode(letters) == whole[max(0, start - 1) :][: len(letters)]


def test_short_tasks_are_padded_and_need_no_tokenizer() -> None:
    batch = next(loader_of(TaskSource(Counting(length=3)), None))
    assert batch.padding.flatten().tolist() == [False, False, *[True] * 6] * 2
    assert batch.document.tolist() == [batch.document[0], NO_DOCUMENT, batch.document[2], NO_DOCUMENT]
    assert batch.labels.flatten().tolist().count(-100) == 14


def test_a_task_document_depends_on_seed_name_and_number_only() -> None:
    expected = Counting().document(random.Random("7/counting/3"))[0]
    for world_size, lanes in ((1, 4), (2, 2), (4, 1)):
        loaders = [
            loader_of(TaskSource(Counting()), None, seed=7, lanes=lanes, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        found = [row.input_ids.reshape(-1, 8) for row in map(next, loaders)]
        assert any(row.tolist() == expected[:-1] for rows in found for row in rows)


@pytest.mark.parametrize(
    ("task", "message"),
    [(Counting(length=10), "gave 10 tokens; a step holds 2..9"), (Counting(length=1), "gave 1 tokens")],
)
def test_task_documents_must_fit(task: Counting, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(loader_of(TaskSource(task), None))


# Position


def test_same_seed_same_batches_other_seed_other_batches(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path, 9)
    sources = [DataSource(str(tmp_path)), TaskSource(Counting())]
    one, two, other = (loader_of(sources, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert all(same(next(one), next(two)) for _ in range(30))
    assert not all(same(next(one), next(other)) for _ in range(5))


@pytest.mark.parametrize(("kind", "aligned"), [("jsonl", False), ("parquet", True), ("txt", False), ("txt", True)])
def test_a_stopped_loader_goes_on_with_the_same_batches(
    tmp_path: Path, tokenizer: Any, kind: str, aligned: bool
) -> None:
    if kind == "txt":
        write_texts(tmp_path / "rows", 7)
        source = DataSource(str(tmp_path / "rows"), min_chars=8)
    else:
        source = DataSource(write_rows(tmp_path / "rows", kind), min_tokens=6, shuffle_buffer=5)
    write_texts(tmp_path / "other", 3, seed=1)
    sources = [source, DataSource(str(tmp_path / "other"), weight=0.3), TaskSource(Counting(), 0.5)]

    def fresh() -> DocumentLoader:
        return loader_of(sources, tokenizer, windows=3, align_documents=aligned, seed=5, rank=1, world_size=2)

    whole = fresh()
    states, batches = [], []
    for _ in range(30):
        states.append(json.dumps(whole.state_dict()))
        batches.append(next(whole))
    assert whole.progress()[source.label]["epoch"] >= 1
    for stop in range(0, 30, 2):
        resumed = fresh()
        resumed.load_state_dict(json.loads(states[stop]))
        assert json.dumps(resumed.state_dict()) == states[stop]
        assert all(same(next(resumed), batch) for batch in batches[stop : stop + 8])
    resumed.load_state_dict(json.loads(states[3]))  # also one that has been used
    assert all(same(next(resumed), batch) for batch in batches[3:])
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_resume_holds_for_any_shape_and_moment(data: Any, tmp_path_factory: Any, tokenizer: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_texts(folder, data.draw(st.integers(2, 6), "files"), longest=60)
    settings_ = {
        "lanes": data.draw(st.integers(1, 3), "lanes"),
        "windows": data.draw(st.integers(1, 3), "windows"),
        "window": data.draw(st.integers(1, 9), "window"),
        "align_documents": data.draw(st.booleans(), "aligned"),
    }
    whole = loader_of(DataSource(str(folder)), tokenizer, **settings_)
    for _ in range(data.draw(st.integers(0, 40), "steps")):
        next(whole)
    resumed = loader_of(DataSource(str(folder)), tokenizer, **settings_)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert all(same(next(resumed), next(whole)) for _ in range(20))


def test_a_position_stays_small(tmp_path: Path, tokenizer: Any) -> None:
    texts = write_texts(tmp_path, 1, longest=200_000)
    loader = loader_of(DataSource(str(tmp_path)), tokenizer, lanes=1)
    next(loader)
    assert len(json.dumps(loader.state_dict())) < 2 * len(texts[0]) + 2000


@pytest.mark.parametrize(
    "changed", [{"lanes": 3}, {"world_size": 2}, {"seed": 1}, {"window": 8}, {"align_documents": True}]
)
def test_a_position_of_other_settings_is_refused(tmp_path: Path, tokenizer: Any, changed: dict[str, Any]) -> None:
    write_texts(tmp_path, 2)
    state = loader_of(DataSource(str(tmp_path)), tokenizer).state_dict()
    with pytest.raises(ValueError, match=f"was made with {next(iter(changed))} .*: resume with "):
        loader_of(DataSource(str(tmp_path)), tokenizer, **changed).load_state_dict(state)


def test_a_position_of_another_version_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path, 2)
    state = loader_of(DataSource(str(tmp_path)), tokenizer).state_dict()
    with pytest.raises(ValueError, match="saved by another version of fot: start a new run"):
        loader_of(DataSource(str(tmp_path)), tokenizer).load_state_dict(state | {"layout": 1})


@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_lanes_start_at_different_places_of_one_text(tmp_path: Path, tokenizer: Any, lanes: int) -> None:
    write_texts(tmp_path, 1, longest=5000)
    batch = next(loader_of(DataSource(str(tmp_path)), tokenizer, lanes=lanes, windows=1, window=8))
    places = sorted(batch.position[:, 0].tolist())
    assert places[0] == 0
    assert len(set(batch.content.flatten().tolist())) == 1
    assert min(b - a for a, b in pairwise(places)) > 100


def test_equal_texts_of_two_sources_have_one_content(tmp_path: Path, tokenizer: Any) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("the same text in both " * 9)
    sources = [DataSource(str(tmp_path / folder)) for folder in ("a", "b")]
    batch = next(loader_of(sources, tokenizer, lanes=2, windows=1, window=16))
    assert batch.document[0] != batch.document[1]
    assert len(set(batch.content.flatten().tolist())) == 1
    assert batch.position[0, 0] != batch.position[1, 0]


def test_a_position_of_another_process_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path, 2)
    first, second = (loader_of(DataSource(str(tmp_path)), tokenizer, rank=rank, world_size=2) for rank in (0, 1))
    with pytest.raises(ValueError, match="was made with rank 0, but this run has 1: resume with 0"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_position_in_changed_data_is_refused(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    if kind == "txt":
        write_texts(tmp_path / "a", 3)
        path = str(tmp_path / "a")
    else:
        path = write_rows(tmp_path / "a", kind)
    loader = loader_of(DataSource(path), tokenizer)
    next(loader)
    if kind == "txt":
        (tmp_path / "a" / "new.txt").write_text("new")
    else:
        (tmp_path / "a" / "0.jsonl").write_text('{"id": 1, "text": "new"}\n')
    with pytest.raises(ValueError, match="has changed since the checkpoint"):
        loader_of(DataSource(path), tokenizer).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_processes_share_no_document_in_any_epoch(tmp_path: Path, tokenizer: Any, kind: str, world_size: int) -> None:
    if kind == "txt":
        path, count = str(tmp_path / "a"), len(write_texts(tmp_path / "a", 22))
    else:
        path, count = write_rows(tmp_path / "a", kind), 22
    shares: list[set[tuple[int, ...]]] = []
    numbers: dict[int, tuple[int, ...]] = {}
    for rank in range(world_size):
        stream = DocumentStream(DataSource(path, shuffle_buffer=5), tokenizer, rank=rank, world_size=world_size)
        share: set[tuple[int, ...]] = set()
        again: set[tuple[int, ...]] = set()
        while stream.epoch < 3:
            number, ids = stream.draw()
            (share if stream.epoch == 0 else again).add(tuple(ids))
            numbers[number * world_size + rank] = tuple(ids)  # in each epoch the same
        assert again == share
        assert all(numbers[number * world_size + rank] in share for number in range(len(share)))
        shares.append(share)
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(numbers) == len(set(numbers.values())) == count


def test_a_document_has_one_number_on_all_lanes_and_processes(tmp_path: Path, tokenizer: Any) -> None:
    for n, letter in enumerate("abcd"):
        (tmp_path / f"{n}.txt").write_text(letter * 200)
    for rank in (0, 1):
        source = DataSource(str(tmp_path))
        loader = loader_of([TaskSource(Counting(), 0.1), source], tokenizer, lanes=3, rank=rank, world_size=2)
        found = set()
        for _ in range(120):
            batch = next(loader)
            for row, document in zip(batch.input_ids, batch.document.tolist(), strict=True):
                origin = loader.origin(document)
                if origin.startswith(source.label) and len(set(row.tolist())) == 1:
                    found.add((int(origin.split()[-1]), tokenizer.decode(row[:1])))
        assert found == {(rank, "abcd"[rank]), (rank + 2, "abcd"[rank + 2])}


def test_epochs_come_in_different_orders(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path, 20)
    stream = DocumentStream(DataSource(str(tmp_path)), tokenizer)
    epochs = [[stream.draw()[0] for _ in range(20)] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)


# Settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": []}, "no source is given"),
        ({"sources": [TaskSource(Counting()), TaskSource(Counting())]}, "'counting' is there twice"),
        ({"sources": [DataSource(".")]}, "needs a tokenizer"),
        ({"windows": 0}, "windows is 0"),
        ({"rank": 2, "world_size": 2}, r"rank 2 is outside 0\.\.1"),
    ],
)
def test_wrong_settings_of_a_loader_are_named(changed: dict[str, Any], message: str) -> None:
    sources = changed.pop("sources", [TaskSource(Counting())])
    with pytest.raises(ValueError, match=message):
        loader_of(sources, None, **changed)
    with pytest.raises(ValueError, match="task 'counting': weight is -1"):
        TaskSource(Counting(), weight=-1)
