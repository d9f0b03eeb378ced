"""StreamingLLM as a library: constant memory, and the same tokens as by a window moved by hand."""

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import ModelMaker

from fot.compare.caches import SinkCache, cache_bytes
from fot.compare.streaming import attention_sinks, sink_cache, stream
from fot.compat import CACHE

Ids = Callable[..., torch.Tensor]


def test_memory_is_constant_however_long(make_plain: ModelMaker, ids: Ids) -> None:
    model = make_plain()
    with attention_sinks(model, 2, 10), torch.no_grad():
        cache, sizes = sink_cache(model, 2, 10), set()
        for step in range(100):  # the model has 64 positions
            model.model(ids(1, seed=step), cache=cache, use_cache=True)
            if step > 12:
                sizes.add(cache_bytes(cache))
    assert sizes == {4 * 2 * 2 * 8 * 4 * 11}  # layers, keys and values, heads, size, bytes, 2 sinks and 9 tokens
    assert cache.get_seq_length() == 100


def test_positions_are_places_in_the_cache(make_plain: ModelMaker, ids: Ids) -> None:
    """One layer: a query at the end sees what a plain model sees of sinks and window put side by side."""
    model = make_plain()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    text = ids(200)
    with torch.no_grad():
        side_by_side = model(torch.cat([text[:, :3], text[:, -12:]], dim=1), use_cache=False).logits[0, -1]
        with attention_sinks(model, 3, 12):
            found = model(text, use_cache=False).logits[0, -1]
    torch.testing.assert_close(found, side_by_side, atol=1e-4, rtol=1e-4)


def test_stream_and_generate_agree(make_plain: ModelMaker, ids: Ids) -> None:
    model, prompt = make_plain(), ids(30)
    with attention_sinks(model, attention_sink_size=2, attention_sink_window_size=12):
        found = list(itertools.islice(stream(model, prompt[0].tolist(), 2, 12), 50))
        made = model.generate(prompt, **{CACHE: SinkCache(5, 2, 12)}, max_new_tokens=50, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert made[0, 30:].tolist() == found
    assert len(set(found)) > 1


def test_drawn_tokens_depend_on_the_generator(make_plain: ModelMaker, ids: Ids) -> None:
    model, prompt = make_plain(), ids(5)[0].tolist()
    with attention_sinks(model, 2, 12):
        one, same, other = (
            list(itertools.islice(stream(model, prompt, 2, 12, torch.Generator().manual_seed(seed)), 20))
            for seed in (0, 0, 1)
        )
    assert one == same != other


@pytest.mark.parametrize(("sizes", "message"), [((-1, 4), "at least 0 and 1"), ((2, 0), "at least"), ((4, 61), "64")])
def test_sizes_that_cannot_be(sizes: tuple[int, int], message: str, make_plain: ModelMaker) -> None:
    with pytest.raises(ValueError, match=message), attention_sinks(make_plain(), *sizes):
        pass
