"""StreamingLLM as a library: constant memory, and the same tokens as by a window moved by hand."""

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import SHAPE, ModelMaker
from transformers import AutoModelForCausalLM, CohereConfig, GPTNeoXConfig, SmolLM3Config

from fot.compare import sinks
from fot.compare.caches import cache_bytes
from fot.compare.sinks import SinkCache, Turner
from fot.compare.streaming import attention_sinks, sink_cache, stream
from fot.compat import CACHE
from fot.rotary import rotary_of

Ids = Callable[..., torch.Tensor]


def test_memory_is_constant_however_long(make_plain: ModelMaker, ids: Ids) -> None:
    model = make_plain()
    with attention_sinks(model, 2, 10), torch.no_grad():
        cache, sizes = sink_cache(model, 2, 10), set()
        for step in range(100):  # the model has 64 positions
            model.model(ids(1, seed=step), cache=cache, use_cache=True)
            if step > 12:
                sizes.add(cache_bytes(cache))
    # layers, heads, size, bytes; 10 tokens and 2 sinks, whose keys are kept unturned, too
    assert sizes == {4 * 2 * 8 * 4 * (14 + 12)}
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


# Layers that are not rotated, neighbours that are turned together, and half of a head that is turned.
NEOX = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
KINDS = {
    "smollm3": lambda: SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1, 1]),
    "cohere": lambda: CohereConfig(**SHAPE),
    "gpt_neox": lambda: GPTNeoXConfig(**NEOX, rotary_pct=0.5),
}


@pytest.mark.parametrize(("first", "window"), [(0, 7), (1, 1), (3, 12), (5, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_turned_once_are_as_good_as_turned_anew(
    kind: str, first: int, window: int, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows read in pieces of many sizes; without a cache all keys are turned for each block of queries."""
    torch.manual_seed(0)
    model, text = AutoModelForCausalLM.from_config(KINDS[kind]()).eval(), ids(90, rows=2)
    monkeypatch.setattr(sinks, "BLOCK", 16)
    with attention_sinks(model, first, window), torch.no_grad():
        expected = model(text, use_cache=False).logits
        cache, found = sink_cache(model, first, window), []
        for piece in text.split([1, 1, 9, 1, 1, 2, 30, 1, 1, 1, 40, 1, 1], dim=1):
            found.append(model(piece, **{CACHE: cache}, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_a_token_costs_the_same_in_any_window(
    make_plain: ModelMaker, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys, only the new one and those of the first tokens are turned."""
    turned, turn = [], sinks.turned_by_angles

    def counted(vectors: torch.Tensor, *args: object) -> torch.Tensor:
        turned.append(vectors.shape[2])
        return turn(vectors, *args)

    monkeypatch.setattr(sinks, "turned_by_angles", counted)
    model = make_plain()
    for window in (10, 40):
        with attention_sinks(model, 3, window), torch.no_grad():
            written = stream(model, ids(50)[0].tolist(), 3, window)
            next(written)
            turned.clear()
            next(written)
        assert turned == 4 * [1, 3, 1]  # layers; a key, first tokens and a query


def test_far_from_the_start_nothing_is_lost(make_plain: ModelMaker) -> None:
    """The same tokens ten million later: in float32, angles there would be wrong by whole radians."""
    model, draw, far = make_plain(layers=1), torch.Generator().manual_seed(0), 10_000_000
    turn = Turner(rotary_of(model))
    near, late = (sinks.SinkLayer(2, 10) for _ in range(2))
    for step in range(40):
        query = torch.randn(1, 4, 1, 8, generator=draw)
        key, value = (torch.randn(1, 2, 1, 8, generator=draw) for _ in range(2))
        outputs = []
        for layer in (near, late):
            layer.update(key, value)
            outputs.append(layer.attend(0, turn, query, key, value, 0.3))
        if step == 25:
            late.seen += far  # ten tokens later all of the window stands there
        if step > 36:
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert (near.seen, late.seen) == (40, 40 + far)


def test_beams_take_their_rows_along(make_plain: ModelMaker, ids: Ids) -> None:
    model, prompt = make_plain(), ids(20, rows=2)
    wanted = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with attention_sinks(model, 2, 12):
        found = model.generate(prompt, **{CACHE: sink_cache(model, 2, 12)}, **wanted)
        expected = model.generate(prompt, use_cache=False, **wanted)
    assert torch.equal(found, expected)


def test_a_cache_begins_anew(make_plain: ModelMaker, ids: Ids) -> None:
    model, text = make_plain(), ids(30)
    with attention_sinks(model, 2, 12), torch.no_grad():
        cache = sink_cache(model, 2, 12)
        once, again = (_read_anew(model, text, cache) for _ in range(2))
    assert torch.equal(once, again)


def _read_anew(model: torch.nn.Module, text: torch.Tensor, cache: SinkCache) -> torch.Tensor:
    cache.reset()
    return model(text, **{CACHE: cache}, use_cache=True).logits


def test_a_cache_of_other_sizes_is_refused(make_plain: ModelMaker) -> None:
    model = make_plain()
    with attention_sinks(model, 2, 12), pytest.raises(ValueError, match=r"4 sinks .* 12, where .* sees 2 and 12"):
        next(stream(model, [1, 2, 3], 4, 12))
