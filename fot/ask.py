"""Questions to a memory, answered as they are written; a conversation whose older turns become a memory of their own.

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

from fot.cache import FoTCache
from fot.compat import CACHE
from fot.trace import Passage, record
from memory import Memory

OnText = Callable[[str], None]

# How a question is put to a model that has no chat template.
PLAIN_TURN = "\nQuestion: {question}\nAnswer:"
PLAIN_STOP = "\n"


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: the answer.
        passages: what carried most attention mass while it was written, most first.
        prompt_tokens: tokens of this turn's prompt.
        answer_tokens: tokens generated.
        first_token_seconds: from the question to the first token.
        seconds: from the question to the last token.
    """

    text: str
    passages: list[Passage]
    prompt_tokens: int
    answer_tokens: int
    first_token_seconds: float
    seconds: float


def ask(model: Any, memory: Memory, question: str, *, on_text: OnText | None = None, **options: Any) -> Answer:
    """One question, one answer; ``memory`` is not written to.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: made by this model.
        question: shorter than the local window.
        on_text: called with each piece of the answer as it comes.
        options: of ``Conversation.say``.

    Raises:
        ValueError: an empty question, one that is longer than the window, or a memory made by other weights.
    """
    return Conversation(model, memory).say(question, on_text=on_text, **options)


class Conversation:
    """Turns with one memory. What leaves the local window moves to a memory of the conversation's own.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer; instruct models get their chat template.
        memory: read, never written to; None for none.
        use_chat_template: False puts questions plainly, as to a base model; None: if the tokenizer has one.
    """

    def __init__(self, model: Any, memory: Memory | None, *, use_chat_template: bool | None = None) -> None:
        if model.tokenizer is None:
            raise ValueError("a conversation needs a tokenizer: load the model with FoTForCausalLM.from_pretrained")
        if memory is not None:
            model.check_memory(memory)
        has_template = bool(getattr(model.tokenizer, "chat_template", None))
        if use_chat_template and not has_template:
            raise ValueError("this model's tokenizer has no chat template: leave use_chat_template out")
        self.model = model
        self.memory = memory
        self.messages: list[dict[str, str]] = []
        self._templated = has_template if use_chat_template is None else use_chat_template
        self._cache = FoTCache([] if memory is None else [memory], "row")
        self._ids: list[int] = []

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
        """The model's answer to the next turn.

        Args:
            text: the turn.
            max_new_tokens: longest answer.
            num_passages: passages listed.
            on_text: called with each piece of the answer as it comes.
            stop: asked after each token whether the answer should end there; the conversation can go on.

        Raises:
            ValueError: an empty turn, or one that is longer than the window.
        """
        start = time.perf_counter()
        new_ids = self._turn(text)
        prompt = torch.tensor([self._ids + new_ids], device=self.model.device)
        streamer = _Streamer(self.model.tokenizer, on_text)
        with record(self.model) as recorder:
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=[lambda ids, scores, **_: torch.full(ids.shape[:1], stop(), device=ids.device)],
                pad_token_id=self._end_tokens()[0],
                eos_token_id=self._end_tokens(),
                **{CACHE: self._cache},
                **({} if self._templated else {"stop_strings": [PLAIN_STOP], "tokenizer": self.model.tokenizer}),
            )
        self._ids = output[0].tolist()
        answered = self._ids[prompt.shape[1] :]
        answer = self.model.tokenizer.decode(answered, skip_special_tokens=True)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        done = time.perf_counter()
        return Answer(
            answer.strip(),
            recorder.passages(num_passages),
            len(new_ids),
            len(answered),
            (streamer.first_token or done) - start,
            done - start,
        )

    def _turn(self, text: str) -> list[int]:
        """The tokens of a turn, what closes the turn before included."""
        if not text.strip():
            raise ValueError("the question is empty: ask something")
        ids = self._templated_turn(text) if self._templated else self._plain_turn(text)
        window = self.model.memory_config.window
        if len(ids) > window:
            raise ValueError(
                f"the question has {len(ids)} tokens, more than the window of {window}: shorten it, or put its text "
                "into a memory with fot memory build and ask about that"
            )
        return ids

    def _plain_turn(self, text: str) -> list[int]:
        first = not self.messages
        return self.model.tokenizer(PLAIN_TURN.format(question=text.strip()), add_special_tokens=first).input_ids

    def _templated_turn(self, text: str) -> list[int]:
        tokenizer = self.model.tokenizer
        before = tokenizer.apply_chat_template(self.messages, tokenize=False) if self.messages else ""
        messages = [*self.messages, {"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(before):
            raise ValueError(
                "this model's chat template rewrites earlier turns, which cannot be: use_chat_template=False"
            )
        if self.messages:  # what follows the last answer: its end mark, unless the model wrote that itself
            start = before.rindex(self.messages[-1]["content"]) + len(self.messages[-1]["content"])
            whole = whole[start:]
            ended = self._ids[-1] in self._end_tokens()
            whole = whole.removeprefix(tokenizer.decode(self._ids[-1:])) if ended else whole
        return tokenizer(whole, add_special_tokens=False).input_ids

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return [token for token in {*ends, self.model.tokenizer.eos_token_id} if token is not None]


class _Streamer(TextStreamer):
    """Hands on text as it becomes final, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._prompt_seen = False
        self.first_token: float | None = None

    def put(self, value: Any) -> None:
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter()
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)
