"""``generate`` of transformers, on prompts and answers of any length."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, WINDOW, ModelMaker
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import BaseStreamer

from memory import Memory
from memory.layer import LayerMemory

Draw = Callable[..., torch.Tensor]

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


def greedy_by_hand(model: Any, prompt: torch.Tensor, count: int, **options: Any) -> list[int]:
    """Greedy tokens from single forward calls, without ``generate``."""
    tokens: list[int] = []
    with torch.no_grad():
        output = model(prompt, logits_to_keep=1, **options)
        for _ in range(count):
            tokens.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
    return tokens


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", 3), ("llama", WINDOW), *((name, 3 * WINDOW + 3) for name in FAMILIES)],
)
def test_greedy_of_any_length(length: int, family: str, make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(family), ids(length)
    output = model.generate(prompt, **GREEDY)
    assert output[:, :length].tolist() == prompt.tolist()
    assert output[0, length:].tolist() == greedy_by_hand(model, prompt, 12)


def read_tokens(cache: Any) -> list[int]:
    """Everything a cache of one row has read, in order: what moved to the memory, then what is local alone."""
    return cache.rows[0].own.token_ids().tolist() + cache.local.token_ids[0, cache.local.sinks[0] :].tolist()


def test_answer_far_beyond_the_window(make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(), ids(10)
    options = GREEDY | {"max_new_tokens": 5 * WINDOW, "return_dict_in_generate": True}
    output = model.generate(prompt, **options)
    assert output.sequences.shape == (1, 10 + 5 * WINDOW)
    cache = output.past_key_values
    assert read_tokens(cache) == output.sequences[0, :-1].tolist()
    assert len(cache.rows[0].own) >= 4 * WINDOW


def test_memory_is_read_not_written(make_model: ModelMaker, ids: Draw) -> None:
    model, past, prompt = make_model(), ids(60, seed=1), ids(10, seed=2)
    memory = model.new_memory()
    model.ingest(past, memory)
    with_memory = model.generate(prompt, memory=memory, **GREEDY)
    assert with_memory[0, 10:].tolist() == greedy_by_hand(model, prompt, 12, memory=memory)
    assert len(memory) == 60
    assert with_memory.tolist() != model.generate(prompt, **GREEDY).tolist()
    assert with_memory.tolist() == model.generate(prompt, memory=memory, **GREEDY).tolist()
    uncached = model.generate(prompt, memory=memory, use_cache=False, **(GREEDY | {"max_new_tokens": 5}))
    assert uncached[0].tolist() == with_memory[0, :15].tolist()


def test_memory_is_written_when_told_to(make_model: ModelMaker, ids: Draw) -> None:
    model, past, prompt = make_model(), ids(60, seed=1), ids(40, seed=2)
    memory = model.new_memory()
    model.ingest(past, memory)
    output = model.generate(prompt, memory=memory, update_memory=True, **GREEDY)
    assert memory.token_ids().tolist() == [*past[0].tolist(), *output[0, :-1].tolist()]
    with pytest.raises(ValueError, match="needs a memory"):
        model.generate(prompt, update_memory=True, **GREEDY)
    with pytest.raises(ValueError, match="must not write to one memory"):
        model.generate(ids(4, rows=2), memory=memory, update_memory=True, **GREEDY)


def test_left_padded_rows_give_what_they_give_alone(make_model: ModelMaker, ids: Draw) -> None:
    """Past the window in the prompt and in the answer; other families are tried in test_families.py."""
    model = make_model(layers=3, mem_layers=(0, 2))
    rows = [ids(count, seed=count) for count in (75, 37, 12, 2)]
    options = GREEDY | {"max_new_tokens": WINDOW + 4}
    tokens = torch.zeros(4, 75, dtype=torch.int64)
    mask = torch.zeros(4, 75, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row[0], 1
    together = model.generate(tokens, attention_mask=mask, **options)[:, 75:]
    for row, answer in zip(rows, together, strict=True):
        assert answer.tolist() == model.generate(row, **options)[0, row.shape[1] :].tolist()


def test_rows_read_one_memory_together(make_model: ModelMaker, ids: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each new token the keys are gone through once, however many rows ask; each row gets what it gets alone."""
    model, attend, calls = make_model(), LayerMemory.attend, list[int]()
    memory, other = model.new_memory(), model.new_memory()
    model.ingest(ids(60, seed=1), memory)
    model.ingest(ids(50, seed=2), other)

    def counted(self: LayerMemory, queries: torch.Tensor, **options: Any) -> Any:
        calls.append(queries.shape[1])
        return attend(self, queries, **options)

    monkeypatch.setattr(LayerMemory, "attend", counted)
    prompts = ids(10, rows=3)
    for given in (memory, [memory, other, memory]):
        calls.clear()
        together = model.generate(prompts, memory=given, **GREEDY | {"max_new_tokens": 5})
        each = [given] * 3 if isinstance(given, Memory) else given
        new_tokens = [count for count in calls if count in (2, 4, 6)]  # 2 query heads of a KV head, a row
        per_step = {6: 1} if isinstance(given, Memory) else {4: 1, 2: 1}
        assert Counter(new_tokens) == {count: 4 * 2 * times for count, times in per_step.items()}  # 4 steps, 2 layers
        for row, one in enumerate(each):
            alone = model.generate(prompts[row : row + 1], memory=one, **GREEDY | {"max_new_tokens": 5})
            assert together[row].tolist() == alone[0].tolist()


