"""Answers of models with memories, in the thread of the model."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList

from fot.ask import Conversation
from fot.chat import Message
from fot.greedy import end_tokens, one_greedy_answer
from fot.sampling import Sampling, Scored, Scorer, score
from fot.serve.library import Entry
from fot.serve.line import Stopped
from fot.serve.stops import StopText
from fot.streamer import Streamer
from fot.trace import Passage

# Conversations that can go on without being read again. Each holds a window, and a memory of what left it.
MOST_CONVERSATIONS = 16


@dataclass
class Reply:
    """One answer.

    Attributes:
        text: of it, up to a stop string.
        finish: ``stop`` or ``length``.
        prompt_tokens: memory and conversation.
        cached_tokens: of those, the ones that were not read now.
        answer_tokens: generated.
        passages: what it was read from.
        scored: its tokens with their probabilities, if they were asked for.
    """

    text: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    passages: list[Passage] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)


class Conversations:
    """Conversations by what was said in them, so that a client's next request goes on where the last one ended."""

    def __init__(self, most: int = MOST_CONVERSATIONS) -> None:
        self._most = most
        self._known: OrderedDict[tuple[str, ...], Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def take(self, entry: Entry, history: Sequence[Message]) -> Conversation:
        """The conversation that has this history, or whose last answer is to be given anew; else a new one."""
        key = _key(entry, history)
        for known, conversation in list(self._known.items()):
            if known[0] == entry.name and conversation.memory is not entry.memory:  # as it was before it changed
                del self._known[known]
        if history:
            for known in reversed(self._known):
                if known == key or known[:-2] == key:
                    conversation = self._known.pop(known)
                    if known != key:
                        conversation.take_back()
                    return conversation
        conversation = entry.blank.anew()
        conversation.go_back_to(history)
        return conversation

    def keep(self, entry: Entry, history: Sequence[Message], conversation: Conversation) -> None:
        """Keep a conversation that has this history now; the one that was used longest ago goes, if there are many."""
        self._known[_key(entry, history)] = conversation
        while len(self._known) > self._most:
            self._known.popitem(last=False)


def _key(entry: Entry, history: Sequence[Message]) -> tuple[str, ...]:
    """Clients give answers back as they show them: white space at the ends does not count."""
    return (entry.name, *(f"{turn['role']}:{turn['content'].strip()}" for turn in history))


def chat(
    entry: Entry,
    conversations: Conversations,
    turns: Sequence[Message],
    *,
    max_tokens: int,
    stops: Sequence[str],
    samplings: Sequence[Sampling],
    top_logprobs: int | None,
    on_text: Callable[[int, str, list[Scored]], None],
    stopped: Stopped,
) -> list[Reply]:
    """Answer the last turn of a conversation, as many times as there are samplings.

    Args:
        entry: which memory.
        conversations: the known ones; the answered one joins them, unless a stop string ended it.
        turns: of the conversation; the last is the user's.
        max_tokens: in an answer.
        stops: strings that end an answer.
        samplings: of each answer.
        top_logprobs: likeliest tokens noted for each token; None notes no probabilities.
        on_text: called with the answer's number, each piece of its text, and the tokens scored since the last piece.
        stopped: whether to stop.

    Raises:
        ValueError: the last turn is empty or longer than the window.
    """
    history, question = list(turns[:-1]), turns[-1]["content"]
    conversation = conversations.take(entry, history)
    replies: list[Reply] = []
    for number, sampling in enumerate(samplings):
        if replies:
            conversation.take_back()
        scorer = None if top_logprobs is None else Scorer(top_logprobs)
        hand_on = _Numbered(number, scorer, on_text)
        text = StopText(stops, hand_on, strip=True)
        answer = conversation.say(
            question,
            max_new_tokens=max_tokens,
            on_text=text.feed,
            stop=lambda text=text: text.stopped or stopped(),  # type: ignore[misc]
            sampling=sampling,
            scorer=scorer,
        )
        text.finish()
        hand_on.rest()
        known = entry.tokens + answer.known_tokens
        replies.append(
            Reply(
                text.text,
                "stop" if answer.ended or text.stopped else "length",
                known + answer.prompt_tokens,
                known,
                answer.answer_tokens,
                answer.passages,
                scorer.scored if scorer else [],
            )
        )
        if stopped():
            break
    if not text.stopped:  # else the conversation holds the stop string, which the client does not see
        said = {"role": "assistant", "content": replies[-1].text}
        conversations.keep(entry, [*turns, said], conversation)
    return replies


class _Numbered:
    """Hands on pieces of one of several answers, with the tokens that were scored since the last."""

    def __init__(self, number: int, scorer: Scorer | None, on_text: Callable[[int, str, list[Scored]], None]) -> None:
        self._number, self._scorer, self._on_text = number, scorer, on_text
        self._done = 0

    def __call__(self, text: str) -> None:
        scored = self._scorer.scored[self._done :] if self._scorer else []
        self._done += len(scored)
        self._on_text(self._number, text, scored)

    def rest(self) -> None:
        """Hand on tokens without text."""
        if self._scorer and len(self._scorer.scored) > self._done:
            self("")


@torch.no_grad()
def complete(
    entry: Entry,
    prompt: str | list[int],
    *,
    max_tokens: int,
    stops: Sequence[str],
    sampling: Sampling,
    top_logprobs: int | None,
    on_text: Callable[[str, list[Scored]], None],
    stopped: Stopped,
) -> Reply:
    """Go on from a text with a memory; no chat template, no passages read again.

    Args:
        entry: which memory.
        prompt: text or token ids.
        max_tokens: as for ``chat``, as are the others; 0 generates nothing.

    Raises:
        ValueError: the prompt is empty, or has ids outside the vocabulary.
    """
    model = entry.model
    ids = list(model.tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
    model.check_ids(torch.tensor(ids))
    if not max_tokens:
        return Reply("", "length", entry.tokens + len(ids), entry.tokens, 0)
    scorer = None if top_logprobs is None else Scorer(top_logprobs)
    hand_on = _Numbered(0, scorer, lambda number, text, scored: on_text(text, scored))
    text = StopText(stops, hand_on)
    given = torch.tensor([ids], device=model.device)
    with sampling.seeded():
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            memory=entry.memory,
            max_new_tokens=max_tokens,
            streamer=Streamer(model.tokenizer, text.feed, lambda: None, scorer),
            stopping_criteria=[
                lambda ids, scores, **_: torch.full(ids.shape[:1], text.stopped or stopped(), device=ids.device)
            ],
            logits_processor=LogitsProcessorList([scorer] if scorer else []),
            eos_token_id=end_tokens(model) or None,
            **(one_greedy_answer(model) | sampling.options()),
        )
    text.finish()
    hand_on.rest()
    count = output.shape[1] - len(ids)
    ended = count < max_tokens or int(output[0, -1]) in end_tokens(model) or text.stopped
    scored = scorer.scored if scorer else []
    return Reply(text.text, "stop" if ended else "length", entry.tokens + len(ids), entry.tokens, count, scored=scored)


@torch.no_grad()
def score_prompt(entry: Entry, prompt: str | list[int], top_logprobs: int) -> list[Scored | int]:
    """The tokens of a prompt with their probabilities; the first, which nothing precedes, as its id alone."""
    model = entry.model
    ids = list(model.tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
    logits = model(torch.tensor([ids], device=model.device), memory=entry.memory, use_cache=False).logits[0].float()
    return [ids[0], *(score(logits[place], token, top_logprobs) for place, token in enumerate(ids[1:]))]
