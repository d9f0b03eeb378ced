"""Every supported family, tiny and random, through the same checks."""

import copy
import functools
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import FAMILIES, PAPER, SHAPE, WINDOW
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    Olmo2Config,
    Phi3Config,
    SmolLM3Config,
    set_seed,
)
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

import fot
from fot.attention import CONTEXT
from fot.cli import main
from fot.compare.patterns import Streaming
from fot.compare.turned import turned_by
from fot.families import SUPPORTED_MODEL_TYPES, attention_modules
from fot.implementation import set_attention
from fot.rotary import rotary_of
from training.crossbatch import Contexts, disable_crossbatch, enable_crossbatch

Draw = Callable[..., Tensor]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
FALCON = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "intermediate_size")} | {
    "ffn_hidden_size": 48
}
# Chunks as long as the local window; layers 1 and 3 use no positions.
LLAMA4 = SHAPE | {
    "head_dim": 8,
    "no_rope_layers": [1, 0, 1, 0],
    "attention_chunk_size": WINDOW,
    "floor_scale": WINDOW + 1,
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 4,
}
MIXED = ["sliding_attention", "full_attention"] * 2

# Sliding windows are shorter than the local window, so that they can be seen to stay.
ALL: dict[str, Callable[[], Any]] = FAMILIES | {
    "gemma3_text": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=6, layer_types=MIXED),
    "smollm3": lambda: SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1, 1]),
    "phi3": lambda: Phi3Config(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=2.0, attention_multiplier=0.3, residual_multiplier=0.5),
    "cohere2": lambda: Cohere2Config(**SHAPE, sliding_window=6, layer_types=MIXED, logit_scale=0.5),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}, rotary_pct=0.5
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=6,
        layer_types=MIXED,
        rope_parameters=YARN,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4_text": lambda: Llama4TextConfig(**LLAMA4),
    "falcon": lambda: FalconConfig(**FALCON),
    "falcon, grouped": lambda: FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, all heads": lambda: FalconConfig(**FALCON, multi_query=False, parallel_attn=False, bias=True),
}


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def _made(name: str, attention: str | None) -> Any:
    set_seed(0)
    return AutoModelForCausalLM.from_config(ALL[name](), attn_implementation=attention).eval()


def plain(name: str, attention: str | None = None) -> Any:
    return copy.deepcopy(_made(name, attention))  # in half of the time


def attached(name: str, **settings: Any) -> Any:
    defaults = {"mem_layers": (1, 3), "local_context": WINDOW, "index": "exact"} | PAPER
    return fot.attach_memory(plain(name), fot.MemoryConfig(**(defaults | settings)))


class Written:
    """The method written out slowly: one softmax over what earlier windows left at position 0 and this one's keys."""

    memory_layers = (1, 3)

    def __init__(self, model: Any) -> None:
        self.stored: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.memory_layers}
        self.turned: dict[int, Any] = {}
        self.modules = list(attention_modules(model))
        for layer in self.memory_layers:
            self.modules[layer].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.turned[module.layer_idx] = kwargs["position_embeddings"]
        return args, kwargs | {CONTEXT: self}

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, learnt_sinks: Tensor | None
    ) -> Tensor:
        module, length = self.modules[layer], keys.shape[2]
        at_0 = keys
        # Those of SmolLM3 and Cohere 2 that use no positions; the others' own rotation, the other way round.
        if getattr(module, "use_rope", True) and not ("Cohere2" in type(module).__name__ and not module.sliding_window):
            cos, sin = self.turned[layer]
            size = (cos**2 + sin**2).sqrt()  # YaRN's factor stays on the keys, once
            at_0 = sys.modules[type(module).__module__].apply_rotary_pos_emb(keys, keys, cos / size, -sin / size)[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        all_keys, all_values = keys, values
        for old_keys, old_values in self.stored[layer]:
            all_keys = torch.cat([old_keys, all_keys], dim=2)
            all_values = torch.cat([old_values, all_values], dim=2)
            seen = torch.cat([torch.ones(length, old_keys.shape[2], dtype=torch.bool), seen], dim=1)
        self.stored[layer].append((at_0, values))
        group = queries.shape[1] // keys.shape[1]
        scores = queries @ all_keys.repeat_interleave(group, dim=1).mT * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        if learnt_sinks is None:
            return scores.softmax(-1) @ all_values.repeat_interleave(group, dim=1)
        sinks = learnt_sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([sinks, scores], dim=-1).softmax(-1)[..., 1:]
        return weights @ all_values.repeat_interleave(group, dim=1)


@torch.no_grad()
def test_within_a_window_the_model_is_untouched(name: str, ids: Draw) -> None:
    expected = plain(name)(ids(WINDOW, rows=2), labels=ids(WINDOW, rows=2))
    found = attached(name)(ids(WINDOW, rows=2), labels=ids(WINDOW, rows=2))
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    detached = fot.detach_memory(attached(name))
    assert type(detached) is type(plain(name))
    assert torch.equal(detached(ids(40)).logits, plain(name)(ids(40)).logits)


@torch.no_grad()
def test_attention_weights_are_those_of_the_untouched_model(name: str, ids: Draw) -> None:
    """A tuple with the weights of every layer, those with a memory as well."""
    models = plain(name, "eager"), attached(name)
    models[1].set_attn_implementation("eager")
    expected, found = (model(ids(WINDOW), output_attentions=True).attentions for model in models)
    assert len(found) == len(expected) == SHAPE["num_hidden_layers"]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@torch.no_grad()
def test_ingest_and_a_window_equal_the_method_written_out(name: str, ids: Draw) -> None:
    model, tokens = attached(name), ids(3 * WINDOW + 5)
    memory = model.new_memory()
    model.ingest(tokens[:, : 3 * WINDOW], memory)
    found = model(tokens[:, 3 * WINDOW :], memory=memory).logits
    reference = plain(name)
    set_attention(reference, "fot_eager")
    Written(reference)
    for window in tokens.split(WINDOW, dim=1):
        logits = reference(window, use_cache=False).logits
    torch.testing.assert_close(found, logits, **CLOSE)
    assert (found - model(tokens[:, 3 * WINDOW :]).logits).abs().max() > 1e-3  # the memory matters


@torch.no_grad()
def test_one_by_one_equals_all_at_once(name: str, ids: Draw) -> None:
    """Within a window, with a memory, and past it from a window that was filled at once or bit by bit."""
    model, tokens, past = attached(name), ids(WINDOW + 3), ids(40, seed=3)
    memory = model.new_memory()
    model.ingest(past, memory)
    whole = model(tokens[:, :WINDOW], memory=memory)
    cache, logits = None, []
    for token in tokens[:, :WINDOW].split(1, dim=1):
        output = model(token, past_key_values=cache, **({"memory": memory} if cache is None else {}))
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **CLOSE)
    for token in tokens[:, WINDOW:].split(1, dim=1):
        one = model(token, past_key_values=cache).logits
        other = model(token, past_key_values=whole.past_key_values).logits
        torch.testing.assert_close(one, other, **CLOSE)


