"""Ask a memory questions, or hold a conversation with it. Older turns of a conversation move to a second memory.

model = FoTForCausalLM.from_pretrained("smollm2-135m-fot")
memory = Memory.open("austen.memory")
answer = ask(model, memory, "Who is the vicar of Highbury?")
print(answer.text)
print(answer.passages[0].text, answer.passages[0].share)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from fot.cache import Checkpoint, FoTCache
from fot.chat import Message, has_template, lasting, prompt_ids, starts_with
from fot.compat import CACHE
from fot.greedy import end_tokens, one_greedy_answer
from fot.trace import Passage, record
from memory import Memory

OnText = Callable[[str], None]

# How a question is put to a model that has no chat template.
PLAIN_TURN = "\nQuestion: {question}\nAnswer:"
PLAIN_STOP = "\n"


@dataclass(frozen=True)
class Answer:
    """The answer to one turn.

    Attributes:
        text: the answer.
        passages: the passages that received the most attention mass during the answer, in descending order.
        prompt_tokens: number of tokens in this turn's prompt.
        answer_tokens: number of tokens generated.
        first_token_seconds: time from the question to the first token.
        seconds: time from the question to the last token.
    """

    text: str
    passages: list[Passage]
    prompt_tokens: int
    answer_tokens: int
    first_token_seconds: float
    seconds: float


def ask(model: Any, memory: Memory, question: str, *, on_text: OnText | None = None, **options: Any) -> Answer:
    """Answer one question with a memory, which does not change.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: made by this model.
        question: must be shorter than the local window.
        on_text: called with each piece of the answer as soon as it is generated.
        options: further options of ``Conversation.say``.

    Raises:
        ValueError: The question is empty or longer than the window, or other weights made the memory.
    """
    return Conversation(model, memory).say(question, on_text=on_text, **options)


@dataclass(frozen=True)
class _State:
    """A conversation to go back to.

    Attributes:
        ids: what the model has read, in order, and behind it what it has written but not read.
        cache: what it read that into.
        checkpoint: of the cache, then.
    """

    ids: list[int]
    cache: FoTCache
    checkpoint: Checkpoint

    @property
    def read(self) -> list[int]:
        """The ids that the model has read."""
        return self.ids[: self.checkpoint.attributes["seen"]]


class Conversation:
    """A conversation with a memory. Tokens that leave the local window move to a second memory of the conversation.

    At each turn, the chat template formats the whole conversation. The model reads only the part that it has not read
    or written before. If the template changes earlier turns (it may trim them or remove their reasoning), the model
    reads again from the first change. A turn that ends with an exception does not change the conversation.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: is read and never changed; None for a conversation without one.
        use_chat_template: False asks questions as you would ask a base model. None uses the chat template if the
            tokenizer has one.

    Attributes:
        messages: the turns so far, with the answers as the model wrote them.
    """

    def __init__(self, model: Any, memory: Memory | None, *, use_chat_template: bool | None = None) -> None:
        if model.tokenizer is None:
            raise ValueError("a conversation needs a tokenizer: load the model with FoTForCausalLM.from_pretrained")
        if memory is not None:
            model.check_memory(memory)
        if use_chat_template and not has_template(model.tokenizer):
            raise ValueError("this model's tokenizer has no chat template: omit use_chat_template")
        self.model = model
        self.memory = memory
        self.messages: list[Message] = []
        self._templated = has_template(model.tokenizer) if use_chat_template is None else use_chat_template
        self._cache = self._new_cache()
        self._ids: list[int] = []
        self._earlier: list[_State] = []  # before the last answer, as far as a template may change it

    @torch.no_grad()
    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 128,
        num_passages: int = 5,
        on_text: OnText | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer the next turn. If an exception ends the turn, the conversation is as it was before.

        Args:
            text: what the user says.
            max_new_tokens: most tokens in the answer.
            num_passages: number of passages in the answer's list.
            on_text: called with each piece of the answer as soon as it is generated.
            stop: called after each token; the answer ends if it returns True. The conversation can continue.

        Raises:
            ValueError: The turn is empty or longer than the window.
        """
        start = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._turn(text, messages)
        before, earlier, told = self._state(self._ids), self._earlier, len(self.messages)
        try:
            self._rewind(ids)
            read = self._cache.seen
            states = self._read_ahead(ids, messages)
            streamer = _Streamer(self.model.tokenizer, on_text, lambda: states.append(self._state(ids)))
            with record(self.model) as recorder:
                output = self._generate(ids, max_new_tokens, streamer, stop)
            passages = recorder.passages(num_passages)
            answered = output[len(ids) :]
            answer = self.model.tokenizer.decode(answered, skip_special_tokens=True)
            self._ids, self._earlier = output, states[:1] if self._templated else []
            self.messages += [messages[-1], {"role": "assistant", "content": answer}]
        except BaseException:  # Ctrl-C, too: after half a turn the next answer would be another
            self._return_to(before)
            self._earlier = earlier
            del self.messages[told:]
            raise
        done = time.perf_counter()
        return Answer(
            answer.strip(),
            passages,
            len(ids) - read,
            len(answered),
            (streamer.first_token or done) - start,
            done - start,
        )

    def _turn(self, text: str, messages: list[Message]) -> list[int]:
        """The ids of the conversation with this turn, up to where the model is to answer."""
        if not text.strip():
            raise ValueError("the question is empty: ask something")
        tokenizer = self.model.tokenizer
        if self._templated:
            ids, alone = prompt_ids(tokenizer, messages), prompt_ids(tokenizer, messages[-1:])
        else:
            question = PLAIN_TURN.format(question=text.strip())
            alone = tokenizer(question, add_special_tokens=not self._ids).input_ids
            ids = self._ids + alone
        window = self.model.memory_config.window
        if len(alone) > window:
            raise ValueError(
                f"the question has {len(alone)} tokens, but the window has {window}: shorten it, or put its text "
                "into a memory with fot memory build and ask about that"
            )
        return ids

    def _read_ahead(self, ids: list[int], messages: list[Message]) -> list[_State]:
        """Where the prompt ends in what later prompts lack, read up to there: the state then, else nothing."""
        kept = lasting(self.model.tokenizer, messages, ids) if self._templated else len(ids)
        if kept == len(ids):
            return []
        new = ids[self._cache.seen : kept]
        if new:
            self.model(torch.tensor([new], device=self.model.device), logits_to_keep=1, **{CACHE: self._cache})
        return [self._state(ids)]

    def _generate(
        self, ids: list[int], max_new_tokens: int, streamer: "_Streamer", stop: Callable[[], bool]
    ) -> list[int]:
        """The same ids and the answer's, greedily."""
        model, prompt = self.model, torch.tensor([ids], device=self.model.device)
        stops = model.generation_config.stop_strings or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        stops += [] if self._templated else [PLAIN_STOP]
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=[lambda ids, scores, **_: torch.full(ids.shape[:1], stop(), device=ids.device)],
            eos_token_id=end_tokens(model) or None,
            stop_strings=stops or None,
            **one_greedy_answer(model),
            **{CACHE: self._cache},
        )
        return output[0].tolist()

    def _new_cache(self) -> FoTCache:
        return FoTCache([] if self.memory is None else [self.memory])

    def _state(self, ids: list[int]) -> _State:
        """The conversation as it is, ``ids`` read and written so far."""
        return _State(ids, self._cache, self._cache.checkpoint())

    def _rewind(self, ids: list[int]) -> None:
        """Make ready to read ``ids`` from the latest state in which nothing else has been read."""
        for state in (self._state(self._ids), *reversed(self._earlier)):
            if starts_with(ids, state.read):
                self._cache, self._ids = state.cache.fork(state.checkpoint), state.ids
                return
        self._cache, self._ids = self._new_cache(), []

    def _return_to(self, state: _State) -> None:
        state.cache.restore(state.checkpoint)
        self._cache, self._ids = state.cache, state.ids


class _Streamer(TextStreamer):
    """Hands on text as it becomes final, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: OnText | None, on_first_token: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._on_first_token = on_first_token
        self._prompt_seen = False
        self.first_token: float | None = None

    def put(self, value: Any) -> None:
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter()
            self._on_first_token()
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)
