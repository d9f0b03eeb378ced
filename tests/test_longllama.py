"""LongLLaMA checkpoints give the numbers of the authors' code (see tests/data/longllama/README.md)."""

import json
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fot

FOLDER = Path(__file__).parent / "data" / "longllama"
LOGITS = load_file(FOLDER / "expected_logits.safetensors")
GENERATED = load_file(FOLDER / "expected_generate.safetensors")
INPUT = LOGITS["input_ids"]

# Both compute in float32; only the order of additions differs.
TOLERANCE = 1e-4
# Values rounded to bfloat16 on one side are rounded on the other too, but softmax sums are split differently.
BF16_TOLERANCE = 1e-2


def load(**settings: Any) -> fot.LongLlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, index="exact", **settings)


CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "long_150": ({}, 150, TOLERANCE),
    "short_20": ({}, 20, TOLERANCE),
    "last_context_8": ({"last_context_length": 8}, 150, TOLERANCE),
    "no_mem_layers": ({"mem_layers": [], "last_context_length": 30}, 30, TOLERANCE),
    "no_positionals": ({"mem_positionals": False}, 150, TOLERANCE),
    "bf16_memory": ({"mem_dtype": "bfloat16"}, 150, BF16_TOLERANCE),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case: str) -> None:
    settings, length, tolerance = CASES[case]
    logits = load(**settings)(INPUT[:, :length]).logits
    torch.testing.assert_close(logits, LOGITS[case], atol=tolerance, rtol=0)


@torch.no_grad()
def test_logits_left_padded() -> None:
    mask = LOGITS["attention_mask"]
    logits = load()(INPUT, attention_mask=mask, position_ids=LOGITS["position_ids"]).logits
    real = mask.bool()  # what padding itself is worth nobody reads
    torch.testing.assert_close(logits[real], LOGITS["left_padded"][real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("grouping", [(1, 1), (2, 5), (4, 2048)])
@torch.no_grad()
def test_attention_grouping_changes_no_logit(grouping: tuple[int, int]) -> None:
    model = load(mem_attention_grouping=grouping)
    assert tuple(model.config.mem_attention_grouping) == grouping
    torch.testing.assert_close(model(INPUT).logits, LOGITS["long_150"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_last_context_length_of_one_call() -> None:
    logits = load()(INPUT, last_context_length=8).logits
    torch.testing.assert_close(logits, LOGITS["last_context_8"], atol=TOLERANCE, rtol=0)


def test_settings_change_the_logits() -> None:
    """So that the cases above can fail: each setting has an effect far above the tolerance."""
    for case in ("last_context_8", "no_positionals", "bf16_memory"):
        assert (LOGITS[case] - LOGITS["long_150"]).abs().max() > 2 * TOLERANCE


@pytest.mark.parametrize("name", ["greedy_1", "greedy_2"])
def test_greedy(name: str) -> None:
    expected = GENERATED[name]
    rows = expected.shape[0]
    output = load().generate(INPUT[:rows], max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert output.tolist() == expected.tolist()


def test_auto_classes_need_no_remote_code() -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    assert type(config) is fot.LongLlamaConfig
    assert type(load()) is fot.LongLlamaForCausalLM


@pytest.mark.parametrize("form", ["old", "new", "missing"])
@torch.no_grad()
def test_rope_theta_of_old_and_new_configs(form: str, tmp_path: Path) -> None:
    settings = json.loads((FOLDER / "config.json").read_text())
    del settings["rope_theta"]
    if form == "old":
        settings["rope_theta"] = 500.0
    elif form == "new":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(FOLDER / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    frequencies = model.model.rotary_emb.inv_freq
    base = 10000.0 if form == "missing" else 500.0
    torch.testing.assert_close(frequencies, 1.0 / base ** (torch.arange(0, 12, 2) / 12))
    difference = (model(INPUT).logits - LOGITS["long_150"]).abs().max()
    assert (difference < TOLERANCE) == (form == "missing")


def test_published_configs_load(tmp_path: Path) -> None:
    """Fields of the released 3B checkpoint's config.json; shrunk in width and depth only."""
    settings = {
        "architectures": ["LongLlamaForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_longllama.LongLlamaConfig"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "last_context_length": 1024,
        "max_position_embeddings": 2048,
        "mem_attention_grouping": None,
        "mem_dtype": "bfloat16",
        "mem_layers": [1, 2, 3],
        "mem_positionals": True,
        "model_type": "longllama",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.30.0",
        "use_cache": True,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    expected = {"layers": (1, 2, 3), "window": 2048, "key_dtype": "bfloat16", "overflow_keep": 0}
    assert {name: getattr(model.memory_config, name) for name in expected} == expected


@torch.no_grad()
def test_saved_checkpoint_loads_in_plain_llama_and_back(tmp_path: Path) -> None:
    model = load()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, index="exact")
    assert type(again) is fot.LongLlamaForCausalLM
    assert torch.equal(again(INPUT).logits, model(INPUT).logits)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    short = INPUT[:, :16]
    torch.testing.assert_close(plain(short).logits, model(short).logits, atol=TOLERANCE, rtol=0)


def test_padded_batch_generates_what_each_row_gives_alone() -> None:
    model = load()
    mask = LOGITS["attention_mask"]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    together = model.generate(INPUT, attention_mask=mask, **options)[:, INPUT.shape[1] :]
    for row, tokens in enumerate(together):
        prompt = INPUT[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, **options)[0, prompt.shape[1] :]
        assert tokens.tolist() == alone.tolist()


LOADED = """
import sys, torch
import fot
from fot.machine import peak_rss_bytes
import transformers.models.llama.modeling_llama, transformers.integrations  # not part of what loading takes
before = peak_rss_bytes()
model = fot.FoTForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(peak_rss_bytes() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
memory = model.new_memory()
model.ingest("It was the best of times. " * 40, memory)
prompt = torch.tensor([model.tokenizer("It was")["input_ids"]])
print(len(memory), model.generate(prompt, memory=memory, max_new_tokens=2, do_sample=False).shape[1] - prompt.shape[1])
"""


def test_a_folder_as_published_loads_without_a_second_copy_of_its_weights(tmp_path: Path) -> None:
    """Weights in bfloat16 in several files, and a sentencepiece tokenizer; then it reads and answers."""
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 50)
    SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"),
                               vocab_size=300, model_type="bpe", byte_fallback=True, pad_id=-1,
                               hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    size, layers, rows = 512, 6, 32000
    config = LlamaConfig(vocab_size=rows, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path, max_shard_size="10MB")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "longllama", "architectures": ["LongLlamaForCausalLM"], "mem_layers": [2, 4],
                 "last_context_length": 32, "mem_attention_grouping": None}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    done = forks.run("-c", LOADED, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, weights, stored, answered = map(int, done.stdout.split())
    assert weights > 100e6
    assert grown < 1.4 * weights
    assert stored > 128
    assert answered == 2
