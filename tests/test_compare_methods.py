"""Every method on tiny models: plain within the trained length where it says so, and the same by steps as at once."""

from collections.abc import Callable

import pytest
import torch
from conftest import ModelMaker
from transformers import DynamicCache, PreTrainedTokenizerFast

from fot.compare.catalogue import METHODS, find_methods
from fot.compare.methods import OPENERS, Setting, missing, opened
from fot.compare.readers import CachedReader
from fot.compat import CACHE

Ids = Callable[..., torch.Tensor]
TRAINED = 64  # of the tiny models
SETTING = Setting(longest=3 * TRAINED, window=20)

# Equal to plain up to the trained length, whatever longer texts they are set up for.
WITHIN = ("dynamic-ntk", "dynamic-yarn", "log-n")
# Equal to plain if the longest text has the trained length.
AT_FACTOR_ONE = ("interpolation", "ntk", "ntk-by-parts", "yarn", "longrope", "llama3", *WITHIN, "log-n-ntk")
# Whose cache is exact: what is read in any pieces gives the same.
STEPWISE = tuple(name for name in OPENERS if not name.startswith(("cache-", "memory", "bm25")))


def logits(model: object, name: str, setting: Setting, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), opened(name, model, setting) as reader:
        return reader.feed(reader.read([], lambda tokens: None), ids, len(ids))


@pytest.fixture
def model(make_model: ModelMaker, family: str, tokenizer: PreTrainedTokenizerFast) -> object:
    made = make_model(family)
    made.tokenizer = tokenizer
    return made


