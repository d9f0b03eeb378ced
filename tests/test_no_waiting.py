"""Decoding a token, and reading a window into a memory, never ask the device for a number.

On a GPU each such question waits for all that was asked before. Here a dispatch mode counts the operators that ask.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker
from torch.utils._python_dispatch import TorchDispatchMode

Draw = Callable[..., torch.Tensor]

ROOT = str(Path(__file__).parent.parent)

# What copies a number to the host, or makes a shape of numbers.
ASKS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique",
    "aten._unique2",
    "aten.is_nonzero",
    "aten.equal",
    "aten.repeat_interleave.Tensor",
)


class Questions(TorchDispatchMode):
    """Counts the operators that wait for a device, and calls of ``Tensor.tolist``, which is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.counting = False
        for name in ("tolist", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        asks = name.startswith(ASKS)
        if name.startswith("aten.index.Tensor"):  # by a mask
            asks = any(index is not None and index.dtype == torch.bool for index in args[1])
        if asks:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Questions":
        self.found.clear()
        self.counting = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.counting = False
        super().__exit__(*error)

    def _note(self, name: str) -> None:
        if not self.counting:
            return
        frames = (frame for frame in reversed(traceback.extract_stack()) if frame.filename.startswith(ROOT))
        frames = (frame for frame in frames if "site-packages" not in frame.filename)  # an environment within
        frame = next(frame for frame in frames if "tests" not in frame.filename or frame.name.startswith("test_"))
        self.found[f"{name} in {Path(frame.filename).name}, {frame.name}"] += 1

    def _counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(f"Tensor.{name}")
            return plain(tensor, *args, **kwargs)

        return method


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Questions:
    return Questions(monkeypatch)


def test_questions_are_noticed(questions: Questions) -> None:
    a = torch.arange(3)
    for ask in (lambda: a[0].item(), a.tolist, a.numpy, a.nonzero, lambda: a[a > 1], lambda: bool(a[0] > 1)):
        with questions:
            ask()
        assert questions.found


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_decoded_token_asks_nothing(rows: int, make_model: ModelMaker, ids: Draw, questions: Questions) -> None:
    model = make_model()
    cache = model(ids(3 * WINDOW + 2, rows=rows), use_cache=True).past_key_values
    token = ids(1, rows=rows)
    model(token, past_key_values=cache)
    with questions:
        for _ in range(3):
            model(token, past_key_values=cache)
    assert not questions.found


@torch.no_grad()
def test_rows_with_padding_ask_as_little(make_model: ModelMaker, ids: Draw, questions: Questions) -> None:
    """A token asks nothing, and a move once for each row."""
    model, tokens = make_model(), ids(WINDOW - 2, rows=2)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    token, moved = ids(1, rows=2), 0
    for _ in range(2 * WINDOW):
        before = list(cache.local.counts)
        with questions:
            model(token, past_key_values=cache)
        moves = sum(after <= count for after, count in zip(cache.local.counts, before, strict=True))
        found = {name: count for name, count in questions.found.items() if "fingerprint" not in name}
        assert sum(found.values()) <= moves, found
        assert set(found) <= {"Tensor.numpy in checks.py, check_pairs"}
        moved += moves
    assert moved > 4


@torch.no_grad()
def test_a_decoded_token_with_a_memory_asks_nothing(make_model: ModelMaker, ids: Draw, questions: Questions) -> None:
    model = make_model(full_weight_tokens=WINDOW)
    memory = model.new_memory()
    model.ingest(ids(5 * WINDOW), memory)
    cache = model(ids(4), memory=memory, use_cache=True).past_key_values
    token = ids(1)
    with questions:
        for _ in range(3):
            model(token, past_key_values=cache)
    assert not questions.found


@torch.no_grad()
def test_a_window_that_is_read_asks_once(make_model: ModelMaker, ids: Draw, questions: Questions) -> None:
    """Whether what it stores is finite, and its ids; those of the text are on the host, and wait for nothing."""
    model, counts = make_model(), []
    on_the_host = ("in maker.py, check_ids", "in ingest.py, id_pieces")
    for windows in (4, 8):
        tokens, memory = ids(windows * WINDOW), model.new_memory()
        with questions:
            model.ingest(tokens, memory)
        counts.append({name: n for name, n in questions.found.items() if not name.endswith(on_the_host)})
    more = {name: number - counts[0].get(name, 0) for name, number in counts[1].items()}
    assert {name: number for name, number in more.items() if number} == {"Tensor.numpy in checks.py, check_pairs": 4}


@torch.no_grad()
def test_a_window_that_overflows_asks_once(make_model: ModelMaker, ids: Draw, questions: Questions) -> None:
    """While tokens are generated, the window's oldest move to the memory."""
    model = make_model()
    cache = model(ids(WINDOW), use_cache=True).past_key_values
    with questions:
        for number in range(2 * WINDOW):
            model(ids(1, seed=number), past_key_values=cache)
    found = {name: count for name, count in questions.found.items() if "fingerprint" not in name}
    # Whether all is finite, and the ids of the tokens that move, together.
    assert set(found) == {"Tensor.numpy in checks.py, check_pairs"}
    assert max(found.values()) <= WINDOW
