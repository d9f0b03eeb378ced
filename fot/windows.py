"""An input of any length, window by window: first what goes to the memory, then the local window."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from fot.attention import CONTEXT
from fot.cache import FoTCache, Row
from fot.compat import CACHE
from fot.config import check_memory_layers
from fot.families import decoder_of, layers_of
from fot.inputs import Inputs
from fot.local import LocalCache, WindowStored, local_window
from memory import Memory

SINGLE_WINDOW_OPTIONS = ("output_hidden_states", "output_attentions")


def read(
    model: Any,
    inputs: Inputs,
    cache: FoTCache,
    keep: int,
    *,
    candidates: int = 0,
    last_context_length: int | None = None,
    options: dict[str, Any],
) -> BaseModelOutputWithPast:
    """New tokens of a cache, the first ones or more.

    Args:
        model: a ``FoTForCausalLM``.
        inputs: any length.
        cache: its rows open.
        keep: hidden states wanted, counted from the end; 1..T.
        candidates: how many of the first tokens, counted from the end, are no prompt but guesses at what comes after
            it (assisted decoding). They are read as generated tokens are, and do not move with the prompt.
        last_context_length: overrides the setting of this name.
        options: passed to the decoder; needs an input that fits one window.

    Returns:
        ``last_hidden_state`` (B, keep, hidden_size), zero at padding; ``hidden_states`` and ``attentions`` if asked.
    """
    if cache.seen:
        return extend(model, inputs, cache, keep, options)
    stays = last_context_length is None and model.memory_config.local_length(inputs.length) == inputs.length
    if stays or not 0 < candidates < inputs.length:
        return prefill(model, inputs, cache, keep, last_context_length, options)
    _refuse_single_window_options(model, options)
    prompt, guesses = slice(0, inputs.length - candidates), slice(inputs.length - candidates, None)
    first = prefill(model, inputs.columns(prompt), cache, max(1, keep - candidates), last_context_length, options)
    outputs = extend(model, inputs.columns(guesses), cache, candidates, options)
    outputs.last_hidden_state = torch.cat([first.last_hidden_state, outputs.last_hidden_state], dim=1)[:, -keep:]
    return outputs


def prefill(
    model: Any, inputs: Inputs, cache: FoTCache, keep: int, last_context_length: int | None, options: dict[str, Any]
) -> BaseModelOutputWithPast:
    """The first tokens of a cache: all but the local part of each row goes to its memory.

    Args and returns as ``read``.
    """
    columns = [inputs.real_columns(row) for row in range(inputs.batch_size)]
    local_lengths = [_local_length(model, inputs, cache, real, last_context_length) for real in columns]
    stored = [len(real) - local for real, local in zip(columns, local_lengths, strict=True)]
    if any(stored):
        _refuse_single_window_options(model, options)
    if any(stored) or any(len(memory) for row in cache.rows for memory in row.memories):
        _refuse_checkpointing(model)
    pieces = []  # (row, columns, hidden states)
    first_kept = inputs.length - keep
    for group in _equal_rows(inputs, cache, columns, stored, first_kept):
        row = group[0]
        real = columns[row][: stored[row]]
        for begin, start, stop in _window_bounds(model, cache, columns[row], stored[row]):
            window, skip = inputs.pick(slice(row, row + 1), real[begin:stop], None), start - begin
            wanted = int(real[stop - 1]) >= first_kept
            hidden = store_window(model, window, cache.rows[row], hidden_states=wanted, skip=skip)
            if hidden is not None:
                pieces.append((row, real[start:stop], hidden[0, skip:]))
        if len(group) > 1:
            shared, empty = cache.rows[row].memories, cache.rows[group[1]].own
            for member in group:
                cache.rows[member] = Row(shared, empty.clone())
    cache.open_window()
    outputs = _local_prefill(model, inputs, cache, columns, local_lengths, pieces, keep, options)
    cache.advance(inputs.length, inputs.positions)
    return outputs


def extend(model: Any, inputs: Inputs, cache: FoTCache, keep: int, options: dict[str, Any]) -> BaseModelOutputWithPast:
    """More tokens of a cache. When they outgrow the window, its oldest tokens move to the memory first.

    Args and returns as ``read``.
    """
    _refuse_checkpointing(model)
    start, size = 0, _piece_length(model, cache, inputs.length)
    hidden = []
    outputs = None
    while start < inputs.length:
        if cache.revertible:  # as if the tokens came one by one, so that any of them can be taken back
            _make_room(model, cache, 1)
            size = model.memory_config.window - max(cache.local.counts)
        piece = inputs.columns(slice(start, start + size))
        if piece.length < inputs.length:
            _refuse_single_window_options(model, options)
        _make_room(model, cache, piece.length)
        start += piece.length
        cache.local.is_last = start == inputs.length
        outputs = run_window(model, piece, cache.local, options)
        cache.advance(piece.length, piece.positions)
        hidden.append(outputs.last_hidden_state)
    assert outputs is not None
    outputs.last_hidden_state = torch.cat(hidden, dim=1)[:, -keep:]
    return outputs


def run_window(model: Any, inputs: Inputs, local: LocalCache, options: dict[str, Any]) -> BaseModelOutputWithPast:
    """All layers on tokens that fit the local window; the window keeps their keys and values."""
    positions = local.extend(inputs.ids, inputs.positions, inputs.mask)
    given = {"input_ids": inputs.ids} if inputs.embeds is None else {"inputs_embeds": inputs.embeds}
    mask = None if local.mask is None else local.mask.long()
    return decoder_of(model)(
        **given,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **{CACHE: local, CONTEXT: local},
        **options,
    )


def store_window(
    model: Any,
    inputs: Inputs,
    row: Row,
    *,
    hidden_states: bool,
    skip: int = 0,
    document: str | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> Tensor | None:
    """Read one window of one row, then store it in the row's own memory.

    Hidden states always come from a window that read the memory; what is stored does not with ``isolated_windows``.

    Args:
        model: a ``FoTForCausalLM``.
        inputs: one row, no padding, at most a window long.
        row: what is read, and what is written to.
        hidden_states: run all layers and return their last hidden states (1, T, hidden_size). Otherwise nothing
            above the keys and values of the last memory layer is computed.
        skip: first tokens that are stored already.
        document: name of the text, for the memory.
        spans: the characters in it of each token that is stored.
    """
    config, hidden = model.memory_config, None
    check_memory_layers(config)
    local = local_window(model, [row.memories])
    if hidden_states:
        hidden = run_window(model, inputs, local, {}).last_hidden_state
    if config.isolated_windows:
        store_isolated(model, inputs, row.own, skips=[skip], document=document, spans=[spans])
    else:
        if hidden is None:
            fill_window(model, inputs, local)
        local.move(0, inputs.length, row.own, skip=skip, document=document, spans=spans)
    return hidden


def store_isolated(
    model: Any,
    inputs: Inputs,
    memory: Memory,
    *,
    skips: Sequence[int],
    document: str | None = None,
    spans: Sequence[Sequence[tuple[int, int]] | None],
) -> None:
    """Store several windows of one text at once, which read no memory (``isolated_windows``).

    Args:
        model: a ``FoTForCausalLM``.
        inputs: a window a row, in the order of the text, no padding.
        memory: what is written to.
        skips: for each window, first tokens that are stored already.
        document: name of the text.
        spans: for each window, the characters in the text of each token that is stored; None where they are not known.
    """
    local = read_isolated(model, inputs)
    for row, (skip, characters) in enumerate(zip(skips, spans, strict=True)):
        local.move(row, inputs.length, memory, skip=skip, document=document, spans=characters)


def read_isolated(model: Any, inputs: Inputs) -> LocalCache:
    """Windows, a row each, no padding, as they are to be stored: they read no memory (``isolated_windows``)."""
    check_memory_layers(model.memory_config)
    local = local_window(model, [[]] * inputs.batch_size)
    fill_window(model, inputs, local)
    return local


def fill_window(model: Any, inputs: Inputs, local: LocalCache) -> None:
    """The layers below the last memory layer, and that layer's keys and values; nothing above them."""
    local.ends_at = model.memory_config.layers[-1]
    with suppress(WindowStored):
        run_window(model, inputs, local, {})


