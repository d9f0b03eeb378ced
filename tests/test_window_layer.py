"""The local window grows in place, and nobody notices."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fot.attention import attend_local
from fot.cache import FoTCache
from fot.window_layer import WindowLayer
from memory import attend

Draw = Callable[..., Tensor]
STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "fork", "crop", "rows", "deepcopy"]), st.integers(0, 5), st.integers(1, 80)),
    max_size=25,
)


def drawn(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, batch, 3, count, 4)
    return keys, values


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_any_history_gives_what_copies_give(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    pairs: list[tuple[Any, Any]] = [(WindowLayer(), DynamicLayer())]
    pairs[0][0].update(*(first := drawn(3)))
    pairs[0][1].update(*first)
    for what, which, count in steps:
        mine, plain = pairs[which % len(pairs)]
        if what == "append":
            new = drawn(count, len(mine.keys))
            assert all(torch.equal(*both) for both in zip(mine.update(*new), plain.update(*new), strict=True))
        elif what == "rows":
            order = torch.tensor([1, 0, 1])[: len(mine.keys)]
            mine.reorder_cache(order)
            plain.reorder_cache(order)
        elif what == "crop":
            for one in (mine, plain):
                left = max(1, one.keys.shape[2] - count)
                one.keys, one.values = one.keys[:, :, :left], one.values[:, :, :left]
        else:
            how = copy.copy if what == "fork" else copy.deepcopy
            pairs.append((how(mine), how(plain)))
        for mine, plain in pairs:
            assert torch.equal(mine.keys, plain.keys)
            assert torch.equal(mine.values, plain.values)


def test_the_window_is_not_copied_for_each_token() -> None:
    layer = WindowLayer()
    layer.update(*drawn(500))
    places = set()
    for _ in range(40):
        keys, values = layer.update(*drawn(1))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1


def test_threads_that_go_on_with_one_window() -> None:
    first = WindowLayer()
    first.update(*drawn(8))
    first.update(*drawn(1))  # there is room now
    forks, ready = [copy.copy(first) for _ in range(8)], threading.Barrier(8)

    def go_on(number: int) -> None:
        ready.wait()
        for _ in range(30):
            forks[number].update(*(torch.full((2, 3, 1, 4), float(number)),) * 2)

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, fork in enumerate(forks):
        assert torch.equal(fork.keys[:, :, :9], first.keys)
        assert (fork.keys[:, :, 9:] == number).all()


def test_gradients_pass_through() -> None:
    layer, keys = WindowLayer(), torch.randn(1, 2, 5, 4, requires_grad=True)
    layer.update(keys, keys.detach())
    layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


@torch.no_grad()
def test_generation_grows_every_layer_in_place(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model()
    cache = FoTCache([])
    model(ids(3), past_key_values=cache)
    model(ids(1), past_key_values=cache)
    before = [layer.keys.data_ptr() for layer in cache.local.layers]
    model(ids(1), past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.local.layers] == before


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_of_grouped_heads(masked: bool) -> None:
    queries, keys, values = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.arange(9)[None] >= torch.tensor([[0], [4]]) if masked else None
    found = attend_local(queries, keys, values, mask, scale=0.3)
    wide = keys.repeat_interleave(2, dim=1), values.repeat_interleave(2, dim=1)
    seen = None if mask is None else mask[:, None, None]
    torch.testing.assert_close(found, attend(queries, *wide, scale=0.3, mask=seen))
