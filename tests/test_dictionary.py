"""The dictionary task: each question has one answer, which was told, and only answers count."""

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from fot.tasks.dictionary import (
    FIRST_SYMBOL,
    KEY,
    PAD,
    QUESTION,
    RECORD,
    VALUE,
    VOCABULARY,
    DictionaryTable,
    DictionaryTask,
    ask,
    record_chunks,
)
from fot.tasks.task import Task


def split_entries(ids: list[int], window: int) -> list[list[list[int]]]:
    """The records or questions of each whole window, behind which must be padding."""
    found = []
    for first in range(0, len(ids), window):
        part = ids[first : first + window]
        used = next(
            (i for i in range(0, window // RECORD * RECORD, RECORD) if part[i] == PAD), window // RECORD * RECORD
        )
        assert part[used:] == [PAD] * (window - used)
        found.append([part[i : i + RECORD] for i in range(0, used, RECORD)])
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"windows": 3, "window": 64}, {"window": 250}, {"fewest_records": 2, "windows": 3}, {"similar": 0.5}],
)
def test_dictionary_documents(settings: dict[str, Any]) -> None:
    task = DictionaryTask(**settings)
    protocol: Task = task
    fit = task.window // RECORD
    most = fit * (task.windows - 1)
    counts = set()
    for seed in range(50):
        ids, weights, _ = protocol.document(random.Random(seed))
        assert len(ids) == len(weights) == task.windows * task.window + 1
        assert ids.pop() == PAD
        assert weights.pop() == 0.0
        assert 0 <= min(ids) <= max(ids) < VOCABULARY
        *records, questions = split_entries(ids, task.window)
        entries = [entry for window in records for entry in window]
        assert {entry[0] for entry in entries} == {KEY}
        assert {entry[0] for entry in questions} == {QUESTION}
        assert all(entry[5] == VALUE for entry in entries + questions)
        assert len(entries) == most
        known = {tuple(entry[1:5]): entry[6:] for entry in entries}
        assert len({tuple(entry) for entry in entries}) == len(known)
        counts.add(len(known))
        assert len(questions) == len({tuple(entry[1:5]) for entry in questions}) == min(fit, len(known))
        for entry in questions:
            assert known[tuple(entry[1:5])] == entry[6:]
        counted = [ids[place] for place, weight in enumerate(weights) if weight]
        assert counted == [token for entry in questions for token in entry[6:]]
        assert set(weights) == {0.0, fit / len(questions)}
    if task.fewest_records is None:
        assert counts == {most}
    else:
        assert min(counts) < most / 4 < most / 2 < max(counts) <= most
        assert min(counts) >= task.fewest_records
    assert task.document(random.Random(7)) == task.document(random.Random(7))
    assert task.document(random.Random(7)) != task.document(random.Random(8))


def test_similar_keys_differ_in_one_symbol() -> None:
    def neighbours(similar: float) -> float:
        records, _ = split_entries(DictionaryTask(similar=similar).document(random.Random(0))[0][:-1], 256)
        keys = np.array([entry[1:5] for entry in records])
        differ = (keys[:, None] != keys[None]).sum(-1)
        return float((differ == 1).any(1).mean())

    assert neighbours(0.0) == 0.0
    assert neighbours(1.0) == 1.0
    assert 0.4 < neighbours(0.5) < 1.0


def test_a_dictionary_record_is_asked_for_once_while_there_are_enough() -> None:
    ids = DictionaryTask().document(random.Random(0)).ids
    questions = split_entries(ids[:-1], 256)[-1]
    assert len({tuple(entry[1:5]) for entry in questions}) == 25


def test_dictionary_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        DictionaryTask(windows=1)
    with pytest.raises(ValueError, match="fewest_records is 26"):
        DictionaryTask(fewest_records=26)
    with pytest.raises(ValueError, match=r"similar is 1\.5"):
        DictionaryTask(similar=1.5)
    with pytest.raises(ValueError, match="whole windows"):
        DictionaryTable.of_tokens(1000, seed=0)
    with pytest.raises(ValueError, match="distinct keys"):
        DictionaryTable(60**4 + 1, seed=0)
    with pytest.raises(ValueError, match="holds no record"):
        ask(DictionaryTable(10, seed=0), np.random.default_rng(0), window=9)