def test_padded_rows_generate_what_they_give_alone(name: str, ids: Draw) -> None:
    model, rows = attached(name), [ids(count, seed=count) for count in (37, 12, 2)]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
    tokens, mask = (torch.zeros(3, 37, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        tokens[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row[0], 1
    together = model.generate(tokens, attention_mask=mask, **options)[:, 37:]
    for row, answer in zip(rows, together, strict=True):
        assert answer.tolist() == model.generate(row, **options)[0, row.shape[1] :].tolist()


@torch.no_grad()
def test_saved_and_copied_models_are_the_same(name: str, tmp_path: Path, ids: Draw) -> None:
    model = attached(name)
    expected, memory = model(ids(40)).logits, model.new_memory()
    model.ingest(ids(40), memory)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids(40)).logits, expected)
    model.save_pretrained(tmp_path)
    again = fot.FoTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids(40)).logits, expected)
    again.check_memory(memory)
    without = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(without(ids(WINDOW)).logits, model(ids(WINDOW)).logits, **CLOSE)


@pytest.mark.parametrize("positionals", [True, False])
@torch.no_grad()
def test_crossbatch_computes_what_a_memory_gives(name: str, positionals: bool, ids: Draw) -> None:
    windows, model = ids(WINDOW, rows=2), plain(name)
    reader = attached(name, mem_positionals=positionals)
    switch = enable_crossbatch(model, reader.memory_config)
    switch.contexts = Contexts([torch.tensor([], dtype=torch.int64), torch.tensor([0])])
    found = model(windows, use_cache=False).logits[1:]
    memory = reader.new_memory()
    reader.ingest(windows[:1], memory)
    torch.testing.assert_close(found, reader(windows[1:], memory=memory).logits, **CLOSE)


def test_lora_on_top_trains(name: str, ids: Draw) -> None:
    """Adapters inside the model, a loss over several windows."""
    # Llama 4's router is a linear layer that gives two results, which peft does not know.
    router = r".*\.router" if name == "llama4_text" else None
    around = get_peft_model(plain(name), LoraConfig(target_modules="all-linear", exclude_modules=router))
    model = fot.attach_memory(
        around.get_base_model(), fot.MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, index="exact")
    )
    model(ids(3 * WINDOW), labels=ids(3 * WINDOW)).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained[:-2])


