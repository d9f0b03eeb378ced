"""Ask a memory questions, or hold a conversation with it. Older turns of a conversation move to a second memory.

model = FoTForCausalLM.from_pretrained("smollm2-135m-fot")
memory = Memory.open("austen.memory")
answer = ask(model, memory, "Who is the vicar of Highbury?")
print(answer.text)
print(answer.passages[0].text, answer.passages[0].share)
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from fot.cache import Checkpoint, FoTCache
from fot.chat import (
    PLAIN_STOP,
    PLAIN_TURN,
    Message,
    first_turn_ids,
    has_template,
    lasting,
    plain_ids,
    prompt_ids,
    starts_with,
)
from fot.compat import CACHE
from fot.greedy import end_tokens, one_greedy_answer, without_repetition
from fot.retrieval.find import WAYS, Finder
from fot.retrieval.passages import SHORTEST
from fot.retrieval.prompt import titles, with_passages
from fot.sampling import GREEDY, Sampling, Scorer
from fot.streamer import OnText, Streamer
from fot.trace import Passage, record
from fot.turns import Answer, Prompt
from memory import Memory

# Ways to read passages again before an answer. ``auto`` is the best by docs/results.md, where a passage fits.
REREAD = ("auto", *WAYS, "off")
BEST_WAY = "both"
# Passages read again, at most, and the tokens of the window that stay free for the answer, at most.
MOST_READ = 3
ANSWER_ROOM = 64


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

    Passages that are read again stand in front of the question for one turn only; later turns find their own. A
    question that says too little by itself ("And his sister?") is searched for together with the one before it.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: is read and never changed; None for a conversation without one.
        use_chat_template: False asks questions as you would ask a base model. None uses the chat template if the
            tokenizer has one.
        title: what to call a document, in front of its passages and in answers. By default a model is told its file's
            name, without the folders that all documents lie in, and answers have the name that the memory knows.

    Attributes:
        messages: the turns so far, with the answers as the model wrote them.
        title: as given.
    """

    def __init__(
        self,
        model: Any,
        memory: Memory | None,
        *,
        use_chat_template: bool | None = None,
        title: Callable[[str], str] | None = None,
    ) -> None:
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
        self._told_before: list[int] = []
        self._told: list[int] = []  # without a template: what later prompts begin with, without passages read again
        self._finder = None if memory is None else Finder(model, memory, self._first_turn_ids)
        self._earlier: list[_State] = []  # before the last answer, as far as a template may change it
        self.title = title

    def anew(self) -> "Conversation":
        """A conversation that has not begun, with the same model and memory; what is known of that is shared."""
        other = Conversation(self.model, self.memory, use_chat_template=self._templated, title=self.title)
        other._finder = self._finder
        return other

    def take_back(self) -> None:
        """Forget the last turn and its answer, so that it can be answered once more."""
        del self.messages[-2:]
        self._told = self._told_before

    def go_back_to(self, messages: Sequence[Message]) -> None:
        """Make these the turns so far. What the model has read of them already is not read again.

        Args:
            messages: with ``role`` (system, user or assistant) and ``content``; the next turn is the user's.
        """
        self.messages = [dict(message) for message in messages]
        if not self._templated:
            self._told = plain_ids(self.model.tokenizer, self.messages)

    @property
    def stop_strings(self) -> list[str]:
        """What ends an answer: strings that the checkpoint names, and without a template the next question."""
        stops = self.model.generation_config.stop_strings or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        return stops + ([] if self._templated else [PLAIN_STOP])

    @torch.no_grad()
    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 128,
        num_passages: int = 5,
        reread: str = "auto",
        on_text: OnText | None = None,
        stop: Callable[[], bool] = lambda: False,
        sampling: Sampling = GREEDY,
        scorer: Scorer | None = None,
    ) -> Answer:
        """Answer the next turn. If an exception ends the turn, the conversation is as it was before.

        Args:
            text: what the user says.
            max_new_tokens: most tokens in the answer.
            num_passages: number of passages in the answer's list; those that are read again are in it in any case.
            reread: whether the passages that the question is about are read again, in front of the question: found by
                ``attention``, by ``bm25`` (the words of the question), or by ``both``; ``off``: they are not. ``auto``
                takes both, if a passage, question and answer fit the window together.
            on_text: called with each piece of the answer as soon as it is generated.
            stop: called after each token; the answer ends if it returns True. The conversation can continue.
            sampling: how tokens are drawn; greedily by default.
            scorer: takes note of their probabilities.

        Raises:
            ValueError: The turn is empty or longer than the window, or ``reread`` is none of ``REREAD``.
        """
        prompt = self.prepare(text, max_new_tokens=max_new_tokens, num_passages=num_passages, reread=reread)
        ids, found = prompt.ids, prompt.found
        before, earlier, told = self._state(self._ids), self._earlier, (len(self.messages), self._told)
        try:
            self._rewind(ids)
            read = self._cache.seen
            states = self._read_ahead(ids, [*self.messages, {"role": "user", "content": text}])
            streamer = Streamer(self.model.tokenizer, on_text, lambda: states.append(self._state(ids)), scorer)
            with record(self.model) if found is None else nullcontext() as recorder, sampling.seeded():
                output = self._generate(ids, max_new_tokens, streamer, stop, sampling)
            if found is None:
                assert recorder is not None
                found = recorder.passages(num_passages), 0
            self._ids, self._earlier = output, states[:1] if self._templated or prompt.found else []
            return self.conclude(
                replace(prompt, found=found), output[len(ids) :], max_new_tokens, streamer.first_token, read
            )
        except BaseException:  # Ctrl-C, too: after half a turn the next answer would be another
            self._return_to(before)
            self._earlier = earlier
            del self.messages[told[0] :]
            self._told = told[1]
            raise

    def prepare(self, text: str, *, max_new_tokens: int = 128, num_passages: int = 5, reread: str = "auto") -> Prompt:
        """What is read for the next turn. Nothing changes; arguments and errors are those of ``say``."""
        begun = time.perf_counter()
        if reread not in REREAD:
            raise ValueError(f"reread is {reread!r}; choose one of {', '.join(REREAD)}")
        self._check_length(text)
        found, content = self._find(text, num_passages, max_new_tokens, reread)
        return Prompt(text, self._prompt(content), found, begun)

    def conclude(
        self, prompt: Prompt, answered: list[int], max_new_tokens: int, first_token: float | None, read: int = 0
    ) -> Answer:
        """Take in a turn and its answer.

        Args:
            prompt: of the turn, with the answer's passages.
            answered: ids of the answer.
            max_new_tokens: most tokens that it could have.
            first_token: when it began, by ``time.perf_counter``.
            read: tokens of the prompt that were known before.
        """
        answer = self.model.tokenizer.decode(answered, skip_special_tokens=True)
        self._told_before = self._told
        if not self._templated:
            self._told = [*self._told, *self._turn_ids(prompt.text), *answered]
        self.messages += [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]
        done, (passages, read_again) = time.perf_counter(), prompt.found or ([], 0)
        return Answer(
            answer.strip(),
            self._titled(passages),
            read_again,
            len(prompt.ids) - read,
            read,
            len(answered),
            len(answered) < max_new_tokens or answered[-1] in end_tokens(self.model),
            (first_token or done) - prompt.begun,
            done - prompt.begun,
        )

    def find(self, question: str, count: int = 5, by: str = BEST_WAY) -> list[Passage]:
        """The passages of the memory that a question is about, best first; nothing is asked.

        Args:
            question: must be shorter than the local window.
            count: passages wanted.
            by: ``attention``, ``bm25`` or ``both``.

        Raises:
            ValueError: another way, or the question is empty or longer than the window.
        """
        self._check_length(question)
        found = [] if self._finder is None else self._finder.find(question, count, by)
        return self._titled(found)

    def _titled(self, passages: Sequence[Passage]) -> list[Passage]:
        title = self.title or str
        return [replace(passage, document=title(passage.document)) for passage in passages]

    def _find(
        self, text: str, count: int, max_new_tokens: int, reread: str
    ) -> tuple[tuple[list[Passage], int] | None, str]:
        """The passages that a question is about and how many are to be read again; and the turn with those.

        None, and the question alone, if nothing is to be read again.
        """
        if self._finder is None or reread == "off":
            return None, text
        window, room = self.model.memory_config.window, min(max_new_tokens, ANSWER_ROOM)
        frame = len(self._turn_ids(with_passages(text, [("", "")])))
        if frame + SHORTEST + room > window:
            if reread != "auto" and len(self._finder):
                raise ValueError(
                    f"no passage fits the window of {window} tokens beside the question and an answer of {room}: "
                    "shorten the question, or choose reread='off' (--reread off)"
                )
            return None, text
        way = BEST_WAY if reread == "auto" else reread
        passages = self._finder.find(self._searched(text), max(count, MOST_READ), way)
        title = self.title or titles(self.memory.documents() if self.memory else ())
        sources = [(title(passage.document), self._finder.text(passage)) for passage in passages[:MOST_READ]]
        for number in range(len(sources), 0, -1):
            content = with_passages(text, sources[:number])
            if len(self._turn_ids(content)) + room <= window:
                return (passages[: max(count, number)], number), content
        return None, text

    def _searched(self, text: str) -> str:
        """What is searched for: the question, behind the one before it if it says too little by itself."""
        before = next((one["content"] for one in reversed(self.messages) if one["role"] == "user"), None)
        if self._finder is None or not len(self._finder) or before is None:
            return text
        both = self._finder.follow_up(text, before)
        return both if len(self._first_turn_ids(both)) <= self.model.memory_config.window else text

    def _check_length(self, text: str) -> None:
        if not text.strip():
            raise ValueError("the question is empty: ask something")
        length, window = len(self._turn_ids(text)), self.model.memory_config.window
        if length > window:
            raise ValueError(
                f"the question has {length} tokens, but the window has {window}: shorten it, or put its text "
                "into a memory with fot memory build and ask about that"
            )

    def _turn_ids(self, content: str) -> list[int]:
        """The ids of one more turn of the user."""
        if self._templated or not self._told:
            return self._first_turn_ids(content)
        question = PLAIN_TURN.format(question=content.strip())
        return list(self.model.tokenizer(question, add_special_tokens=False).input_ids)

    def _first_turn_ids(self, content: str) -> list[int]:
        return first_turn_ids(self.model.tokenizer, content, self._templated)

    def _prompt(self, content: str) -> list[int]:
        """The ids of the conversation with one more turn of the user, up to where the model is to answer."""
        if self._templated:
            return prompt_ids(self.model.tokenizer, [*self.messages, {"role": "user", "content": content}])
        return self._told + self._turn_ids(content)

    def _read_ahead(self, ids: list[int], messages: list[Message]) -> list[_State]:
        """Where the prompt ends in what later prompts lack, read up to there: the state then, else nothing."""
        if self._templated:
            kept = lasting(self.model.tokenizer, messages, ids)
        else:
            later = self._told + self._turn_ids(messages[-1]["content"])
            kept = len(ids) if later == ids else len(self._told)
        if kept == len(ids):
            return []
        new = ids[self._cache.seen : kept]
        if new:
            self.model(torch.tensor([new], device=self.model.device), logits_to_keep=1, **{CACHE: self._cache})
        return [self._state(ids)]

    def _generate(
        self,
        ids: list[int],
        max_new_tokens: int,
        streamer: Streamer,
        stop: Callable[[], bool],
        sampling: Sampling,
    ) -> list[int]:
        """The same ids and the answer's."""
        model, prompt = self.model, torch.tensor([ids], device=self.model.device)
        processors: list[LogitsProcessor] = (
            [] if streamer.scorer is None else [streamer.scorer]
        )  # first: it notes what the model says
        processors += without_repetition(model, len(ids))
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=[lambda ids, scores, **_: torch.full(ids.shape[:1], stop(), device=ids.device)],
            eos_token_id=end_tokens(model) or None,
            stop_strings=self.stop_strings or None,
            logits_processor=LogitsProcessorList(processors),
            **(one_greedy_answer(model) | sampling.options()),
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