def test_a_memory_for_each_row(make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(), ids(10)
    memories = [model.new_memory(), model.new_memory()]
    for number, memory in enumerate(memories):
        model.ingest(ids(50, seed=number), memory)
    together = model.generate(prompt.repeat(2, 1), memory=memories, **GREEDY)
    for memory, answer in zip(memories, together, strict=True):
        assert answer.tolist() == model.generate(prompt, memory=memory, **GREEDY)[0].tolist()
    assert together[0].tolist() != together[1].tolist()
    with pytest.raises(ValueError, match="2 memories for 3 rows"):
        model.generate(prompt.repeat(3, 1), memory=memories, **GREEDY)


@pytest.mark.parametrize("length", [10, 60])
def test_beams_equal_the_plain_model_or_a_search_by_hand(length: int, make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(), ids(length)
    options = {"num_beams": 3, "do_sample": False, "eos_token_id": None, "max_new_tokens": WINDOW + 4}
    output = model.generate(prompt, return_dict_in_generate=True, output_scores=True, **options)
    found = output.sequences[0, length:].tolist()
    # A beam's score must be the likelihood of its tokens when they are read straight, one after another.
    cache, total, feed = None, 0.0, prompt
    with torch.no_grad():
        for token in found:
            step = model(feed, past_key_values=cache, logits_to_keep=1)
            cache, feed = step.past_key_values, torch.tensor([[token]])
            total += float(step.logits[0, -1].log_softmax(-1)[token])
    assert output.sequences_scores[0].item() == pytest.approx(total / len(found), abs=1e-4)


def test_several_samples_read_the_prompt_once(
    make_model: ModelMaker, ids: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = make_model(), ids(10 * WINDOW)
    windows: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *args: windows.append(1))
    made, new_memory = [], model.new_memory
    monkeypatch.setattr(model, "new_memory", lambda **settings: made.append(1) or new_memory(**settings))
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 2 * WINDOW, "eos_token_id": None}
    output = model.generate(prompt, **options)
    assert output.shape == (4, 12 * WINDOW)
    assert len({tuple(row) for row in output.tolist()}) == 4
    assert len(windows) < 10 + 2 + 2 * WINDOW  # not four times ten
    assert len(made) == 1  # each looks at the weights


def test_streamer_and_stopping(make_model: ModelMaker, ids: Draw) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    class Five(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 45)

    model, prompt, streamer = make_model(), ids(40), Collect()
    output = model.generate(prompt, streamer=streamer, stopping_criteria=[Five()], **GREEDY)
    assert output.shape == (1, 45)
    assert streamer.tokens == [*output[0].tolist(), -1]


def test_end_of_sequence_stops(make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(), ids(40)
    answer = model.generate(prompt, **GREEDY)[0, 40:].tolist()
    stopped = model.generate(prompt, **(GREEDY | {"eos_token_id": answer[4]}))[0, 40:].tolist()
    assert stopped == answer[: answer.index(answer[4]) + 1]


def test_chunked_prefill_loses_nothing(make_model: ModelMaker, ids: Draw) -> None:
    model, prompt = make_model(), ids(50)
    output = model.generate(prompt, prefill_chunk_size=7, return_dict_in_generate=True, **GREEDY)
    cache = output.past_key_values
    assert read_tokens(cache) == output.sequences[0, :-1].tolist()


@pytest.mark.parametrize("bad", [torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[5, 300]]), torch.tensor([[-1]])])
def test_bad_prompts(bad: torch.Tensor, make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match=r"the prompt is empty|token id (300|-1) is outside the vocabulary 0\.\.299"):
        make_model().generate(bad, **GREEDY)


