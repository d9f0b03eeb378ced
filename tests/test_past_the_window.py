"""A window that is outgrown: what moves to the memory, what stays, and how much a large memory weighs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, WINDOW, ModelMaker
from reference import reference_stream

Draw = Callable[..., torch.Tensor]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@torch.no_grad()
def test_overflow_moves_the_oldest_tokens(make_model: ModelMaker, ids: Draw) -> None:
    """Token by token past the window: nothing is lost, nothing is stored twice, and the first tokens stay local."""
    model, tokens = make_model(overflow_keep=6), ids(3 * WINDOW + 5)
    cache = None
    for token in tokens[0]:
        cache = model(token.view(1, 1), past_key_values=cache).past_key_values
    own, local = cache.rows[0].own, cache.local
    assert local.sinks == [4]
    assert local.token_ids[0, :4].tolist() == tokens[0, :4].tolist()
    assert own.token_ids().tolist() + local.token_ids[0, 4:].tolist() == tokens[0].tolist()
    assert 4 + 6 <= local.counts[0] <= WINDOW
    assert local.layers[0].keys.shape[2] == local.counts[0]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"attention_sinks": 1},
    {"attention_sinks": 0},
    {"overflow_keep": 0},
    {"full_weight_tokens": 12, "newest_full_weight": 0},
    {"full_weight_tokens": 12, "newest_full_weight": 5},
    {"full_weight_tokens": 12, "newest_full_weight": 10, "attention_sinks": 0},
]
# How families differ (biases, norms, sizes of heads) and what a window keeps have nothing to do with one another.
CASES = [("llama", settings, positionals) for settings in SETTINGS for positionals in (True, False)] + [
    (family, settings, positionals)
    for family in FAMILIES
    if family != "llama"
    for settings, positionals in ((SETTINGS[0], True), (SETTINGS[-1], False))
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings", "mem_positionals"), CASES, ids=str)
def test_past_the_window_equals_the_method_written_out(
    settings: dict[str, Any], mem_positionals: bool, family: str, make_model: ModelMaker, ids: Draw
) -> None:
    shape = {"layers": 3, "mem_layers": (0, 2)}
    model, tokens = make_model(family, mem_positionals=mem_positionals, **shape, **settings), ids(2 * WINDOW + 2)
    first, *others = tokens.split([WINDOW - 2] + [1] * (WINDOW + 4), dim=1)
    output = model(first)
    logits = [output.logits]
    for token in others:
        output = model(token, past_key_values=output.past_key_values)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), reference_stream(model, tokens), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("newest", [0, 6, 18, 30])
def test_past_the_window_beside_a_large_memory(newest: int, make_model: ModelMaker, ids: Draw) -> None:
    """The newest tokens reach as far as some sinks, or behind all of them into the memory that was given."""
    model = make_model(full_weight_tokens=32, newest_full_weight=newest)
    memory, tokens = model.new_memory(), ids(2 * WINDOW + 2)
    model.ingest(ids(40, seed=1), memory)
    first, *others = tokens.split([WINDOW - 2] + [1] * (WINDOW + 4), dim=1)
    output = model(first, memory=memory)
    logits = [output.logits]
    for token in others:
        output = model(token, past_key_values=output.past_key_values)
        logits.append(output.logits)
    expected = reference_stream(model, tokens, memory)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


@torch.no_grad()
def test_sinks_change_the_logits(make_model: ModelMaker, ids: Draw) -> None:
    """So that the test above can fail."""
    tokens, found = ids(WINDOW + 3), []
    for sinks in (0, 4):
        model = make_model(attention_sinks=sinks)
        cache = model(tokens[:, :WINDOW]).past_key_values
        found.append(model(tokens[:, WINDOW:], past_key_values=cache).logits)
    assert (found[0] - found[1]).abs().max() > 0.01


@torch.no_grad()
def test_a_large_memory_weighs_as_much_as_a_small_one(make_model: ModelMaker, ids: Draw) -> None:
    """Every token stored four times weighs as once, and no memory below the limit weighs less."""
    once, tokens = ids(40, seed=1), ids(10)
    logits = {}
    limited = {"full_weight_tokens": 40, "newest_full_weight": 0}
    for copies, settings in ((1, {}), (1, limited), (4, limited), (4, {})):
        model = make_model(isolated_windows=True, **settings)
        memory = model.new_memory()
        for _ in range(copies):
            model.ingest(once, memory)
        logits[copies, len(settings)] = model(tokens, memory=memory).logits
    torch.testing.assert_close(logits[1, 2], logits[1, 0], atol=0, rtol=0)
    torch.testing.assert_close(logits[4, 2], logits[1, 0], **CLOSE)
    assert (logits[4, 0] - logits[1, 0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("step", [3, WINDOW, 5 * WINDOW])
def test_many_tokens_at_once_are_read_behind_sinks_and_neighbours(step: int, make_model: ModelMaker, ids: Draw) -> None:
    """A cache that goes on with more than fits: no token is read in an empty window."""
    model, tokens = make_model(), ids(7 * WINDOW)
    cache = model(tokens[:, :10]).past_key_values
    counts: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *args: counts.append(cache.local.counts[0]))
    lengths: list[int] = []
    before = model.model.embed_tokens.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    for part in tokens[:, 10:].split(step, dim=1):
        cache = model(part, past_key_values=cache).past_key_values
    hook.remove()
    before.remove()
    kept = [count - length for count, length in zip(counts, lengths, strict=True)]
    assert min(kept) >= 10  # 4 sinks and 8 neighbours, or the first 10 tokens
    assert max(counts) <= WINDOW


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
def test_kept_keys_are_rotated_to_their_new_positions(sinks: int, make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(overflow_keep=6, attention_sinks=sinks), ids(WINDOW + 1)
    projected: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, args, out: projected.append(out))
    cache = model(tokens[:, :WINDOW]).past_key_values
    hook.remove()
    before = cache.local.layers[1].keys.clone()
    unrotated = projected[0].unflatten(-1, (2, -1)).transpose(1, 2)[:, :, -6:]
    model(tokens[:, WINDOW:], past_key_values=cache)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = model.model.rotary_emb(unrotated, position_ids=torch.arange(sinks, sinks + 6).unsqueeze(0))
    expected, _ = apply_rotary_pos_emb(unrotated, unrotated, cos, sin)
    after = cache.local.layers[1].keys[:, :, sinks : sinks + 6]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert (after - before[:, :, -6:]).abs().max() > 0.1
    assert torch.equal(cache.local.layers[1].keys[:, :, :sinks], before[:, :, :sinks])


@torch.no_grad()
@pytest.mark.parametrize("newest", [0, 8])
def test_rows_of_a_batch_past_the_window_are_as_alone(newest: int, make_model: ModelMaker, ids: Draw) -> None:
    """Rows with padding on both sides, whose memories weigh less by different amounts."""
    model = make_model(full_weight_tokens=10, newest_full_weight=newest)
    rows = [ids(count, seed=count)[0] for count in (70, 41)]
    first = torch.stack([row[:20] for row in rows])
    more, mask = torch.zeros(2, 60, dtype=torch.int64), torch.zeros(2, 60, dtype=torch.int64)
    for number, (row, start) in enumerate(zip(rows, (5, 30), strict=True)):
        more[number, start : start + len(row) - 20], mask[number, start : start + len(row) - 20] = row[20:], 1

    def read(chosen: slice) -> torch.Tensor:
        cache, logits = model(first[chosen]).past_key_values, []
        for part, seen in zip(more[chosen].split(7, dim=1), mask[chosen].split(7, dim=1), strict=True):
            output = model(part, attention_mask=seen, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        assert len({len(row.own) for row in cache.rows}) == len(cache.rows)
        return torch.cat(logits, dim=1)

    together = read(slice(None))
    for number in range(2):
        seen = mask[number].bool()
        alone = read(slice(number, number + 1))
        torch.testing.assert_close(together[number, seen], alone[0, seen], **CLOSE)
