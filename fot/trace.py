"""Record which memory slots the queries of a model attended to, with scores.

    trace = fot.trace.trace(model, "Who is the vicar of Highbury?", memory)
    pandas.DataFrame(trace.to_records())

``record`` does the same for any generation of one prompt, and does not change it::

    with record(model) as recorder:
        output = model.generate(ids, memory=memory)
    recorder.passages(5)

While the model runs, only its queries are kept (some kilobytes for each token). Their hits are searched for at the end,
all at once, or earlier if the memory is about to grow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fot.cache import FoTCache, LocalCache
from fot.chat import has_template, prompt_ids
from fot.greedy import one_greedy_answer
from fot.inspection.measure import find_hits, retrieved_masses, slot_masses
from fot.inspection.passages import Passage
from fot.inspection.result import Found, Token, Trace
from fot.inspection.strip import Strip
from fot.inspection.texts import token_texts
from fot.recording import recording
from memory import Memory
from memory.index import DEFAULT_TOP_K

__all__ = ["Passage", "Recorder", "Trace", "record", "trace"]


def trace(
    model: Any,
    prompt: str | Tensor,
    memory: Memory | None = None,
    *,
    max_new_tokens: int = 32,
    top: int = 32,
    chat: bool = False,
    **options: Any,
) -> Trace:
    """Generate an answer, and record what every token of the local window attended to, in every layer and head.

    Args:
        model: a ``FoTForCausalLM``.
        prompt: text, or token ids (T,) or (1, T).
        memory: made by this model; it does not change.
        max_new_tokens: most tokens in the answer.
        top: number of slots kept for each token, layer and head, 1..128.
        chat: whether to put the text into the tokenizer's chat template.
        options: further options of ``generate``. Decoding is greedy by default. Beams and several samples are refused.

    Raises:
        ValueError: The prompt is empty, it is a text and the model has no tokenizer, the options ask for several
            sequences, or other weights made the memory.
    """
    ids = _prompt_ids(model, prompt, chat).to(model.device)
    with record(model, top=top, prompt=True, every_slot=True) as recorder:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            memory=memory,
            max_new_tokens=max_new_tokens,
            **(one_greedy_answer(model) | options),
        )
    return recorder.trace(getattr(output, "sequences", output), ids.shape[1])


@contextmanager
def record(model: Any, *, top: int = 32, prompt: bool = False, every_slot: bool = False) -> Iterator["Recorder"]:
    """Record what memory layers attend to, in each ``forward`` and ``generate`` of one sequence in the block.

    Only this thread is recorded. To record a thread that you start in the block, run it in
    ``contextvars.copy_context()``.

    Args:
        model: a ``FoTForCausalLM``.
        top: number of slots kept for each token, layer and head, 1..128.
        prompt: whether to record every prompt token of the local window. Otherwise only those tokens are recorded
            after which the model chose the next one.
        every_slot: whether to compute the attention by position and by document from every slot, if the backend
            attends to all of them. This reads the keys once more. Otherwise it is computed from the ``top`` hits.

    Raises:
        ValueError: ``top`` is out of range.
    """
    if not 1 <= top <= DEFAULT_TOP_K:
        raise ValueError(
            f"top is {top}; it must be 1..{DEFAULT_TOP_K}, because approximate backends retrieve "
            f"{DEFAULT_TOP_K} by default"
        )
    recorder = Recorder(model, top=top, prompt=prompt, every_slot=every_slot)
    try:
        with recording(model, recorder):
            yield recorder
        recorder.settle()
    finally:
        recorder.leave()


@dataclass(frozen=True)
class _Note:
    """Queries of one layer: (H, T, D), log-sum-exps (H, T), their positions (T,), and which chose the next token."""

    queries: Tensor
    local_lse: Tensor
    memory_lse: Tensor
    positions: Tensor
    chose: Tensor
    scale: float


class Recorder:
    """What ``record`` gives: takes note of the queries of the last sequence, and finds out what they attended to."""

    def __init__(self, model: Any, *, top: int, prompt: bool, every_slot: bool) -> None:
        self._layers: tuple[int, ...] = model.memory_config.layers
        self._tokenizer = model.tokenizer
        self._top, self._prompt, self._every_slot = top, prompt, every_slot
        self._cache: FoTCache | None = None
        self._pending: dict[int, list[_Note]]
        self._found: list[Found]
        self._strips: list[Strip]
        self._complete: bool
        self._forget()

    def follow(self, cache: FoTCache) -> None:
        """Called before each ``forward``. A new cache is a new sequence; the one before is forgotten."""
        if cache is not self._cache:
            self._cache = cache
            self._forget()

    def leave(self) -> None:
        """Take note of nothing more."""
        if self._cache is not None and self._cache.recorder is self:
            self._cache.watch(None)

    def note(self, layer: int, queries: Tensor, lses: list[Tensor], local: LocalCache, scale: float) -> None:
        """Called by the attention of each memory layer.

        Args:
            layer: its index.
            queries: (B, H, T, D), rotated.
            lses: (B, H, T) log-sum-exp of the local part, then of the memory part if there is one.
            local: the window, whose last T tokens ask.
            scale: factor on inner products.

        Raises:
            ValueError: B is not 1.
        """
        if queries.shape[0] != 1:
            raise ValueError(
                f"the model runs {queries.shape[0]} sequences at once, but only one can be recorded: use "
                "no beams and a single sample"
            )
        assert local.positions is not None
        count = queries.shape[2]
        chose = torch.zeros(count, dtype=torch.bool)
        chose[-1] = local.is_last
        kept = torch.arange(count) if self._prompt else chose.nonzero().flatten()
        if local.mask is not None:
            kept = kept[local.mask[0, -count:].cpu()[kept]]
        if not len(kept):
            return
        chose, kept = chose[kept], kept.to(queries.device)
        nothing = torch.full_like(lses[0], -torch.inf)
        local_lse, memory_lse = lses[0], lses[1] if len(lses) > 1 else nothing
        self._pending[layer].append(
            _Note(
                queries[0].detach()[:, kept],
                local_lse[0].detach()[:, kept],
                memory_lse[0].detach()[:, kept],
                local.positions[0, -count:].to(queries.device)[kept],
                chose.to(queries.device),
                scale,
            )
        )

    def settle(self) -> None:
        """Search for what was noted. Called before a memory grows: later slots must not be found."""
        # An interrupt may have come between two layers.
        count = min((len(notes) for notes in self._pending.values()), default=0)
        if self._cache is None or not count:
            return
        memories = self._cache.rows[0].memories
        self._strips = self._strips or [Strip(len(self._layers)) for _ in memories]
        for strip, memory in zip(self._strips, memories, strict=True):
            strip.fit(len(memory))
        by_layer = [
            self._settle_layer(number, layer, memories, self._pending[layer][:count])
            for number, layer in enumerate(self._layers)
        ]
        self._pending = {layer: [] for layer in self._layers}
        self._found.append(Found.stack(by_layer))

    def passages(self, count: int) -> list[Passage]:
        """What carried most attention mass while tokens were chosen, over all memory layers and heads, most first."""
        return self._trace([]).passages(count)

    def trace(self, sequence: Tensor, prompt_length: int) -> Trace:
        """Everything recorded.

        Args:
            sequence: (T,) or (1, T) ids of prompt and answer, as ``generate`` returned them.
            prompt_length: how many of them are the prompt.
        """
        ids = sequence.reshape(-1).tolist()
        texts = token_texts(self._tokenizer, ids)
        pairs = enumerate(zip(ids, texts, strict=True))
        return self._trace([Token(number, text, place >= prompt_length) for place, (number, text) in pairs])

    def _trace(self, tokens: list[Token]) -> Trace:
        self.settle()
        if not self._found:
            raise ValueError(
                "nothing was recorded: call the model's generate or forward inside the block of record(model)"
            )
        assert self._cache is not None
        memories = self._cache.rows[0].memories
        own = None if self._cache.write else len(memories) - 1
        found = Found.join(self._found)
        return Trace(tokens, self._layers, found, memories, own, self._strips, self._complete, self._tokenizer)

    def _forget(self) -> None:
        self._pending = {layer: [] for layer in self._layers}
        self._found, self._strips, self._complete = [], [], self._every_slot

    def _settle_layer(self, number: int, layer: int, memories: list[Memory], notes: list[_Note]) -> Found:
        """Hits of one layer; ``number`` counts memory layers from 0."""
        queries = torch.cat([note.queries for note in notes], dim=1)  # (H, T, D)
        local_lse = torch.cat([note.local_lse for note in notes], dim=1)
        memory_lse = torch.cat([note.memory_lse for note in notes], dim=1)
        chose = torch.cat([note.chose for note in notes])
        lse, scale = torch.logaddexp(local_lse, memory_lse), notes[0].scale
        hits = find_hits(memories, layer, queries, memory_lse, lse, scale=scale, top=self._top)
        for which, memory in enumerate(memories):
            if len(memory) and self._every_slot:
                self._add_masses(which, number, layer, memory, queries[:, chose], lse[:, chose], scale)
            elif len(memory):
                mine = (hits.memory == which) & chose.cpu()[:, None]
                masses = hits.share[mine].double()
                self._strips[which].add(number, hits.slot[mine].numpy(), masses.numpy(), memory.document_runs())
        positions = torch.cat([note.positions for note in notes])
        return Found.of_layer(positions, chose, hits, (local_lse - lse).exp())

    def _add_masses(
        self, which: int, number: int, layer: int, memory: Memory, queries: Tensor, lse: Tensor, scale: float
    ) -> None:
        """Attention by position, from every slot if the backend attends to all, else from what it retrieves."""
        strip, runs = self._strips[which], memory.document_runs()
        if memory[layer].attends_to_all:
            for start, masses in slot_masses(memory, layer, queries, lse, scale=scale):
                strip.add(number, np.arange(start, start + len(masses)), masses.numpy(), runs)
        else:
            self._complete = False
            slots, masses = retrieved_masses(memory, layer, queries, lse, scale=scale)
            strip.add(number, slots.numpy(), masses.numpy(), runs)


def _prompt_ids(model: Any, prompt: str | Tensor, chat: bool) -> Tensor:
    """(1, T) ids of a prompt."""
    if isinstance(prompt, Tensor):
        return prompt.reshape(1, -1)
    if model.tokenizer is None:
        raise ValueError("a text prompt needs model.tokenizer: load the model with FoTForCausalLM.from_pretrained")
    if chat:
        if not has_template(model.tokenizer):
            raise ValueError("this model's tokenizer has no chat template: omit chat (--chat)")
        return torch.tensor([prompt_ids(model.tokenizer, [{"role": "user", "content": prompt}])])
    return model.tokenizer(prompt, return_tensors="pt").input_ids