def test_info_says_what_a_memory_will_be(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From the configuration alone: the layers and KV heads that a memory of the loaded model has."""
    ALL[name]().save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--local-context", str(WINDOW)]) == 0
    shown, memory = capsys.readouterr().out, attached(name, mem_layers=None).new_memory()
    assert f"{memory.num_key_value_heads} key-value, size {memory.head_dim}" in shown
    assert re.search(rf"memory layers +{', '.join(map(str, memory.layers))} *\n", shown)


def test_a_loss_reaches_learnt_sinks(ids: Draw) -> None:
    """GPT-OSS, within a window and past it."""
    model = attached("gpt_oss")
    for length in (WINDOW, 3 * WINDOW):
        model.zero_grad()
        model(ids(length), labels=ids(length)).loss.backward()
        for attention in attention_modules(model):
            assert attention.sinks.grad.abs().min() > 0


def test_attention_that_drops_learnt_sinks_is_refused() -> None:
    """transformers refuses sdpa for GPT-OSS by its own name, and would not know it by ours."""
    model = attached("gpt_oss")
    with pytest.raises(ValueError, match="GptOssForCausalLM does not support"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"does not go with the attention implementation 'paged\|eager'"):
        model.set_attn_implementation("paged|eager")
    assert model.config._attn_implementation == "fot_eager"


def test_the_loss_of_a_router_is_refused(ids: Draw) -> None:
    model = attached("gpt_oss")
    with pytest.raises(ValueError, match=r"GptOssForCausalLM with memory gives no output_router_logits"):
        model(ids(4), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"set model.config.output_router_logits = False"):
        model(ids(4))
    assert model(ids(4), output_router_logits=False).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {},
            {"mem_layers": (1, 2)},
            r"layer 2 of \w+ attends within chunks of 16 tokens.*: choose mem_layers among \[1, 3",
        ),
        (
            {"attention_chunk_size": 12},
            {},
            r"within chunks of 12 tokens, shorter than .* of 16: .*\(local_context=12\)",
        ),
        ({"floor_scale": 16}, {}, r"another temperature from token 16 on .*\(local_context=15\)"),
    ],
)
def test_what_llama_4_has_no_memory_for_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**(LLAMA4 | changes)))
    with pytest.raises(ValueError, match=message):
        fot.attach_memory(model, fot.MemoryConfig(**({"local_context": WINDOW} | settings)))


def test_memory_layers_of_llama_4_are_those_without_chunks() -> None:
    assert attached("llama4_text", mem_layers=None).memory_config.layers == (1, 3)


def test_keys_of_llama_4_are_turned_back() -> None:
    """Neighbouring numbers are turned together: what its window keeps is moved so when the oldest tokens leave."""
    model = plain("llama4_text")
    keys = torch.randn(2, 7, 2, 8, generator=torch.Generator().manual_seed(0))  # (B, T, G, D)
    positions = torch.arange(14).view(2, 7)
    turned = apply_rotary_emb(keys, keys, model.model.rotary_emb(keys, positions))[1]
    found = rotary_of(model).back(0, turned.transpose(1, 2), positions)
    torch.testing.assert_close(found, keys.transpose(1, 2))
    assert (turned - keys).abs().max() > 0.1


def test_falcon_attends_by_a_pattern(ids: Draw) -> None:
    """As methods of ``fot compare`` do: within their window the plain model, past it not."""
    model, text = plain("falcon, grouped"), ids(40)
    pattern = Streaming(0, 20)
    expected = model(text).logits
    with turned_by(model, pattern):
        found = model(text).logits
    torch.testing.assert_close(found[:, :20], expected[:, :20], **CLOSE)
    assert (found[:, 20:] - expected[:, 20:]).abs().max() > 1e-3
    assert torch.equal(model(text).logits, expected)


def test_falcon_with_alibi_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(FalconConfig(**FALCON, alibi=True))
    with pytest.raises(
        ValueError, match=r"FalconForCausalLM has ALiBi positions \(alibi=True\).*use a Falcon checkpoint"
    ):
        fot.attach_memory(model)


def test_falcons_layers_are_their_own_again() -> None:
    """After detaching and after training, under accelerate's wrappers as well."""
    model = plain("falcon")
    for attention in attention_modules(model):
        add_hook_to_module(attention, ModelHook())
    before = [type(attention) for attention in attention_modules(model)]
    fot.attach_memory(model, fot.MemoryConfig(mem_layers=(1, 3), local_context=WINDOW))
    assert not set(before) & {type(attention) for attention in attention_modules(model)}
    assert all(attention._old_forward.__func__ is type(attention).forward for attention in attention_modules(model))
    fot.detach_memory(model)
    disable_crossbatch(model, enable_crossbatch(model, attached("falcon").memory_config))
    assert [type(attention) for attention in attention_modules(model)] == before
    assert all(attention._old_forward.__func__ is type(attention).forward for attention in attention_modules(model))


def test_every_supported_family_is_here() -> None:
    assert set(SUPPORTED_MODEL_TYPES) == {name.split(",")[0] for name in ALL} | {"longllama"}


@pytest.mark.parametrize("kind", ["gemma2", "bloom"])
def test_families_outside_the_table_are_refused_by_name(kind: str) -> None:
    """The attention of the one has caps, and the other's positions are no rotary ones."""
    model = AutoModelForCausalLM.from_config(plain("llama").config)
    model.config.model_type = kind
    with pytest.raises(ValueError, match=f"'{kind}' models have no memory attention here; supported: llama"):
        fot.attach_memory(model)
