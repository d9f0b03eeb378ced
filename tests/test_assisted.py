"""Assisted and prompt-lookup decoding: candidates are read, and those that were wrong are taken back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker

from fot.cache import FoTCache
from fot.trace import record
from memory import Memory

Draw = Callable[..., torch.Tensor]

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": WINDOW + 6, "return_dict_in_generate": True}
LOOKUP = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1}


def assistant(model: Any, noise: float = 0.01) -> Any:
    """A model that guesses some of another's tokens right, and some wrong."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def repetitive(ids: Draw, length: int) -> torch.Tensor:
    """A prompt of few different tokens, so that looking up finds many candidates."""
    return 3 + ids(length) % 6


def assert_same_state(found: Any, expected: Any) -> None:
    """Two caches of one row each: the same tokens local, at the same places, and the same moved."""
    for name in ("token_ids", "positions", "places"):
        assert getattr(found.local, name).tolist() == getattr(expected.local, name).tolist(), name
    mine, theirs = found.rows[0].own, expected.rows[0].own
    assert mine.token_ids().tolist() == theirs.token_ids().tolist()
    for layer in mine.layers:
        torch.testing.assert_close(mine[layer].keys(), theirs[layer].keys(), atol=1e-4, rtol=1e-4)


SHORT, LONG = 6, 3 * WINDOW + 5
# How families differ, and what a window keeps, have nothing to do with the length of the prompt.
CASES = [
    *(("llama", method, length, {}) for method in ("lookup", "assistant") for length in (SHORT, LONG)),
    ("qwen3", "lookup", LONG, {}),
    ("qwen3", "assistant", SHORT, {}),
    ("llama", "lookup", SHORT, {"overflow_keep": 0}),
    ("llama", "lookup", LONG, {"overflow_keep": 0}),
    ("llama", "lookup", LONG, {"last_context_length": 5}),
]


@pytest.mark.parametrize(("family", "method", "length", "settings"), CASES, ids=str)
def test_the_answer_is_that_of_greedy_generation(
    family: str, method: str, length: int, settings: dict[str, Any], make_model: ModelMaker, ids: Draw
) -> None:
    """The window overflows several times; whatever was taken back, the state is that of one token at a time."""
    shape = {"layers": 3, "mem_layers": (0, 2)}
    model, prompt = make_model(family, **shape, **settings), repetitive(ids, length)
    memory = model.new_memory()
    model.ingest(ids(40, seed=1), memory)
    asked = LOOKUP if method == "lookup" else {"assistant_model": assistant(make_model(family, **shape))}
    cropped: list[int] = []
    expected = model.generate(prompt, memory=memory, **GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        plain = FoTCache.crop
        patch.setattr(FoTCache, "crop", lambda self, count: (cropped.append(count), plain(self, count))[1])
        found = model.generate(prompt, memory=memory, **GREEDY, **asked)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert any(cropped)
    assert_same_state(found.past_key_values, expected.past_key_values)
    assert len(memory) == 40


@pytest.mark.parametrize("settings", [{}, {"overflow_keep": 0}], ids=str)
def test_a_memory_in_a_folder_gets_the_answer_and_no_guess(
    settings: dict[str, Any], make_model: ModelMaker, ids: Draw, tmp_path: Path
) -> None:
    """Nobody can take tokens back from a file, so none may get there before it is known to be right."""
    model, prompt = make_model(**settings), repetitive(ids, 2 * WINDOW)
    written = []
    for name, asked in (("plain", {}), ("assisted", LOOKUP)):
        memory = model.new_memory(key_dtype="int8")
        model.ingest(ids(40, seed=1), memory)
        memory.save(tmp_path / name)
        with Memory.open(tmp_path / name, "a") as opened:
            output = model.generate(prompt, memory=opened, update_memory=True, **GREEDY, **asked)
            written.append((output.sequences.tolist(), opened.token_ids().tolist()))
            assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    assert written[0] == written[1]
    assert written[0][1] == [*ids(40, seed=1)[0].tolist(), *output.sequences[0, :-1].tolist()]


@torch.no_grad()
def test_crop_by_hand(make_model: ModelMaker, ids: Draw) -> None:
    """Tokens taken back leave no trace, as long as they are local; afterwards only if the cache was told before."""
    model, tokens = make_model(), ids(3 * WINDOW)
    for kept in (-4, WINDOW - 4):  # as transformers says it today, and as it did before
        cache = model(tokens[:, :WINDOW]).past_key_values
        cache.crop(kept)
        assert cache.get_seq_length() == WINDOW - 4
        again = model(tokens[:, WINDOW - 4 : WINDOW], past_key_values=cache)
        torch.testing.assert_close(again.logits, model(tokens[:, :WINDOW]).logits[:, -4:], atol=1e-4, rtol=1e-4)
    for told in (False, True):
        cache = model(tokens[:, :WINDOW]).past_key_values
        if told:
            cache.activate_past_recording()
        model(tokens[:, WINDOW:], past_key_values=cache)
        assert len(cache.rows[0].own) > WINDOW
        if not told:
            with pytest.raises(ValueError, match="the others have moved to the memory; call activate_past_recording"):
                cache.crop(-2 * WINDOW + 2)
            assert cache.get_seq_length() == 3 * WINDOW
            continue
        cache.crop(-2 * WINDOW + 2)
        expected = model(tokens[:, :WINDOW]).past_key_values
        for token in tokens[:, WINDOW : WINDOW + 2].split(1, dim=1):
            model(token, past_key_values=expected)
        assert_same_state(cache, expected)


def test_what_assisted_decoding_cannot_do_is_refused_in_words(make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(), repetitive(ids, 6)
    with record(model), pytest.raises(ValueError, match="assisted decoding cannot be recorded"):
        model.generate(prompt, **GREEDY, **LOOKUP)
    with pytest.raises(ValueError, match=r"assistant_early_exit is 2.*memory layer 3"):
        model.generate(prompt, **GREEDY, assistant_early_exit=2)