def _local_prefill(
    model: Any,
    inputs: Inputs,
    cache: FoTCache,
    columns: list[Tensor],
    local_lengths: list[int],
    pieces: list[tuple[int, Tensor, Tensor]],
    keep: int,
    options: dict[str, Any],
) -> BaseModelOutputWithPast:
    """The local part of every row at once, padded on the left; hidden states put where their tokens are."""
    if min(local_lengths) == inputs.length:
        outputs = run_window(model, inputs.pick(slice(None), slice(None), None), cache.local, options)
        outputs.last_hidden_state = outputs.last_hidden_state[:, -keep:]
        return outputs
    width, device = max(local_lengths), inputs.ids.device
    where = torch.zeros(inputs.batch_size, width, dtype=torch.int64, device=device)
    mask = torch.zeros(inputs.batch_size, width, dtype=torch.bool, device=device)
    for row, (real, count) in enumerate(zip(columns, local_lengths, strict=True)):
        if count:
            where[row, -count:] = real[-count:]
            mask[row, -count:] = True
    rows = torch.arange(inputs.batch_size, device=device).unsqueeze(1)
    uniform = min(local_lengths) == width
    outputs = run_window(model, inputs.pick(rows, where, None if uniform else mask), cache.local, options)
    last = outputs.last_hidden_state
    for row, count in enumerate(local_lengths):
        if count:
            pieces.append((row, columns[row][-count:], last[row, -count:]))
    first_kept = inputs.length - keep
    hidden = last.new_zeros(inputs.batch_size, keep, last.shape[-1])
    for row, real, states in pieces:
        wanted = real >= first_kept
        hidden[row, real[wanted] - first_kept] = states.to(last.device)[wanted.to(last.device)]
    outputs.last_hidden_state = hidden
    return outputs