def test_a_million_tokens_of_distinct_keys() -> None:
    """Quickly generated, in little memory, and every answer is right."""
    table = DictionaryTable.of_tokens(2**20, seed=5)
    tracemalloc.start()
    total = sum(chunk.numel() for chunk in record_chunks(table, chunk_windows=256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2**20
    assert peak < 8 * 2**20
    ids = torch.cat(list(record_chunks(table)))
    entries = ids.reshape(-1, 256)[:, :250].reshape(-1, RECORD).numpy()
    assert len(entries) == table.records == 2**20 // 256 * 25
    assert (entries[:, 0] == KEY).all()
    assert (entries[:, 5] == VALUE).all()
    symbols = np.delete(entries, [0, 5], axis=1)
    assert FIRST_SYMBOL <= symbols.min() <= symbols.max() < VOCABULARY
    assert len(np.unique(entries[:, 1:5], axis=0)) == table.records
    assert (table.lookup(entries[:, 1:5]) == entries[:, 6:]).all()


def test_dictionary_keys_permute_the_whole_key_space() -> None:
    """On 60 * 60 * 60 * 60 keys a stride shows it: the inverse gives back each record number's value."""
    table = DictionaryTable(60**4, seed=1)
    numbers = np.arange(0, 60**4, 997)
    keys = table.keys(numbers)
    assert len(np.unique(keys, axis=0)) == len(numbers)
    assert (table.lookup(keys) == table.values(numbers)).all()
    # Each symbol as often at each place, and places not correlated: like keys drawn at random.
    for place in range(4):
        counts = np.bincount(keys[:, place], minlength=VOCABULARY)[FIRST_SYMBOL:]
        assert counts.std() / counts.mean() < 2 / np.sqrt(counts.mean())
    off_diagonal = np.corrcoef(keys.T) - np.eye(4)
    assert abs(off_diagonal).max() < 0.05


def test_dictionary_chunks_join_to_the_whole() -> None:
    table = DictionaryTable(1003, seed=2)
    whole = torch.cat(list(record_chunks(table, chunk_windows=10_000)))
    assert whole.shape == (41 * 256,)
    for chunk_windows in (1, 7):
        assert torch.equal(torch.cat(list(record_chunks(table, chunk_windows=chunk_windows))), whole)
    assert not torch.equal(torch.cat(list(record_chunks(DictionaryTable(1003, seed=3)))), whole)


def test_dictionary_questions_cover_the_table_and_are_right() -> None:
    table = DictionaryTable.of_tokens(2**20, seed=5)
    rng = np.random.default_rng(0)
    asked = [ask(table, rng) for _ in range(40)]
    for questions in asked:
        assert questions.ids.shape == questions.answers.shape == (256,)
        entries = questions.ids[:250].reshape(25, RECORD).numpy()
        assert (entries[:, 0] == QUESTION).all()
        assert (table.lookup(entries[:, 1:5]) == entries[:, 6:]).all()
        assert torch.equal(questions.ids[questions.answers], torch.from_numpy(entries[:, 6:].ravel().copy()))
        assert len(set(questions.numbers.tolist())) == 25
    numbers = np.concatenate([questions.numbers for questions in asked])
    assert np.mean(numbers) == pytest.approx(table.records / 2, rel=0.1)  # 1,000 draws: 3.6 standard errors
    few = DictionaryTable(5, seed=0)
    assert len(ask(few, rng).numbers) == 25


def test_lookup_refuses_what_is_in_no_record() -> None:
    table, larger = DictionaryTable(100, seed=0), DictionaryTable(101, seed=0)
    with pytest.raises(ValueError, match="none of 100 records"):
        table.lookup(larger.keys(np.array([100])))
    with pytest.raises(ValueError, match="symbols"):
        table.lookup(np.array([[0, 5, 6, 7]]))
    with pytest.raises(ValueError, match="record numbers"):
        table.keys(np.array([100]))