@pytest.fixture
def llama(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> object:
    made = make_model()
    made.tokenizer = tokenizer
    return made


def test_catalogue_and_openers_agree() -> None:
    assert [method.name for method in METHODS] == list(OPENERS)
    assert find_methods("yarn,plain, yarn") == [METHODS[7], METHODS[0]]
    assert find_methods("all") == list(METHODS)
    with pytest.raises(ValueError, match="'rope' is no method: choose from plain"):
        find_methods("rope")


@pytest.mark.parametrize("name", WITHIN)
def test_plain_up_to_the_trained_length(model: object, name: str, ids: Ids) -> None:
    text = ids(TRAINED)[0].tolist()
    found, plain = (logits(model, one, SETTING, text) for one in (name, "plain"))
    torch.testing.assert_close(found, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", AT_FACTOR_ONE)
def test_plain_at_factor_one(llama: object, name: str, ids: Ids) -> None:
    text = ids(TRAINED)[0].tolist()
    found, plain = (logits(llama, one, Setting(TRAINED), text) for one in (name, "plain"))
    torch.testing.assert_close(found, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "same"), [("window", 20), ("streaming", 24), ("self-extend", 17)])
def test_plain_within_the_window(model: object, name: str, same: int, ids: Ids) -> None:
    text = ids(40)[0].tolist()
    found, plain = (logits(model, one, SETTING, text) for one in (name, "plain"))
    torch.testing.assert_close(found[:same], plain[:same], atol=2e-4, rtol=1e-4)
    assert (found[same] - plain[same]).abs().max() > 1e-3


def test_self_extend_in_groups_of_one_is_plain(llama: object, ids: Ids) -> None:
    text = ids(TRAINED)[0].tolist()
    found, plain = (logits(llama, one, Setting(TRAINED // 2), text) for one in ("self-extend", "plain"))
    torch.testing.assert_close(found, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", STEPWISE)
def test_steps_equal_one_pass(llama: object, name: str, ids: Ids) -> None:
    """Three times the trained length: read whole, without a cache, and in pieces of many sizes with one."""
    text = ids(3 * TRAINED)[0].tolist()
    with torch.no_grad(), opened(name, llama, SETTING) as reader:
        assert isinstance(reader, CachedReader)
        asked = torch.tensor([text])
        hidden = reader.model.base_model(asked, use_cache=False).last_hidden_state[0]
        state, found, start = reader.read(text[:50], lambda tokens: None), [], 50
        for size in (1, 1, 30, 2, 64, 1, 40, 3):
            found.append(reader.feed(state, text[start : start + size], size))
            start += size
        assert start == len(text)
        whole = reader.model.lm_head(hidden)[50:]
    torch.testing.assert_close(torch.cat(found), whole, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in STEPWISE if name != "plain"])
def test_differs_from_plain_past_the_trained_length(llama: object, name: str, ids: Ids) -> None:
    text = ids(3 * TRAINED)[0].tolist()
    found, plain = (logits(llama, one, SETTING, text) for one in (name, "plain"))
    assert (found[-1] - plain[-1]).abs().max() > 1e-3


def test_a_cache_that_transformers_lacks_is_said(llama: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(backend: str, *args: object, **kwargs: object) -> None:
        raise ValueError(f"Unknown quantization backend `{backend}`")

    monkeypatch.setattr("fot.compare.methods.QuantizedCache", lacks)
    assert "has no 8-bit cache: upgrade it" in missing(["plain", "cache-fp8"], llama, SETTING)["cache-fp8"]


# optimum-quanto compiles what it needs when it is first used, for minutes.
@pytest.mark.parametrize("name", ["cache-fp8", pytest.param("cache-int4", marks=pytest.mark.slow)])
def test_quantised_caches_are_near(llama: object, name: str, ids: Ids) -> None:
    if missing([name], llama, SETTING):
        pytest.skip("its package is missing")
    text = ids(128)[0].tolist()
    with torch.no_grad(), opened(name, llama, SETTING) as reader:
        state = reader.read(text[:-1], lambda tokens: None)
        found = reader.feed(reader.fork(state), text[-1:], 1)
        held = reader.held_bytes(state)
    with torch.no_grad(), opened("plain", llama, SETTING) as reader:
        state = reader.read(text[:-1], lambda tokens: None)
        plain = reader.feed(reader.fork(state), text[-1:], 1)
        assert reader.held_bytes(state) == 4 * 2 * 2 * 8 * 4 * 127  # layers, keys and values, heads, size, bytes
        assert held < reader.held_bytes(state) / 2
    assert torch.cosine_similarity(found, plain).item() > 0.8
    assert not torch.equal(found, plain)


def test_the_model_is_as_before(llama: object, ids: Ids) -> None:
    text, names = ids(40), [name for name in OPENERS if name not in ("cache-int4", "cache-offloaded")]
    before, class_, settings = llama(text).logits, type(llama), llama.memory_config
    for name in names:
        with torch.no_grad(), opened(name, llama, SETTING) as reader:
            reader.feed(reader.read(text[0, :30].tolist(), lambda tokens: None), [7, 8], 1)
        assert (type(llama), llama.memory_config) == (class_, settings), name
        assert torch.equal(llama(text).logits, before), name
    assert missing(["cache-offloaded"], llama, SETTING).keys() == {"cache-offloaded"}


def test_a_fork_leaves_the_state(llama: object, ids: Ids) -> None:
    text = ids(60)[0].tolist()
    for name in ("plain", "streaming", "memory", "bm25"):
        with torch.no_grad(), opened(name, llama, SETTING) as reader:
            state = reader.read(text, lambda tokens: None)
            first = reader.feed(reader.fork(state), [5, 6], 1)
            assert torch.equal(reader.feed(reader.fork(state), [5, 6], 1), first), name


def test_memory_is_read_as_forward_reads(llama: object, ids: Ids) -> None:
    """Half a window stays local, and a text within the window is plain."""
    text = ids(75)
    with torch.no_grad(), opened("memory", llama, SETTING) as reader:
        found = reader.feed(reader.read(text[0, :70].tolist(), lambda tokens: None), text[0, 70:].tolist(), 5)
        state = reader.read(text[0, :70].tolist(), lambda tokens: None)
        assert len(state.memory) == 62  # windows of 16
        short = reader.feed(reader.read(text[0, :10].tolist(), lambda tokens: None), text[0, 10:15].tolist(), 5)
        cache = getattr(llama(text[:, :70]), CACHE)
        expected = llama(text[:, 70:], **{CACHE: cache}).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(short, logits(llama, "plain", SETTING, text[0, :15].tolist())[10:], atol=1e-4, rtol=1e-4)


def test_dynamic_ntk_is_transformers_own_in_one_go(make_plain: ModelMaker, ids: Ids) -> None:
    """One layer, whose keys depend on nothing before: the last block of queries sees all keys turned by its own base.

    transformers does that in one pass without a cache; with a cache it leaves keys as they were turned before.
    """
    from fot.compare.patterns import dynamic_ntk
    from fot.compare.rope import rotated, shape_of
    from fot.compare.turned import BLOCK, turned_by

    plain = make_plain()
    plain.model.layers = plain.model.layers[:1]
    plain.config.num_hidden_layers = 1
    text = ids(TRAINED + BLOCK)
    with torch.no_grad(), rotated(plain, {"rope_type": "dynamic", "factor": 2.0}):
        at_once = plain(text, use_cache=False).logits[0, -5:]
    with torch.no_grad(), rotated(plain, {"rope_type": "dynamic", "factor": 2.0}):
        cache = DynamicCache()
        reader = CachedReader(plain, lambda: cache)
        state = reader.read(text[0, :200].tolist(), lambda tokens: None)
        trapped = reader.feed(state, text[0, 200:].tolist(), 5)
    with torch.no_grad(), turned_by(plain, dynamic_ntk(*shape_of(plain), 2.0)):
        reader = CachedReader(plain, DynamicCache)
        state = reader.read(text[0, :200].tolist(), lambda tokens: None)
        ours = reader.feed(state, text[0, 200:].tolist(), 5)
    torch.testing.assert_close(ours, at_once, atol=2e-4, rtol=1e-4)
    assert (trapped - at_once).abs().max() > 1e-3


def test_padding_is_refused(llama: object, ids: Ids) -> None:
    from fot.compare.streaming import attention_sinks
    from fot.model import detach_memory

    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    with attention_sinks(detach_memory(llama), 2, 8) as model, pytest.raises(ValueError, match="reads no padding"):
        model(ids(10, rows=2), attention_mask=mask)
