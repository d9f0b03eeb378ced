"""Answers of models with memories, in the thread of the model."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList

from fot.ask import Conversation
from fot.chat import Message
from fot.greedy import end_tokens, one_greedy_answer
from fot.sampling import GREEDY, Sampling, Scored, Scorer, score
from fot.serve.library import Entry
from fot.serve.line import Joint, Stopped, Tell
from fot.serve.stops import StopText
from fot.streamer import Streamer
from fot.together import Turn, pays, say_together
from fot.trace import Passage
from fot.turns import Answer

# Conversations that can go on without being read again. Each holds a window, and a memory of what left it.
MOST_CONVERSATIONS = 16

# Takes the number of an answer, a piece of its text, and the tokens scored since the last piece.
OnScoredText = Callable[[int, str, list[Scored]], None]


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


@dataclass(frozen=True)
class Chat(Joint[list[Reply]]):
    """Answers the last turn of a conversation, as many times as there are samplings.

    First questions about one memory, to be answered greedily, can be answered together. Drawn answers can't: a seed is
    to give in a batch what it gives alone.

    Attributes:
        entry: which memory.
        conversations: the known ones; the answered one joins them, unless a stop string ended it.
        turns: of the conversation; the last is the user's.
        max_tokens: in an answer.
        stops: strings that end an answer.
        samplings: of each answer.
        top_logprobs: likeliest tokens noted for each token; None notes no probabilities.
        on_text: called with the answer's number, each piece of its text, and the tokens scored since the last piece.
    """

    entry: Entry
    conversations: Conversations
    turns: Sequence[Message]
    max_tokens: int
    stops: Sequence[str] = ()
    samplings: Sequence[Sampling] = (GREEDY,)
    top_logprobs: int | None = None
    on_text: OnScoredText = lambda number, text, scored: None

    @property
    def key(self) -> Hashable | None:
        """The memory, if the question can be answered with others about it."""
        greedy = len(self.samplings) == 1 and self.samplings[0].temperature == 0
        first = all(turn["role"] != "assistant" for turn in self.turns)
        return id(self.entry) if greedy and first and pays(self.entry.blank) else None

    def __call__(self, stopped: Stopped) -> list[Reply]:
        """Answer it alone.

        Raises:
            ValueError: the last turn is empty or longer than the window.
        """
        conversation = self.conversations.take(self.entry, self.turns[:-1])
        replies: list[Reply] = []
        for number, sampling in enumerate(self.samplings):
            if replies:
                conversation.take_back()
            listener = self._listener(number)
            answer = conversation.say(
                self.turns[-1]["content"],
                max_new_tokens=self.max_tokens,
                on_text=listener.text.feed,
                stop=lambda listener=listener: listener.text.stopped or stopped(),  # type: ignore[misc]
                sampling=sampling,
                scorer=listener.scorer,
            )
            replies.append(self._reply(listener, answer))
            if stopped():
                break
        self._keep(listener, conversation)
        return replies

    @classmethod
    def together(cls, jobs: Sequence[tuple["Chat", Stopped, Tell]]) -> None:
        """Answer several, each told of as soon as its answer has ended."""
        say_together([chat._turn(stopped, tell) for chat, stopped, tell in jobs])

    def _turn(self, stopped: Stopped, tell: Tell) -> Turn:
        conversation, listener = self.conversations.take(self.entry, self.turns[:-1]), self._listener(0)

        def on_answer(answer: Answer | Exception) -> None:
            if isinstance(answer, Exception):
                tell(answer)
                return
            reply = self._reply(listener, answer)
            self._keep(listener, conversation)
            tell([reply])

        return Turn(
            conversation,
            self.turns[-1]["content"],
            self.max_tokens,
            listener.text.feed,
            lambda: listener.text.stopped or stopped(),
            listener.scorer,
            on_answer,
        )

    def _listener(self, number: int) -> "_Listener":
        return _Listener(number, self.stops, self.top_logprobs, self.on_text, strip=True)

    def _reply(self, listener: "_Listener", answer: Answer) -> Reply:
        listener.finish()
        known = self.entry.tokens + answer.known_tokens
        return Reply(
            listener.text.text,
            "stop" if answer.ended or listener.text.stopped else "length",
            known + answer.prompt_tokens,
            known,
            answer.answer_tokens,
            answer.passages,
            listener.scored,
        )

    def _keep(self, listener: "_Listener", conversation: Conversation) -> None:
        if not listener.text.stopped:  # else the conversation holds the stop string, which the client does not see
            said = {"role": "assistant", "content": listener.text.text}
            self.conversations.keep(self.entry, [*self.turns, said], conversation)


class _Listener:
    """Takes an answer as it comes, up to a stop string, and hands it on with the tokens scored since the last piece.

    Attributes:
        text: so far.
        scorer: for ``generate``; None if no probabilities are wanted.
    """

    def __init__(
        self,
        number: int,
        stops: Sequence[str],
        top_logprobs: int | None,
        on_text: OnScoredText,
        *,
        strip: bool = False,
    ) -> None:
        self._number, self._on_text, self._done = number, on_text, 0
        self.scorer = None if top_logprobs is None else Scorer(top_logprobs)
        self.text = StopText(stops, self._hand_on, strip=strip)

    @property
    def scored(self) -> list[Scored]:
        """All tokens with their probabilities; none if none are wanted."""
        return self.scorer.scored if self.scorer else []

    def finish(self) -> None:
        """No more comes: hand on the rest, and tokens without text."""
        self.text.finish()
        if len(self.scored) > self._done:
            self._hand_on("")

    def _hand_on(self, text: str) -> None:
        scored = self.scored[self._done :]
        self._done += len(scored)
        self._on_text(self._number, text, scored)


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
    listener = _Listener(0, stops, top_logprobs, lambda number, text, scored: on_text(text, scored))
    text, scorer = listener.text, listener.scorer
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
    listener.finish()
    count = output.shape[1] - len(ids)
    ended = count < max_tokens or int(output[0, -1]) in end_tokens(model) or text.stopped
    finish = "stop" if ended else "length"
    return Reply(text.text, finish, entry.tokens + len(ids), entry.tokens, count, scored=listener.scored)


@torch.no_grad()
def score_prompt(entry: Entry, prompt: str | list[int], top_logprobs: int) -> list[Scored | int]:
    """The tokens of a prompt with their probabilities; the first, which nothing precedes, as its id alone."""
    model = entry.model
    ids = list(model.tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
    logits = model(torch.tensor([ids], device=model.device), memory=entry.memory, use_cache=False).logits[0].float()
    return [ids[0], *(score(logits[place], token, top_logprobs) for place, token in enumerate(ids[1:]))]
