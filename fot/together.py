"""First turns of several conversations with one memory, answered in one batch.

Rows that read a memory exactly go through its keys together for each new token (``fot.attention``). Each row gets the
tokens that it gets alone, and leaves the batch when it has ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from fot.ask import Conversation
from fot.cache import FoTCache
from fot.compat import CACHE
from fot.greedy import alike_padded, end_tokens, one_greedy_answer, without_repetition
from fot.sampling import Scorer
from fot.streamer import OnText, Streamer
from fot.turns import Answer, Prompt


@dataclass
class Turn:
    """A turn to answer greedily.

    Attributes:
        conversation: that it goes on with. All of its prompt is read: the batch does not know what was read before.
        text: what the user says.
        max_new_tokens, on_text, stop, scorer: as for ``Conversation.say``.
        on_answer: called once, with the answer or with what went wrong.
    """

    conversation: Conversation
    text: str
    max_new_tokens: int
    on_text: OnText
    stop: Callable[[], bool]
    scorer: Scorer | None
    on_answer: Callable[[Answer | Exception], None]


def pays(conversation: Conversation) -> bool:
    """Whether turns of conversations with this model and memory are answered faster together, and alike."""
    memory = conversation.memory
    if memory is None or not len(memory) or memory.top_k is not None:
        return False
    choices = [memory[layer].backend for layer in memory.layers]
    return all(choice is not None and choice.name == "exact" for choice in choices) and alike_padded(conversation.model)


@torch.no_grad()
def say_together(turns: Sequence[Turn]) -> None:
    """Answer turns of conversations for which ``pays`` holds, of one model and memory.

    What goes wrong with one turn is told to it alone. Turns without passages read again, or longer than the window, are
    answered after the others, one by one.
    """
    rows, others = list[_Row](), list[Turn]()
    for turn in turns:
        try:
            prompt = turn.conversation.prepare(turn.text, max_new_tokens=turn.max_new_tokens)
        except Exception as error:
            turn.on_answer(error)
            continue
        fits = len(prompt.ids) <= turn.conversation.model.memory_config.window
        if fits and prompt.found is not None:
            rows.append(_Row(turn, prompt))
        else:
            others.append(turn)
    try:
        if rows:
            _answer(rows)
    except Exception as error:
        for row in rows:
            row.fail(error)
    for turn in others:
        try:
            answer = turn.conversation.say(
                turn.text,
                max_new_tokens=turn.max_new_tokens,
                on_text=turn.on_text,
                stop=turn.stop,
                scorer=turn.scorer,
            )
        except Exception as error:
            turn.on_answer(error)
        else:
            turn.on_answer(answer)


class _Row:
    """A turn in the batch."""

    def __init__(self, turn: Turn, prompt: Prompt) -> None:
        self.turn, self.prompt, self.ended = turn, prompt, False
        self.streamer = Streamer(turn.conversation.model.tokenizer, turn.on_text, lambda: None, turn.scorer)
        self.streamer.put(torch.tensor(prompt.ids))  # which it passes over

    def put(self, token: Tensor) -> None:
        """Hand on a new token, a tensor of one."""
        try:
            self.streamer.put(token)
        except Exception as error:
            self.fail(error)

    def end(self, answered: list[int]) -> None:
        """Tell the answer."""
        if self.ended:
            return
        try:
            self.streamer.end()
            answer = self.turn.conversation.conclude(
                self.prompt, answered, self.turn.max_new_tokens, self.streamer.first_token
            )
        except Exception as error:
            self.fail(error)
        else:
            self.ended = True
            self.turn.on_answer(answer)

    def fail(self, error: Exception) -> None:
        """Tell what went wrong, unless the turn has ended."""
        if not self.ended:
            self.ended = True
            self.turn.on_answer(error)


def _answer(rows: list[_Row]) -> None:
    conversation = rows[0].turn.conversation
    model, tokenizer, memory = conversation.model, conversation.model.tokenizer, conversation.memory
    assert memory is not None
    options = one_greedy_answer(model)
    length = max(len(row.prompt.ids) for row in rows)
    short = [length - len(row.prompt.ids) for row in rows]
    ids = torch.tensor([[0] * pad + row.prompt.ids for pad, row in zip(short, rows, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in short], device=model.device)
    cache, stops = FoTCache([memory]), conversation.stop_strings
    strings = StopStringCriteria(tokenizer, stops) if stops else None
    while rows:
        ends = _Ends(rows, length, end_tokens(model), strings)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=length + max(row.turn.max_new_tokens for row in rows) - ids.shape[1],
            streamer=_Streamers(rows),
            stopping_criteria=[ends],
            eos_token_id=end_tokens(model) or None,
            logits_processor=LogitsProcessorList([_Scorers(rows), *without_repetition(model, length)]),
            **options,
            **{CACHE: cache},
        )
        kept = []
        for number, row in enumerate(rows):
            if ends.ended[number]:
                row.end(output[number, length:].tolist())
            else:
                kept.append(number)
        rows, order = [rows[number] for number in kept], torch.tensor(kept, dtype=torch.int64, device=model.device)
        if rows:
            cache.batch_select_indices(order)
            mask = torch.nn.functional.pad(mask, (0, output.shape[1] - mask.shape[1]), value=1)[order]
            ids = output[order]


class _Ends(StoppingCriteria):
    """Ends ``generate`` when a row has ended, so that the others can go on without it.

    Attributes:
        ended: of each row, whether it has.
    """

    def __init__(self, rows: Sequence[_Row], length: int, ends: list[int], strings: StopStringCriteria | None) -> None:
        self._rows, self._length, self._ends, self._strings = rows, length, ends, strings
        self.ended = [False] * len(rows)

    def __call__(self, ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        """(B,) bool, all alike; called after each token with all ids (B, T)."""
        count, last = ids.shape[1] - self._length, ids[:, -1].tolist()
        strings = [False] * len(last) if self._strings is None else self._strings(ids, scores).tolist()
        for number, row in enumerate(self._rows):
            told = row.ended or strings[number] or last[number] in self._ends
            self.ended[number] = told or count >= row.turn.max_new_tokens or row.turn.stop()
        return torch.full(ids.shape[:1], any(self.ended), device=ids.device)


class _Streamers(BaseStreamer):
    """Hands each row its token."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows, self._given = rows, False

    def put(self, value: Tensor) -> None:
        """First all ids that were given, then a token of each row, (B,)."""
        if self._given:
            for row, token in zip(self._rows, value.split(1), strict=True):
                row.put(token)
        self._given = True

    def end(self) -> None:
        """Rows end by themselves."""


class _Scorers(LogitsProcessor):
    """Shows each row's scorer what the model says; changes nothing."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for number, row in enumerate(self._rows):
            if row.turn.scorer is not None:
                row.turn.scorer(input_ids[number : number + 1], scores[number : number + 1])
        return scores