def _piece_length(model: Any, cache: FoTCache, num_tokens: int) -> int:
    """How many of ``num_tokens`` new tokens go through the layers at once: all if they fit beside what is local.

    Otherwise as many as leave room for what is kept when the window overflows, so that none is read without it.
    """
    config = model.memory_config
    if max(cache.local.counts, default=0) + num_tokens <= config.window:
        return num_tokens
    return config.window - config.kept_sinks - config.kept_tokens


def _make_room(model: Any, cache: FoTCache, num_tokens: int) -> None:
    """Move the oldest tokens of rows whose window would overflow; their sinks stay, too."""
    config, local = model.memory_config, cache.local
    if all(count + num_tokens <= config.window for count in local.counts):
        return
    check_memory_layers(config)
    cache.before_move()
    kept, sinks = [], []
    for number, (row, count) in enumerate(zip(cache.rows, local.counts, strict=True)):
        slots = local.slots(number)
        if count + num_tokens > config.window:
            newest = min(config.kept_tokens, count - local.sinks[number])
            local.move(number, count - local.sinks[number] - newest, row.own)
            sinks.append(min(config.kept_sinks, count - newest))
            kept.append(torch.cat([slots[: sinks[-1]], slots[count - newest :]]))
        else:
            sinks.append(local.sinks[number])
            kept.append(slots)
    local.keep_slots(kept, sinks)


def _local_length(model: Any, inputs: Inputs, cache: FoTCache, real: Tensor, last_context_length: int | None) -> int:
    """How many of a row's last tokens stay local."""
    config = model.memory_config
    if last_context_length is not None:
        if not 1 <= last_context_length <= config.window:
            raise ValueError(f"last_context_length is {last_context_length}; it must be 1..{config.window}, the window")
        wanted = last_context_length
    elif cache.aligned:
        wanted = config.local_length(inputs.length)
    else:
        return config.local_length(len(real))
    if cache.aligned:
        return int((real >= inputs.length - wanted).sum())
    return min(len(real), wanted)


def _window_bounds(model: Any, cache: FoTCache, real: Tensor, stored: int) -> list[tuple[int, int, int]]:
    """Windows over the first ``stored`` tokens of a row, in its own count: (first token, first new token, end).

    As in ``fot.ingest``, a window starts with the last ``window_overlap`` tokens of the one before.
    """
    if not stored:
        return []
    window, overlap = model.memory_config.window, model.memory_config.overlap
    first = window - int(real[0]) % window if cache.aligned else window
    starts = [0, *range(first, stored, window - overlap)]
    return [(max(0, start - overlap), start, stop) for start, stop in zip(starts, [*starts[1:], stored], strict=True)]


def _equal_rows(
    inputs: Inputs, cache: FoTCache, columns: list[Tensor], stored: list[int], first_kept: int
) -> list[list[int]]:
    """Rows that would store the same in the same memories (beams, several samples of a prompt): read once."""
    groups: list[list[int]] = []
    for row in range(inputs.batch_size):
        shareable = not cache.write and inputs.embeds is None and stored[row] > 0
        # A row whose stored windows' hidden states are wanted must run itself.
        shareable = shareable and int(columns[row][stored[row] - 1]) < first_kept
        for group in groups if shareable else ():
            other = group[0]
            if (
                stored[other] == stored[row]
                and cache.rows[other].reads == cache.rows[row].reads
                and torch.equal(columns[other], columns[row])
                and torch.equal(inputs.ids[other], inputs.ids[row])
                and torch.equal(inputs.positions[other], inputs.positions[row])
            ):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _refuse_single_window_options(model: Any, options: dict[str, Any]) -> None:
    for name in SINGLE_WINDOW_OPTIONS:
        if options.get(name):
            raise ValueError(
                f"{name} is kept within one window of {model.memory_config.window} tokens; this input is longer"
            )


def _refuse_checkpointing(model: Any) -> None:
    # Checkpointed layers are called without a cache, and it is the cache that brings them the memory.
    if model.training and getattr(layers_of(decoder_of(model))[0], "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing hides the memory from its layers: call model.gradient_checkpointing_disable(), or "
            "give inputs that fit one window"
        )
