"""Checkpoints as they come: from a hub's cache, with rotary scalings, sliding windows, packed rows, few layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, PAPER, SHAPE, WINDOW, ModelMaker
from reference import reference_logits
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config

import fot

Draw = Callable[..., torch.Tensor]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

ROTARY = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "rope_theta": 10000.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
}


def attached(config: Any, **settings: Any) -> Any:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return fot.attach_memory(
        model, fot.MemoryConfig(**{"mem_layers": (1, 3), "local_context": WINDOW, "index": "exact"} | PAPER | settings)
    )


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("mem_positionals", [True, False])
@torch.no_grad()
def test_keys_of_scaled_rotary_positions_are_keys_at_position_0(kind: str, mem_positionals: bool, ids: Draw) -> None:
    """YaRN and LongRoPE multiply rotated queries and keys by a factor; a stored key has it, too."""
    model = attached(LlamaConfig(**SHAPE, rope_parameters=ROTARY[kind]), mem_positionals=mem_positionals)
    if kind != "llama3":
        assert model.model.rotary_emb.attention_scaling > 1.05
    past, tokens = ids(3 * WINDOW, seed=1), ids(2 * WINDOW + WINDOW // 2)
    memory = model.new_memory()
    model.ingest(past, memory)
    windows = list(tokens.split([WINDOW, WINDOW, WINDOW // 2], dim=1))
    expected = reference_logits(model, windows, past=list(past.split(WINDOW, dim=1)))
    found = model(tokens, memory=memory, logits_to_keep=WINDOW // 2).logits
    torch.testing.assert_close(found, expected, **CLOSE)


SLIDING = {
    "mistral": lambda size: MistralConfig(**SHAPE, sliding_window=size, head_dim=12),
    "qwen2": lambda size: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=size, max_window_layers=2),
}


@pytest.mark.parametrize("name", SLIDING)
@torch.no_grad()
def test_a_sliding_window_longer_than_the_local_one_never_bites(name: str, ids: Draw) -> None:
    model, tokens = attached(SLIDING[name](WINDOW)), ids(3 * WINDOW + 2)
    cache, logits = None, []
    for part in tokens.split(3, dim=1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    full = attached(FAMILIES[name]())
    full.load_state_dict(model.state_dict())
    cache, expected = None, []
    for part in tokens.split(3, dim=1):
        output = full(part, past_key_values=cache)
        cache = output.past_key_values
        expected.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), torch.cat(expected, dim=1), **CLOSE)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("mistral", None, r"windows of at most 12 tokens \(local_context=12\)"),
        ("qwen2", (1, 3), r"layer 3 of .* choose mem_layers among \[0, 1\], or local_context=12"),
    ],
)
def test_the_remedy_for_a_shorter_sliding_window_works(
    name: str, layers: Any, message: str, tmp_path: Path, ids: Draw
) -> None:
    AutoModelForCausalLM.from_config(SLIDING[name](12)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        fot.FoTForCausalLM.from_pretrained(tmp_path, local_context=16, mem_layers=layers)
    model = fot.FoTForCausalLM.from_pretrained(tmp_path, local_context=12, mem_layers=layers)
    assert model(ids(40)).logits.shape == (1, 40, SHAPE["vocab_size"])


def test_memory_goes_to_layers_that_see_a_whole_window(ids: Draw) -> None:
    """Layers with a shorter sliding window stay as they are."""
    plain = AutoModelForCausalLM.from_config(SLIDING["qwen2"](6)).eval()
    expected = plain(ids(WINDOW)).logits
    model = fot.attach_memory(plain, fot.MemoryConfig(local_context=WINDOW))
    assert model.memory_config.layers == (1,)
    torch.testing.assert_close(model(ids(WINDOW)).logits, expected, **CLOSE)


def test_memory_goes_by_default_to_layers_that_look_far(ids: Draw) -> None:
    """Not to those with a sliding window, even one as long as the local window; where they are named, it does."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=WINDOW, layer_types=kinds)
    for named, expected in ((None, (1, 3)), ((0, 2), (0, 2))):
        plain = AutoModelForCausalLM.from_config(config).eval()
        model = fot.attach_memory(plain, fot.MemoryConfig(local_context=WINDOW, mem_layers=named))
        assert model.memory_config.layers == expected
        assert model(ids(2 * WINDOW)).logits.shape == (1, 2 * WINDOW, SHAPE["vocab_size"])


