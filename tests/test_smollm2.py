"""The real model: what tiny random ones cannot show. Run with ``pytest -m slow``; needs ``smollm2-135m``."""

from typing import Any

import pytest
import torch

import fot
import fot.attention
from fot import pretrained
from fot.checkpoint import CheckpointUnavailable
from fot.evaluation import passkey
from fot.machine import default_dtype

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint() -> str:
    try:
        pretrained.resolve("smollm2-135m", download=False)
    except CheckpointUnavailable:
        pytest.skip("smollm2-135m is not in the cache; fetch it with: fot info smollm2-135m")
    return "smollm2-135m"


def retrievals(checkpoint: str, dtype: torch.dtype, prompt: passkey.Prompt) -> tuple[str, dict[int, torch.Tensor]]:
    """The answer, and the 8 best memory slots of the question's last token in each layer and query head."""
    model: Any = fot.FoTForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_context=1024, index="exact")
    memory = model.new_memory()
    stored = len(prompt.ids) - model.memory_config.local_length(len(prompt.ids))
    model.ingest(prompt.ids[:stored], memory, progress=False)
    hits: dict[int, torch.Tensor] = {}
    real = fot.attention.attend_memory

    def watch(queries: torch.Tensor, memories: Any, layer: int, **options: Any) -> Any:
        if layer not in hits:  # the prompt; later calls are single answered tokens
            last = queries[0, :, -1].reshape(memory.num_key_value_heads, -1, queries.shape[-1])
            hits[layer] = memory[layer].search(last, 8)[1].flatten(0, 1)  # (H, 8)
        return real(queries, memories, layer, **options)

    fot.attention.attend_memory = watch
    try:
        answer = passkey._answer(model, prompt.ids[stored:], memory=memory)
    finally:
        fot.attention.attend_memory = real
    return answer, hits


@pytest.mark.parametrize("length", [2048, 4096])
def test_float32_and_bfloat16_retrieve_the_same(length: int, checkpoint: str) -> None:
    if default_dtype(torch.device("cpu")) != torch.bfloat16:
        pytest.skip("this processor has no instructions for bfloat16: it would take an hour and more")
    tokenizer = pretrained.load_tokenizer(pretrained.resolve(checkpoint))
    for prompt in passkey.make_prompts(tokenizer, length, 2, seed=0):
        answer, hits = retrievals(checkpoint, torch.float32, prompt)
        other_answer, other_hits = retrievals(checkpoint, torch.bfloat16, prompt)
        assert answer == other_answer
        # The filler repeats, so many keys are near-equal and bfloat16 may swap the last of the best; a hit is the
        # same if it is the same token of the sentence, or of the key.
        same = total = 0
        for layer, slots in hits.items():
            for one, other in zip(slots.tolist(), other_hits[layer].tolist(), strict=True):
                ids = [sorted(prompt.ids[slot] for slot in found) for found in (one, other)]
                same += len(set(ids[0]) & set(ids[1]))
                total += len(set(ids[0]))
        assert same / total > 0.95


def test_the_models_own_window_answers(checkpoint: str) -> None:
    """Within one window the memory is not needed, and nothing about the model has changed."""
    model = fot.FoTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = passkey.run(model, [512], 2, seed=0)
    assert found["results"][0]["accuracy"] == found["baseline"][0]["accuracy"] == 1.0
    answers = [[trial["answer"] for trial in found[part][0]["trials"]] for part in ("results", "baseline")]
    assert answers[0] == answers[1]


def test_prompt_through_generate_equals_ingest_then_generate(checkpoint: str) -> None:
    model: Any = fot.FoTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_context=512)
    prompt = passkey.make_prompts(model.tokenizer, 1500, 1, seed=1)[0]
    trial = passkey.answer_from_memory(model, prompt)
    assert trial.ingest_tokens == 1500 - 256
    assert passkey._answer(model, prompt.ids) == trial.answer
