"""Read tokens or text into a memory, window by window."""

import io
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fot.cache import Row
from fot.files import check_unicode, check_utf8
from fot.inputs import Inputs
from fot.windows import read_isolated, store_window
from memory import Memory

Span = tuple[int, int]

# Windows that read no memory go through the layers together, about this many tokens at once.
ISOLATED_TOKENS = 4096

# So many of a text's windows, those read last, are known again: some 10 MB.
KNOWN_WINDOWS = 1 << 16

# Text is tokenised in pieces of about this many characters, cut behind a line, so that a file streams from disk.
PIECE = 1 << 16
LONGEST_PIECE = 1 << 20
LINE_END = "\n"


@dataclass
class Piece:
    """Some tokens of a source, and how far into it they reach.

    Attributes:
        ids: token ids.
        spans: the characters of each token in the source; None for a source that is not text.
        done: share of the source read with this piece, 0..1; None if the source has no known length.
    """

    ids: list[int]
    spans: list[Span] | None
    done: float | None


@dataclass
class Window:
    """A window of a source.

    Attributes:
        ids: token ids.
        skip: how many of them, from the first, the memory holds already.
        spans: the characters of the others in the source; None for a source that is not text.
        done: share of the source read with this window, 0..1; None if the source has no known length.
    """

    ids: list[int]
    skip: int
    spans: list[Span] | None
    done: float | None


def ingest(
    model: Any,
    ids_or_text: Tensor | Iterable[int] | str | Path,
    memory: Memory,
    source: str | None = None,
    *,
    tokenizer: Any = None,
    progress: bool | tqdm | None = None,
) -> int:
    """Read tokens or text into a memory.

    Windows of ``local_context`` tokens go through the layers up to the last memory layer's keys and values; each
    reads the memory as it was before (not with ``isolated_windows``), then joins it. What is needed meanwhile does
    not grow with the memory. Interrupted, the memory keeps every whole window read so far.

    Args:
        model: a ``FoTForCausalLM``.
        ids_or_text: a ``str`` is text; a ``Path`` is a UTF-8 text file, streamed from disk; anything else yields token
            ids: a tensor (T,) or (1, T), a list, a generator.
        memory: made by this model's ``new_memory``.
        source: name of the document; a file's path by default.
        tokenizer: for text; ``model.tokenizer`` by default.
        progress: show a progress bar (tokens, tokens a second, time left) on stderr; None: only on a terminal; a
            tqdm bar of the caller's: move that one.

    Returns:
        tokens read.

    Raises:
        ValueError: no tokens, ids outside the vocabulary, a file or text that is not UTF-8, a pipe or device, a memory
            of other weights; what can be checked beforehand is, and then nothing is stored.
    """
    if isinstance(ids_or_text, Path):
        check_utf8(ids_or_text)
        size = max(1, ids_or_text.stat().st_size)
        with open(ids_or_text, encoding="utf-8", newline="") as file:
            pieces = text_pieces(file, size, tokenizer or model.tokenizer)
            return ingest_pieces(model, pieces, memory, str(ids_or_text) if source is None else source, progress)
    if isinstance(ids_or_text, str):
        check_unicode(ids_or_text, "the text")
        size = max(1, len(ids_or_text.encode()))
        pieces = text_pieces(io.StringIO(ids_or_text, newline=""), size, tokenizer or model.tokenizer)
    else:
        pieces = id_pieces(model, ids_or_text)
    return ingest_pieces(model, pieces, memory, source, progress)