@torch.no_grad()
def test_packed_rows_are_what_they_are_in_transformers(
    family: str, make_model: ModelMaker, make_plain: ModelMaker, ids: Draw
) -> None:
    """Positions that start anew mark several texts in a row, which do not see one another."""
    tokens, positions = ids(WINDOW, rows=2), torch.tensor([[*range(7), *range(9)], [*range(11), *range(5)]])
    options = {"position_ids": positions, "use_cache": False}
    expected = make_plain(family)(tokens, labels=tokens, **options)
    found = make_model(family)(tokens, labels=tokens, **options)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(found.logits[0, :7], make_plain(family)(tokens[:1, :7]).logits[0], **CLOSE)
    embedded = make_model(family)
    given = embedded.model.embed_tokens(tokens)
    torch.testing.assert_close(embedded(inputs_embeds=given, **options).logits, expected.logits, **CLOSE)


def test_packed_rows_that_cannot_be_are_refused_in_words(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model()
    positions = torch.tensor([[*range(7), *range(2 * WINDOW - 7)]])
    with pytest.raises(ValueError, match=r"within a row of 32 tokens: packed texts are read in one window"):
        model(ids(2 * WINDOW), position_ids=positions, use_cache=False)
    memory = model.new_memory()
    model.ingest(ids(20), memory)
    with pytest.raises(ValueError, match="packed texts read no memory"):
        model(ids(WINDOW), position_ids=positions[:, :WINDOW], use_cache=False, memory=memory)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_ingest_in_inference_mode_and_on_outside_it(dtype: str, make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(), ids(6 * WINDOW)
    memory, expected = (model.new_memory(key_dtype=dtype, value_dtype=dtype) for _ in range(2))
    model.ingest(tokens, expected)
    with torch.inference_mode():
        model.ingest(tokens[:, : 3 * WINDOW], memory)
    model.ingest(tokens[:, 3 * WINDOW :], memory)
    for layer in memory.layers:
        assert torch.equal(memory[layer].keys(), expected[layer].keys())
    with torch.inference_mode():
        inside = model.generate(tokens[:, :5], memory=memory, max_new_tokens=2 * WINDOW, do_sample=False)
    outside = model.generate(tokens[:, :5], memory=memory, max_new_tokens=2 * WINDOW, do_sample=False)
    assert inside.tolist() == outside.tolist()


def test_one_layer(ids: Draw) -> None:
    """Its only layer has the memory, so that nothing is lost."""
    model = attached(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}), mem_layers=None)
    assert model.memory_config.layers == (0,)
    memory = model.new_memory()
    assert model.ingest(ids(40), memory) == len(memory) == 40
    assert model.generate(ids(4), memory=memory, max_new_tokens=2 * WINDOW, do_sample=False).shape[0] == 1


def test_no_memory_layers_are_no_place_to_lose_tokens(make_plain: ModelMaker, ids: Draw) -> None:
    model = attached(FAMILIES["llama"](), mem_layers=())
    torch.testing.assert_close(model(ids(WINDOW)).logits, make_plain()(ids(WINDOW)).logits, **CLOSE)
    message = r"no memory layers \(mem_layers is empty\).*choose memory layers"
    for lost in (
        lambda: model(ids(WINDOW + 1)),
        lambda: model.ingest(ids(WINDOW), model.new_memory()),
        lambda: model.generate(ids(4), max_new_tokens=2 * WINDOW, do_sample=False, eos_token_id=None),
        lambda: model.generate(ids(4), memory=model.new_memory(), max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=message):
            lost()


def test_revision_and_cache_dir_hold_for_the_tokenizer_too(tmp_path: Path) -> None:
    """As a hub's cache lies on disk: two revisions with weights and tokenizers of their own."""
    repository = tmp_path / "cache" / "models--org--name"
    for number, revision in enumerate(["main", "v1"]):
        folder = repository / "snapshots" / (str(number) * 40)
        set_seed(number)
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(folder)
        words = {f"word{number}-{i}": i for i in range(SHAPE["vocab_size"])}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words))).save_pretrained(folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(str(number) * 40)
    for number, options in enumerate([{}, {"revision": "v1"}]):
        model = fot.FoTForCausalLM.from_pretrained(
            "org/name", cache_dir=tmp_path / "cache", local_files_only=True, **options
        )
        assert model.tokenizer.convert_ids_to_tokens(5) == f"word{number}-5"
        set_seed(number)
        expected = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_subfolder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "inner")
    tokenizer.save_pretrained(tmp_path / "inner")
    model = fot.FoTForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(FileNotFoundError, match=r"outer' has no config\.json"):
        fot.FoTForCausalLM.from_pretrained(tmp_path, subfolder="outer")


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    assert fot.FoTForCausalLM.from_pretrained(tmp_path).tokenizer is None
    assert "tokenizer" not in caplog.text
    (tmp_path / "tokenizer.json").write_text("{")
    assert fot.FoTForCausalLM.from_pretrained(tmp_path).tokenizer is None
    assert "is loaded without a tokenizer: " in caplog.text
