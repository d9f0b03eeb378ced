"""Conversations: what the model reads is what the chat template writes; turns happen wholly or not at all."""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from chat_templates import TEMPLATES
from conftest import SHAPE
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed

import fot
from fot.ask import Conversation, ask
from fot.chat import prompt_ids
from fot.compat import given_cache
from fot.inspection.passages import make_passage
from memory import Memory

QUESTIONS = ("Who is it?", "  And now? ", "i")
ANSWERS = {
    "empty": "",
    "a letter of the marks": "i",
    "spaces": " x ",
    "newline": "a\n",
    "newlines": "\n\na\n\n b",
    "a mark as text": "<|im_end|>",
    "an end as text": "a</s>\n",
    "reasoning": "<think>\nW.\n</think>\n\ny",
    "reasoning that was opened": "W.\n</think>\n\ny",
    "unicode": "é 漢 😀\u200d",
    "half a character": "é 漢",
    "merged": "a th th",
    "ordinary": "Mr E.",
}
TEXT = "The vicar of Highbury is Mr Elton. Tea is at five in the garden.\n" * 4


def make_tokenizer(plain: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    template, end, marks = TEMPLATES[name]
    made = copy.deepcopy(plain)
    made.add_special_tokens({"additional_special_tokens": [*marks, end] if end != "</s>" else marks})
    made.add_tokens([AddedToken("th", normalized=False)])  # what a model writes as t, h is read as th
    made.eos_token = end
    made.chat_template = template
    return made


def make_chatty(window: int, tokenizer: PreTrainedTokenizerFast, mem_layers: tuple[int, ...] = (1,)) -> Any:
    set_seed(0)
    shape = SHAPE | {"max_position_embeddings": 4096, "num_hidden_layers": mem_layers[-1] + 1}
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
    model = fot.attach_memory(plain, fot.MemoryConfig(mem_layers=mem_layers, local_context=window, index="exact"))
    model.tokenizer = tokenizer
    return model


def written(tokenizer: Any, text: str, name: str) -> list[int]:
    """Ids of a text as a model might write it: byte by byte, so that marks in it are text."""
    ids = [number for letter in text for number in tokenizer(letter, add_special_tokens=False).input_ids]
    return ids[:-1] if name == "half a character" else ids


class Forced:
    """Makes a model write what it is told, and keeps what it reads."""

    def __init__(self, model: Any) -> None:
        self.read: list[int] = []  # in the order of the cache
        self.plan: list[int] = []
        self.first_logits: torch.Tensor | None = None  # of the first answer token of the last turn
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen = given_cache(kwargs).seen
        assert seen <= len(self.read)
        self.read[seen:] = (args[0] if args else kwargs["input_ids"])[0].tolist()

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if args:  # what is read ahead, not by generate
            return output
        if self.first_logits is None:
            self.first_logits = output.logits[0, -1].clone()
        output.logits[0, -1] = -1e4
        output.logits[0, -1, self.plan.pop(0)] = 0.0
        return output

    def turn(self, chat: Conversation, question: str, answer: list[int], **options: Any) -> Any:
        self.plan, self.first_logits = list(answer), None
        return chat.say(question, **({"max_new_tokens": len(answer)} | options))


def rendered(chat: Conversation, question: str) -> list[int]:
    messages = [*chat.messages, {"role": "user", "content": question}]
    return chat.model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def check_turns(model: Any, answers: list[str], *, logits: bool) -> None:
    tokenizer, forced = model.tokenizer, Forced(model)
    fresh = copy.deepcopy(model)
    fresh._forward_hooks.clear()
    fresh._forward_pre_hooks.clear()
    chat = Conversation(model, None)
    for turn, kind in enumerate(answers):
        question, ended = QUESTIONS[turn % 3], turn % 2 == 0
        expected = rendered(chat, question)
        answer = written(tokenizer, ANSWERS.get(kind, kind), kind) + [tokenizer.eos_token_id] * ended
        answer = answer or written(tokenizer, "z", "")
        forced.turn(chat, question, answer)
        assert forced.read == expected + answer[:-1], (kind, ended)
        assert chat.messages[-2] == {"role": "user", "content": question}
        assert chat.messages[-1]["content"] == tokenizer.decode(answer, skip_special_tokens=True)
        if logits:  # the cache holds that, too: it gives what reading it at once gives
            with torch.no_grad():
                alone = fresh(torch.tensor([expected])).logits[0, -1]
            torch.testing.assert_close(forced.first_logits, alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("name", "backwards"),
    [*((name, False) for name in TEMPLATES), *((name, True) for name in ("chatml", "llama 3", "qwen 3"))],
)
def test_the_model_reads_what_the_template_writes(
    name: str, backwards: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    """After an answer that its end mark ends, or (backwards) that ends without one."""
    answers = [*ANSWERS, *(["ordinary"] if backwards == (len(ANSWERS) % 2 == 0) else [])]
    check_turns(make_chatty(2048, make_tokenizer(tokenizer, name)), answers[:: -1 if backwards else 1], logits=True)


@pytest.mark.parametrize("name", ["chatml", "llama 3", "deepseek r1", "counting"])
def test_past_the_window(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Long answers that the template may rewrite move to the conversation's memory, and come back out of it."""
    model = make_chatty(56, make_tokenizer(tokenizer, name))
    check_turns(model, ["<think>\n" + "Well. " * 8 + "</think>\n\ny ", " So. " * 12, "i"], logits=False)


@pytest.mark.parametrize("name", ["chatml", "gemma", "qwen 3", "deepseek r1"])
def test_an_earlier_turn_is_not_read_again(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_chatty(2048, make_tokenizer(tokenizer, name))
    forced, chat = Forced(model), Conversation(model, None)
    end = [model.tokenizer.eos_token_id]
    for turn in range(4):
        answer = written(model.tokenizer, f" {turn}</think> {turn} ", "") + end
        told = forced.turn(chat, f"Question {turn}: " + "x" * 50, answer)
    one = len(rendered(Conversation(model, None), "Question 3: " + "x" * 50))
    assert told.prompt_tokens < 2.5 * one < len(forced.read)


def state_of(chat: Conversation) -> Any:
    """Everything that a next turn depends on."""
    local, rows = chat._cache.local, chat._cache.rows
    return (
        list(chat.messages),
        list(chat._ids),
        chat._cache.seen,
        [] if local.token_ids is None else local.token_ids.tolist(),
        [(layer.keys.clone(), layer.values.clone()) for layer in local.layers],
        [(row.own.token_ids().tolist(), [row.own[n].keys() for n in row.own.layers if len(row.own)]) for row in rows],
    )


def assert_same(first: Any, second: Any) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


class OutOfMemoryError(RuntimeError):
    pass


@contextmanager
def failing(model: Any, where: str, at: int, error: BaseException) -> Iterator[dict[str, Any]]:
    """Options of ``say`` with which it fails at the n-th call of a place."""
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return False

    if where in ("on_text", "stop"):
        yield {where: fail}
        return
    place = {"attention": model.model.layers[2].self_attn.q_proj, "head": model.lm_head}[where]
    hook = place.register_forward_hook(lambda *args: fail() or None)
    try:
        yield {}
    finally:
        hook.remove()


TURNS = ("Who is it?", "And then?", "Where is it now?")


def make_turning(name: str, plain: PreTrainedTokenizerFast) -> tuple[Any, Memory]:
    """A model every answer of which is as long as it may be, and a memory of a text."""
    model = make_chatty(64, make_tokenizer(plain, "chatml" if name == "plain" else name), mem_layers=(1, 2))
    ends = [2, model.tokenizer.eos_token_id, *model.tokenizer("\n", add_special_tokens=False).input_ids]
    model.generation_config.suppress_tokens = ends
    memory = model.new_memory()
    model.ingest(TEXT, memory, "text.txt")
    return model, memory


@pytest.fixture(scope="module")
def undisturbed(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[tuple[Any, Any]]]:
    """name -> the answer and the state after each turn of a conversation in which nothing fails."""

    @functools.cache
    def turns(name: str) -> list[tuple[Any, Any]]:
        chat = Conversation(*make_turning(name, tokenizer), use_chat_template=name != "plain")
        found = [(chat.say(question, max_new_tokens=8), state_of(chat)) for question in TURNS]
        assert len(chat._cache.rows[0].own) > 0  # something has moved to its memory
        return found

    return turns


FAULTS = [
    ("on_text", 1, ValueError("of the caller")),
    ("stop", 7, KeyboardInterrupt()),
    ("attention", 1, OutOfMemoryError("no memory left")),
    ("head", 6, OutOfMemoryError("no memory left")),
]


# Each fault where the template rewrites the last answer, so that the state goes back furthest, and where it does not.
@pytest.mark.parametrize(
    ("name", "where", "at", "error"),
    [(name, *fault) for names in (("deepseek r1",) * 4, ("plain", "chatml") * 2)
     for name, fault in zip(names, FAULTS, strict=True)],
)  # fmt: skip
def test_a_turn_happens_wholly_or_not_at_all(
    name: str,
    where: str,
    at: int,
    error: BaseException,
    tokenizer: PreTrainedTokenizerFast,
    undisturbed: Callable[[str], list[tuple[Any, Any]]],
) -> None:
    model, memory = make_turning(name, tokenizer)
    chat = Conversation(model, memory, use_chat_template=name != "plain")
    for number, (question, (expected, state)) in enumerate(zip(TURNS, undisturbed(name), strict=True)):
        if number != 1:
            before = state_of(chat)
            with failing(model, where, at, error) as options, pytest.raises(type(error)):
                chat.say(question, max_new_tokens=8, **options)
            assert_same(state_of(chat), before)
        answer = chat.say(question, max_new_tokens=8)
        assert (answer.text, answer.passages) == (expected.text, expected.passages)
        assert_same(state_of(chat), state)


def test_a_failed_turn_loses_nothing_that_moved_to_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where a template rewrites a long answer, what it moved to memory is left until the turn is done."""
    model = make_chatty(64, make_tokenizer(tokenizer, "llama 3"), mem_layers=(1, 2))
    forced, chat = Forced(model), Conversation(model, None)
    forced.turn(chat, "Who?", written(model.tokenizer, " so " * 40, ""))
    before, held = state_of(chat), len(chat._cache.rows[0].own)
    assert held > 0

    def fail(text: str) -> None:
        raise OutOfMemoryError

    with pytest.raises(OutOfMemoryError):
        forced.turn(chat, "So?", written(model.tokenizer, " well, then " * 13, ""), on_text=fail)
    assert_same(state_of(chat), before)
    expected = rendered(chat, "So?")
    forced.turn(chat, "So?", written(model.tokenizer, "no", ""))
    assert forced.read == [*expected, *written(model.tokenizer, "n", "")]


@pytest.mark.parametrize(("templated", "opened"), [(False, True), (True, False)])
def test_threads_do_not_see_one_another(
    templated: bool, opened: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    model = make_chatty(96, make_tokenizer(tokenizer, "chatml"))
    memory = model.new_memory()
    for number in range(4):
        model.ingest(f"{number} " + TEXT, memory, f"{number}.txt")
    if opened:  # the first to ask builds its index
        memory.save(tmp_path / "memory")
        memory = fot.Memory.open(tmp_path / "memory", index="IVF4,Flat")

    def run(number: int) -> Any:
        chat = Conversation(model, memory, use_chat_template=templated)
        answer = chat.say(f"{number}: Who is it?", max_new_tokens=4)
        return answer.text, answer.passages

    together: dict[int, Any] = {}
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        together[number] = run(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert together[number] == run(number)
    assert model.recorder is None
    assert "recorder" not in vars(model)


def test_no_recorder_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_chatty(96, make_tokenizer(tokenizer, "chatml"))
    chat = Conversation(model, None)
    chat.say("Who?", max_new_tokens=3)
    with pytest.raises(OutOfMemoryError), failing(model, "on_text", 1, OutOfMemoryError()) as options:
        chat.say("Who?", max_new_tokens=3, **options)
    assert model.recorder is chat._cache.recorder is chat._cache.local.recorder is None
    for state in chat._earlier:
        assert state.cache.recorder is state.checkpoint.attributes["recorder"] is None
        assert state.checkpoint.attributes["local"].recorder is None


ODD_SETTINGS = {
    "beams": {"num_beams": 3, "early_stopping": True},
    "sequences": {"num_beams": 2, "num_return_sequences": 2},
    "samples": {"num_return_sequences": 3, "do_sample": True},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized"},
    "no cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 4},
    "healing": {"token_healing": True},
}


@pytest.mark.parametrize("kind", ODD_SETTINGS)
def test_any_form_of_generation_settings(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A checkpoint's settings of how to search and what to return do not change how a question is answered."""
    model = make_chatty(96, make_tokenizer(tokenizer, "chatml"))
    memory = model.new_memory()
    model.ingest(TEXT, memory, "text.txt")
    plain = ask(model, memory, "Who?", max_new_tokens=5)
    model.generation_config = GenerationConfig(**ODD_SETTINGS[kind], eos_token_id=2)
    answer = ask(model, memory, "Who?", max_new_tokens=5)
    assert (answer.text, answer.passages, answer.answer_tokens) == (plain.text, plain.passages, plain.answer_tokens)


@pytest.mark.parametrize("templated", [False, True], ids=["plain", "template"])
def test_stop_strings_of_the_checkpoint_hold(templated: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_chatty(96, make_tokenizer(tokenizer, "chatml"))
    model.generation_config.stop_strings = ["STOP"]
    forced, chat = Forced(model), Conversation(model, None, use_chat_template=templated)
    answer = forced.turn(chat, "Who?", written(model.tokenizer, "He.STOP and more", ""))
    assert answer.text == "He.STOP"


@pytest.mark.parametrize("templated", [False, True], ids=["plain", "template"])
def test_a_model_without_an_end_token(templated: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_chatty(96, make_tokenizer(tokenizer, "zephyr" if templated else "chatml"))
    model.tokenizer.chat_template = (
        None if not templated else "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    )
    for settings in (model.generation_config, model.config):
        settings.eos_token_id = settings.pad_token_id = None
    model.tokenizer.eos_token = None
    forced, chat = Forced(model), Conversation(model, None)
    for _ in range(2):
        assert forced.turn(chat, "Who?", [5, 2, 7, 9], max_new_tokens=4).answer_tokens == 4


def test_passages_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """What a conversation moved to its memory is shown without the marks of its template."""
    model = make_chatty(64, make_tokenizer(tokenizer, "chatml"))
    chat = Conversation(model, None)
    for _ in range(3):
        answer = chat.say("Is the king so old?", max_new_tokens=20)
    assert answer.passages
    assert all("<|im" not in passage.text for passage in answer.passages)
    assert any("king" in passage.text for passage in answer.passages)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama 3", "mistral"])
def test_passages_have_no_marks_of_the_template(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Not even half of one, where a passage begins or ends within it; nor the names of roles."""
    made = make_tokenizer(tokenizer, name)
    turns = [("user", "What is said here?"), ("assistant", "Nothing of note."), ("user", "And there?")]
    ids = prompt_ids(made, [{"role": role, "content": text} for role, text in turns])
    memory = Memory([0], 1, 2, index="exact")
    vectors = {0: torch.zeros(1, len(ids), 2)}
    memory.append(vectors, vectors, ids)
    inside = {word for _, text in turns for word in text.split()}
    for start in range(0, len(ids) - 20, 3):
        passage = make_passage(memory, start, start + 20, 0.0, made, own=True, context=4)
        whole = [word for word in passage.text.replace("?", "? ").split()[1:-1] if word]
        assert set(whole) <= inside, passage.text
    of_a_document = make_passage(memory, 0, len(ids), 0.0, made, own=False, context=0).text
    assert ("user" in of_a_document) == (name != "mistral")  # whose marks are special tokens alone