@torch.no_grad()
def ingest_pieces(
    model: Any,
    pieces: Iterator[Piece],
    memory: Memory,
    source: str | None,
    progress: bool | tqdm | None,
    *,
    stored: int = 0,
    known: dict[bytes, int] | None = None,
) -> int:
    """What ``ingest`` does, of a source in pieces. Whenever a piece is asked for, whole windows are stored.

    Args:
        stored: first tokens of the pieces that the memory holds already, given for their local context alone.
        known: isolated windows that the memory holds; see ``_store_isolated``. None for those of the pieces alone.
    """
    model.check_memory(memory)
    config, count = model.memory_config, 0
    known = {} if known is None else known
    at_once = max(1, ISOLATED_TOKENS // config.window) if config.isolated_windows else 1
    with _bar(source or "ingest", progress) as bar:
        for group in _groups(_windows(pieces, config.window, config.overlap, stored), at_once):
            if config.isolated_windows:
                _store_isolated(model, group, memory, source, known)
            else:
                _store(model, group[0], memory, source)
            new = sum(len(window.ids) - window.skip for window in group)
            count += new
            done = group[-1].done
            if done and bar is not progress:
                bar.total = max(count, round(count / done))
            bar.update(new)
    if count == stored == 0:
        raise ValueError(f"{source or 'the input'} has no tokens; nothing was stored")
    return count


def _store(model: Any, window: Window, memory: Memory, source: str | None) -> None:
    inputs, row = _inputs(model, [window]), Row([], memory)
    store_window(model, inputs, row, hidden_states=False, skip=window.skip, document=source, spans=window.spans)


def _store_isolated(
    model: Any, group: list[Window], memory: Memory, source: str | None, known: dict[bytes, int]
) -> None:
    """Store windows, each in the order of the text; one that was read before is copied from the memory.

    Its keys and values are those of its own tokens alone, so that equal tokens have equal ones.

    Args:
        known: windows by what ``_name`` calls them: the slot of the first token, had all of it been stored. These are
            added, and the oldest leave.
    """
    names = [_name(window) for window in group]
    copied = {name: known[name] for name in names if name in known}
    fresh = {name: window for name, window in zip(names, group, strict=True) if name not in copied}
    local = read_isolated(model, _inputs(model, list(fresh.values()))) if fresh else None
    rows = {name: row for row, name in enumerate(fresh)}
    for name, window in zip(names, group, strict=True):
        end, length = len(memory), len(window.ids)
        if local is not None and name in rows:
            local.move(rows[name], length, memory, skip=window.skip, document=source, spans=window.spans)
        else:
            first = copied[name]
            memory.append_again(first + window.skip, first + length, document=source, spans=window.spans)
        known.pop(name, None)
        known[name] = end - window.skip
        if len(known) > KNOWN_WINDOWS:
            del known[next(iter(known))]


def _name(window: Window) -> bytes:
    """Of its tokens, and of how many of them are not stored: only what was stored of a window can be copied."""
    return blake2b(np.array([window.skip, *window.ids], dtype=np.int64).tobytes(), digest_size=16).digest()


def _inputs(model: Any, windows: list[Window]) -> Inputs:
    ids = torch.tensor([window.ids for window in windows], dtype=torch.int64)
    model.check_ids(ids)
    positions = torch.arange(ids.shape[1], device=model.device).expand_as(ids)
    return Inputs(ids.to(model.device), None, None, positions)


def _bar(name: str, progress: bool | tqdm | None) -> AbstractContextManager[tqdm]:
    if isinstance(progress, tqdm):
        return nullcontext(progress)
    # disable=None lets tqdm decide: no bar where stderr is not a terminal
    return tqdm(desc=name, unit="tok", disable=None if progress is None else not progress)


def _groups(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Up to ``size`` windows of equal length together."""
    group: list[Window] = []
    for window in windows:
        if group and len(window.ids) != len(group[0].ids):
            yield group
            group = []
        group.append(window)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _windows(pieces: Iterator[Piece], window: int, overlap: int, skip: int) -> Iterator[Window]:
    """Windows of ``window`` tokens that begin with the last ``overlap`` tokens of the one before.

    The first ``skip`` tokens of the pieces are stored already.
    """
    ids: list[int] = []
    spans: list[Span] = []
    done: float | None = None
    for piece in pieces:
        ids += piece.ids
        spans += piece.spans or []
        done = piece.done
        start = 0
        while len(ids) - start >= window:
            stop = start + window
            share = None if done is None else done * stop / len(ids) if stop < len(ids) else done
            yield Window(ids[start:stop], skip, spans[start + skip : stop] or None, share)
            start, skip = stop - overlap, overlap
        ids, spans = ids[start:], spans[start:]
    if len(ids) > skip:
        yield Window(ids, skip, spans[skip:] or None, done)


def id_pieces(model: Any, ids: Tensor | Iterable[int]) -> Iterator[Piece]:
    """Token ids in pieces of one window.

    Raises:
        ValueError: a tensor of another shape, or ids outside the vocabulary, before anything is yielded if the ids
            are a tensor or a list.
    """
    if isinstance(ids, Tensor):
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1:
            raise ValueError(f"token ids have shape {tuple(ids.shape)}; one memory takes one row: (tokens,)")
        ids = ids.tolist()
    total = len(ids) if isinstance(ids, list | tuple) else None
    if isinstance(ids, list | tuple) and ids:
        model.check_ids(torch.tensor(ids))
    iterator, count = iter(ids), 0
    while piece := list(islice(iterator, model.memory_config.window)):
        count += len(piece)
        yield Piece(piece, None, None if total is None else count / total)


def text_pieces(file: TextIO, size: int, tokenizer: Any) -> Iterator[Piece]:
    """Tokenise a text as it is read: the pieces together are what the tokenizer makes of the whole text.

    So what it puts in front of a text (BOS) or behind it (EOS) comes once, at the text's own start and end, not at
    those of pieces. Pieces end behind a line where there is one; a tokenizer that merges across lines may cut there
    otherwise than in the whole text.

    Args:
        file: text, read once.
        size: its length in bytes of UTF-8.
        tokenizer: with character offsets if it is a fast one; else spans are not known.

    Raises:
        ValueError: no tokenizer.
    """
    if tokenizer is None:
        raise ValueError(
            "text needs a tokenizer: load the model with FoTForCausalLM.from_pretrained, or pass tokenizer="
        )
    offset = done = 0
    before: list[int] = []
    after: list[int] = []
    texts = _cut_text(file)
    text = next(texts, None)
    while text is not None:
        following = next(texts, None)
        ids, spans = _continue(tokenizer, text, offset) if offset else _encode(tokenizer, text)
        if offset == 0:
            before, after = _added(tokenizer, text, ids)
            ids, spans = before + ids, [(0, 0)] * len(before) + spans
        offset += len(text)
        done += len(text.encode())
        if following is None:
            ids, spans = ids + after, spans + [(offset, offset)] * len(after)
        yield Piece(ids, spans if getattr(tokenizer, "is_fast", False) else None, min(1.0, done / size))
        text = following


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Token ids of a text, nothing added, and the characters of each; none if the tokenizer is a slow one."""
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    return list(encoded["input_ids"]), [(a, b) for a, b in encoded["offset_mapping"]] if fast else []


def _continue(tokenizer: Any, text: str, offset: int) -> tuple[list[int], list[Span]]:
    """Of a text that starts at this offset of a longer one.

    It is read behind a line's end: SentencePiece puts a space in front of what looks like the start of a text.
    """
    end, _ = _encode(tokenizer, LINE_END)
    ids, spans = _encode(tokenizer, LINE_END + text)
    shift = offset - len(LINE_END)
    if ids[: len(end)] == end:
        ids, spans = ids[len(end) :], spans[len(end) :]
    else:  # merged with the line's end
        (ids, spans), shift = _encode(tokenizer, text), offset
    return ids, [(a + shift, b + shift) for a, b in spans]


def _added(tokenizer: Any, text: str, ids: list[int]) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it, given the text's own ids."""
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return whole[:start], whole[start + len(ids) :]
    return [], []  # it makes other tokens of a text with special ones: they are left out


def _cut_text(file: TextIO) -> Iterator[str]:
    rest = ""
    while more := file.read(PIECE):
        rest += more
        cut = rest.rfind("\n") + 1
        if not cut and len(rest) >= LONGEST_PIECE:  # one endless line: cut before its last word
            cut = max(rest.rfind(" "), 0) or len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