def test_no_word_about_the_maximum_length(
    make_model: ModelMaker, make_plain: ModelMaker, ids: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers warns past ``max_position_embeddings``, which says nothing about a model with memory."""
    from transformers.utils import logging

    logging.get_logger("transformers").warning_once.cache_clear()
    logging.enable_propagation()
    logging.set_verbosity_warning()  # the command, tested elsewhere, turns it down
    try:
        make_plain().generate(ids(70), **GREEDY)
        assert "maximum length" in caplog.text
        caplog.clear()
        logging.get_logger("transformers").warning_once.cache_clear()
        make_model().generate(ids(70), **GREEDY)
    finally:
        logging.disable_propagation()
    assert "maximum length" not in caplog.text


CHECKPOINT_SETTINGS = [
    (10, {"use_cache": False}),
    (60, {"cache_implementation": "static"}),
    (60, {"cache_implementation": "quantized", "use_cache": False}),
]


@pytest.mark.parametrize(("length", "settings"), CHECKPOINT_SETTINGS, ids=str)
def test_what_a_checkpoint_says_of_caches_changes_no_token(
    settings: dict[str, Any], length: int, make_model: ModelMaker, ids: Draw
) -> None:
    model, prompt = make_model(layers=3, mem_layers=(0, 2)), ids(length)
    past, memory = ids(40, seed=5), model.new_memory()
    model.ingest(past, memory)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": WINDOW - 4}  # past the window for both
    expected = model.generate(prompt, memory=memory, **options)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.config.use_cache = settings.get("use_cache", True)
    assert model.generate(prompt, memory=memory, **options).tolist() == expected.tolist()
    given = GenerationConfig(**options)
    assert model.generate(prompt, memory=memory, generation_config=given).tolist() == expected.tolist()
    assert model.generate(prompt, given, memory=memory).tolist() == expected.tolist()
    model.generate(prompt, memory=memory, update_memory=True, **options)
    assert memory.token_ids().tolist() == [*past[0].tolist(), *expected[0, :-1].tolist()]


def test_use_cache_false_from_the_caller(make_model: ModelMaker, ids: Draw) -> None:
    """Each token then comes from a whole forward pass, as in transformers."""
    model, prompt = make_model(), ids(4)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
    expected = model.generate(prompt, **options)
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    for asked in (options | {"use_cache": False}, {"generation_config": GenerationConfig(**options, use_cache=False)}):
        lengths.clear()
        assert model.generate(prompt, **asked).tolist() == expected.tolist()
        assert lengths == [4, 5, 6, 7, 8, 9]
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(prompt, memory=model.new_memory(), update_memory=True, **asked)


def test_another_kind_of_cache_is_refused_by_name(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model()
    for asked in (
        {"cache_implementation": "static"},
        {"generation_config": GenerationConfig(cache_implementation="static")},
    ):
        with pytest.raises(ValueError, match="cache_implementation is 'static'; a model with memory keeps a cache"):
            model.generate(ids(4), max_new_tokens=2, **asked)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"return_dict_in_generate": True}],
    ids=str,
)
def test_a_checkpoints_other_settings_hold_as_in_transformers(
    settings: dict[str, Any], make_model: ModelMaker, make_plain: ModelMaker, ids: Draw
) -> None:
    """Within the window, where both compute the same."""
    found = []
    for model in (make_model(), make_plain()):
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        torch.manual_seed(0)
        output = model.generate(ids(4), eos_token_id=None, max_new_tokens=8)
        found.append(output)
    sequences = [getattr(output, "sequences", output).tolist() for output in found]
    assert sequences[0] == sequences[1]
    assert hasattr(found[0], "sequences") == hasattr(found[1], "sequences")


@pytest.mark.parametrize("length", [10, 60])
def test_one_prefix_many_continuations(length: int, make_model: ModelMaker, ids: Draw) -> None:
    """A cache copied, or repeated for more rows, gives what reading the prefix anew gives."""
    model, prefix, past = make_model(), ids(length), ids(50, seed=9)
    memory = model.new_memory()
    model.ingest(past, memory)
    endings = [ids(5, seed=seed) for seed in (1, 2, 3)]
    with torch.no_grad():
        cache = model(prefix, memory=memory).past_key_values

    def continued(ending: torch.Tensor, cache: Any) -> list[int]:
        whole = torch.cat([prefix, ending], dim=1)
        return model.generate(whole, past_key_values=cache, **GREEDY)[0, whole.shape[1] :].tolist()

    def read_anew(ending: torch.Tensor) -> list[int]:
        with torch.no_grad():
            return continued(ending, model(prefix, memory=memory).past_key_values)

    expected = [read_anew(ending) for ending in endings]
    assert [continued(ending, copy.deepcopy(cache)) for ending in endings] == expected
    assert copy.deepcopy(cache).rows[0].reads[0] is memory
    rows = copy.deepcopy(cache)
    rows.batch_repeat_interleave(3)
    whole = torch.cat([prefix.repeat(3, 1), torch.cat(endings)], dim=1)
    together = model.generate(whole, past_key_values=rows, **GREEDY)[:, whole.shape[1] :]
    assert together.tolist() == expected
    rows.batch_select_indices(torch.tensor([2]))
    assert len(rows.rows) == rows.local.token_ids.shape[0] == 1
    assert len(memory) == 50
