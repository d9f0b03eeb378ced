"""What decides the keys decides the fingerprint, and nothing else does."""

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import FAMILIES, PAPER, SHAPE, WINDOW, ModelMaker
from peft import LoraConfig, get_peft_model
from test_families import ALL
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

import fot
from fot.fingerprint import MADE_WITH, Fingerprint, first_fingerprint
from memory import Memory

TOKENS = torch.randint(3, 300, (3 * WINDOW + 5,), generator=torch.Generator().manual_seed(5))
GATES = ((0.25, 0.5, 0.75, 0.5), (0.5, 0.125, 0.5, 0.875))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _plain(config: dict[str, Any]) -> Any:
    """With a layer above the last memory layer."""
    set_seed(0)
    shape = SHAPE | {"num_hidden_layers": 5, "num_key_value_heads": 2, "tie_word_embeddings": False} | config
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()


@functools.cache
def _usual() -> Any:
    return _plain({})


def make(
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    change: Callable[[Any], Any] = lambda model: model,
) -> Any:
    """A model with given weights that nothing shares, changed before it gets its memory."""
    plain = copy.deepcopy(_usual()) if config is None else _plain(config)  # in half of the time
    set_seed(0)
    plain = change(plain)
    defaults = {"mem_layers": (1, 3), "local_context": WINDOW, "index": "exact"} | PAPER
    return fot.attach_memory(plain, fot.MemoryConfig(**(defaults | (settings or {}))))


@torch.no_grad()
def stored(model: Any) -> torch.Tensor:
    """Every key and value of a text, whatever the model's fingerprint."""
    memory = model.new_memory(key_dtype="float32", value_dtype="float32")
    model.ingest(TOKENS, memory)
    return torch.cat([part for layer in memory.layers for part in (memory[layer].keys(), memory[layer].values())])


def changed(name: str, how: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        with torch.no_grad():
            how(model.get_parameter(name))
        return model

    return change


def lora(model: Any, *, weights: float = 0.3, targets: tuple[str, ...] = ("q_proj", "v_proj"), **options: Any) -> Any:
    """A PEFT model around a model with an adapter that does something."""
    around = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=True, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in around.named_parameters():
            if "lora_B" in name:
                parameter.copy_(weights * torch.randn(parameter.shape, generator=generator))
    return around


def with_two_adapters(active: str) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        around = lora(model)
        around.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
        around.base_model.model.model.layers[1].self_attn.k_proj.lora_B["other"].weight.data.fill_(0.2)
        around.set_adapter(active)
        return around.get_base_model()

    return change


def disabled(model: Any) -> Any:
    around = lora(model)
    around.base_model.disable_adapter_layers()
    return around.get_base_model()


def merged(model: Any) -> Any:
    around = lora(model)
    around.merge_adapter()
    return around.get_base_model()


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "window": {"settings": {"local_context": WINDOW - 1}},
    "positions": {"settings": {"mem_positionals": False}},
    "isolated windows": {"settings": {"isolated_windows": True}},
    "overlap": {"settings": {"window_overlap": 4}},
    "overlap of isolated windows": {"settings": {"window_overlap": 4, "isolated_windows": True}},
    "full weight": {"settings": {"full_weight_tokens": WINDOW}},
    "newest": {"settings": {"full_weight_tokens": WINDOW, "newest_full_weight": 3}},
    "gates": {"settings": {"memory_gates": GATES}},
    "rope theta": {"config": {"rope_theta": 500.0}},
    "rope scaling": {"config": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}},
    "eps": {"config": {"rms_norm_eps": 1e-2}},
    "activation": {"config": {"hidden_act": "gelu"}},
    "attention biases": {"config": {"attention_bias": True}},
    "heads": {"config": {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 2}},
    "a weight": {"change": changed("model.layers.0.mlp.up_proj.weight", lambda w: w.mul_(1.01))},
    "a weight's data": {"change": changed("model.layers.0.mlp.up_proj.weight", lambda w: w.data.mul_(1.01))},
    "a norm": {"change": changed("model.layers.2.post_attention_layernorm.weight", lambda w: w.data.mul_(1.01))},
    "the embedding": {"change": changed("model.embed_tokens.weight", lambda w: w.data.add_(1e-3))},
    "the last keys": {"change": changed("model.layers.3.self_attn.k_proj.weight", lambda w: w.data.add_(1e-3))},
    "the last values": {"change": changed("model.layers.3.self_attn.v_proj.weight", lambda w: w.data.add_(1e-3))},
    "the last norm": {"change": changed("model.layers.3.input_layernorm.weight", lambda w: w.data.add_(1e-2))},
    "adapter": {"change": lambda model: lora(model).get_base_model()},
    "weaker adapter": {"change": lambda model: lora(model, lora_alpha=1).get_base_model()},
    "adapter of another kind": {"change": lambda model: lora(model, use_dora=True).get_base_model()},
    "adapter on some layers": {"change": lambda model: lora(model, layers_to_transform=[2]).get_base_model()},
    "merged adapter": {"change": merged},
    "one of two adapters": {"change": with_two_adapters("default")},
    "the other of two adapters": {"change": with_two_adapters("other")},
    "a layer trained whole": {
        "change": lambda model: changed(
            "model.embed_tokens.modules_to_save.default.weight", lambda w: w.data.add_(0.1)
        )(lora(model, weights=0.0, modules_to_save=["embed_tokens"]).get_base_model())
    },
}
# Models that store what another of them stores.
SAME_AS = {"merged adapter": "adapter", "one of two adapters": "adapter", "a weight's data": "a weight"}


def test_models_that_store_otherwise_differ() -> None:
    models = {"plain": make()} | {name: make(**options) for name, options in OTHER_MODELS.items()}
    keys = {name: stored(model) for name, model in models.items()}
    made = {name: model.fingerprint() for name, model in models.items()}
    memories = {name: model.new_memory() for name, model in models.items()}
    for (name, model), (other, second) in itertools.combinations(models.items(), 2):
        same = SAME_AS.get(name, name) == SAME_AS.get(other, other)
        alike = keys[name].shape == keys[other].shape and torch.allclose(keys[name], keys[other], atol=1e-5)
        assert alike == same, (name, other)
        for one, memory in ((model, memories[other]), (second, memories[name])):
            if same:
                one.check_memory(memory)
            else:
                assert made[name] != made[other], (name, other)
                with pytest.raises(ValueError, match="this memory was made"):
                    one.check_memory(memory)


SAME_MODELS: dict[str, Callable[[Any], Any]] = {
    "again": lambda model: model,
    "training": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
    "a layer above": changed("model.layers.4.mlp.up_proj.weight", lambda w: w.add_(1.0)),
    "the head": changed("lm_head.weight", lambda w: w.add_(1.0)),
    "the last norm of all": changed("model.norm.weight", lambda w: w.add_(1.0)),
    "the last queries": changed("model.layers.3.self_attn.q_proj.weight", lambda w: w.add_(1.0)),
    "the last output": changed("model.layers.3.self_attn.o_proj.weight", lambda w: w.add_(1.0)),
    "the last MLP": changed("model.layers.3.mlp.down_proj.weight", lambda w: w.add_(1.0)),
    "fresh adapter": lambda model: lora(model, weights=0.0).get_base_model(),
    "adapter switched off": disabled,
    "adapter taken away": lambda model: lora(model).unload(),
    "offloaded": lambda model: cpu_offload(model, execution_device=torch.device("cpu")) or model,
}
SAME_CONFIGS = {
    "no cache": {"use_cache": False},
    "dropout": {"attention_dropout": 0.5},
    "another end": {"eos_token_id": 7},
}


@pytest.mark.parametrize("kind", [*SAME_MODELS, *SAME_CONFIGS])
def test_models_that_store_the_same_are_the_same(kind: str) -> None:
    model = make(config=SAME_CONFIGS.get(kind), change=SAME_MODELS.get(kind, lambda model: model))
    memory = make().new_memory()
    assert model.fingerprint() == memory.fingerprint
    model.check_memory(memory)
    model.eval()
    assert torch.equal(stored(model), stored(make()))


def test_isolated_windows_do_not_depend_on_what_a_memory_weighs() -> None:
    models = [make(settings={"isolated_windows": True, "full_weight_tokens": count}) for count in (0, WINDOW)]
    assert torch.equal(*map(stored, models))
    models[0].check_memory(models[1].new_memory())


# Fields of a configuration that change what is stored and that no weight shows, by family.
FIELDS = [
    ("gemma3_text", {"sliding_window": 5}),
    ("gemma3_text", {"query_pre_attn_scalar": 9}),
    ("gemma3_text", {"hidden_activation": "silu"}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    ("granite", {"attention_multiplier": 0.4}),
    ("granite", {"residual_multiplier": 0.4}),
    ("granite", {"embedding_multiplier": 2.0}),
    ("cohere2", {"layer_norm_eps": 0.1}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_oss", {"num_experts_per_tok": 1}),
    ("gpt_oss", {"swiglu_limit": 0.1}),
    ("gpt_oss", {"swiglu_alpha": 1.0}),
    ("falcon", {"layer_norm_epsilon": 0.1}),
    ("falcon", {"activation": "relu"}),
    ("llama4_text", {"use_qk_norm": False}),
    ("llama4_text", {"num_experts_per_tok": 2}),
    ("llama4_text", {"no_rope_layers": [0, 0, 1, 0]}),
]


@pytest.mark.parametrize(("family", "fields"), FIELDS, ids=str)
def test_what_a_familys_configuration_says_is_seen(family: str, fields: dict[str, Any]) -> None:
    models = []
    for changes in ({}, fields):
        set_seed(0)
        config = ALL[family]()
        for name, value in changes.items():
            setattr(config, name, value)
        plain = AutoModelForCausalLM.from_config(config).eval()
        settings = {"mem_layers": (1, 3), "local_context": WINDOW, "index": "exact"} | PAPER
        models.append(fot.attach_memory(plain, fot.MemoryConfig(**settings)))
    one, other = models
    assert not torch.allclose(stored(one), stored(other), atol=1e-5)
    assert one.fingerprint() != other.fingerprint()
    with pytest.raises(ValueError, match=r"made with \w+=.*, not .*, as in this model"):
        one.check_memory(other.new_memory())


def test_weights_changed_after_a_look() -> None:
    """Also by ways that leave no trace in the tensor, and back."""
    model = make()
    first, weight = model.fingerprint(), model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    weight.data.mul_(1.01)
    assert model.fingerprint() != first
    weight.data.copy_(before)
    assert model.fingerprint() == first
    weight.data = before * 1.01
    assert model.fingerprint() != first


def test_adapters_switched_after_a_look() -> None:
    model = make()
    plain = model.fingerprint()
    around = lora(model)
    tuned, memory = model.fingerprint(), model.new_memory()
    assert tuned != plain
    with around.disable_adapter():
        assert model.fingerprint() == plain
    around.merge_adapter()
    model.check_memory(memory)  # the same sums, in another order
    around.unmerge_adapter()
    around.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.mul_(1.1)
    assert model.fingerprint() not in (plain, tuned)


@pytest.mark.parametrize("checkpoint", DTYPES)
def test_the_same_model_in_another_dtype(checkpoint: torch.dtype, family: str) -> None:
    """A checkpoint loaded in one dtype opens what it made in another."""
    models = []
    for dtype in DTYPES:
        set_seed(0)
        plain = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape))  # no norm is 1.0 in a trained model
                parameter.view(-1)[::7] *= 1e-5  # and some numbers are tiny
        plain = plain.to(checkpoint).to(dtype)
        models.append(fot.attach_memory(plain, fot.MemoryConfig(mem_layers=(1, 3), local_context=WINDOW)))
    memories = [model.new_memory() for model in models]
    for model, memory in itertools.product(models, memories):
        model.check_memory(memory)


@pytest.mark.parametrize("last", [torch.float32, torch.bfloat16])
def test_rounded_twice(last: torch.dtype) -> None:
    """float32 -> float16 -> another is the same model as in float32 and in float16."""
    model = make(change=lambda plain: plain.half().to(last))
    for other in (make(), make(change=lambda plain: plain.half())):
        model.check_memory(other.new_memory())
        other.check_memory(model.new_memory())


@pytest.mark.parametrize("ours", DTYPES)
@pytest.mark.parametrize("theirs", DTYPES)
def test_another_model_in_another_dtype(ours: torch.dtype, theirs: torch.dtype) -> None:
    """A change of 1 % in one tensor is seen through any rounding."""
    other = changed("model.layers.0.mlp.up_proj.weight", lambda w: w.data.mul_(1.01))
    memory = make(change=lambda plain: other(plain).to(theirs)).new_memory()
    with pytest.raises(ValueError, match="made by other weights"):
        make(change=lambda plain: plain.to(ours)).check_memory(memory)


def test_a_memory_of_another_dtype_is_read(tmp_path: Path) -> None:
    memory = make(change=lambda plain: plain.half()).new_memory(key_dtype="float32", value_dtype="float32")
    model = make()
    model.ingest(TOKENS, memory)
    memory.save(tmp_path / "memory")
    output = model.generate(TOKENS[None, :5], memory=Memory.open(tmp_path / "memory"), max_new_tokens=3)
    assert output.shape[1] <= 8


@pytest.mark.parametrize("kind", ["saved", "on disk", "hooks first"])
def test_the_same_model_elsewhere(kind: str, tmp_path: Path) -> None:
    model = make()
    if kind == "saved":
        model.save_pretrained(tmp_path)
        other = fot.FoTForCausalLM.from_pretrained(tmp_path)
    elif kind == "on disk":
        other = make()
        disk_offload(other, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    else:
        other = make(change=lambda plain: cpu_offload(plain, execution_device=torch.device("cpu")) or plain)
    assert other.fingerprint() == model.fingerprint()
    assert torch.equal(stored(other), stored(model))
    assert torch.equal(
        *(one.generate(TOKENS[None].to(one.device), max_new_tokens=3, do_sample=False) for one in (other, model))
    )


def test_other_weights_elsewhere() -> None:
    """Two models whose weights accelerate keeps elsewhere are two models."""
    models = [make(), make(change=changed("model.layers.0.mlp.up_proj.weight", lambda w: w.mul_(1.01)))]
    for model in models:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert models[0].fingerprint() != models[1].fingerprint()
    tuned = make(change=lambda plain: lora(plain).get_base_model())
    expected = tuned.fingerprint()
    cpu_offload(tuned, execution_device=torch.device("cpu"))
    assert tuned.fingerprint() == expected


def test_weights_that_are_nowhere() -> None:
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    model = fot.attach_memory(plain, fot.MemoryConfig(mem_layers=(1, 3), local_context=WINDOW))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is on the meta device, so it has no values"):
        model.fingerprint()


def test_quantised_codes_count() -> None:
    def quantised(code: int) -> Any:
        model = make()
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(torch.full((48, 16), code, dtype=torch.uint8), requires_grad=False)
        return model

    assert quantised(3).fingerprint() == quantised(3).fingerprint() != quantised(4).fingerprint()
    with pytest.raises(ValueError, match="made by other weights"):
        quantised(3).check_memory(quantised(4).new_memory())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("window", "made with local_context=15, not 16, as in this model"),
        ("positions", "made with mem_positionals=False, not True, as in this model"),
        ("isolated windows", "made with isolated_windows=True, not False, as in this model"),
        ("overlap", "made with window_overlap=4, not 0, as in this model"),
        ("full weight", "made with full_weight_tokens=16, not 0, as in this model"),
        ("gates", "made with memory_gates="),
        ("eps", "made with rms_norm_eps=0.01, not 1e-06, as in this model"),
        ("activation", "made with hidden_act=gelu, not silu, as in this model"),
        ("rope theta", "made with rope_parameters="),
    ],
)
def test_a_setting_that_differs_is_named(kind: str, message: str, tmp_path: Path) -> None:
    make(**OTHER_MODELS[kind]).new_memory().save(tmp_path / "memory")
    for memory in (make(**OTHER_MODELS[kind]).new_memory(), Memory.open(tmp_path / "memory")):
        with pytest.raises(ValueError, match=message):
            make().check_memory(memory)


def even_weights(settings: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = make(config={"tie_word_embeddings": True}, settings=settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 97 - 48).reshape(parameter.shape) / 128)
    return model.to(dtype)


def test_memories_of_before(make_model: ModelMaker) -> None:
    """What had a fingerprint without a version still opens with its model, and with no other."""
    model, name = even_weights(), "3ee24963e60b2a0e"  # as it was made then
    assert first_fingerprint(model) == name
    memory = Memory((1, 3), 2, 8, fingerprint=name)
    model.ingest(TOKENS, memory)
    model.check_memory(memory)
    with pytest.raises(ValueError, match=f"{name}, the model's 2:"):
        make().check_memory(memory)
    memory.metadata["memory"] = {"mem_layers": [1, 3], "local_context": WINDOW, "isolated_windows": True}
    with pytest.raises(ValueError, match="made with isolated_windows=True, not False"):
        make().check_memory(memory)


@pytest.mark.parametrize("says", [True, False])
def test_memories_that_say_nothing_of_overlap(says: bool) -> None:
    """Made before the fingerprint knew of it: they are read whatever it was, and nothing else about them is."""
    model, name = even_weights(), "2:4274c7c9bcb4d266"  # as it was made then
    assert Fingerprint.of(model).name_of_before == name
    memory = Memory((1, 3), 2, 8, fingerprint=name)
    if says:
        made_with = Fingerprint.of(model).to_dict()
        for part, names in (("settings", ("mem_layers", "local_context", "mem_positionals", "isolated_windows")),
                            ("config", ("num_attention_heads", "rms_norm_eps", "hidden_act", "head_dim",
                                        "rope_parameters"))):  # fmt: skip
            made_with[part] = {one: made_with[part][one] for one in names}
        memory.metadata[MADE_WITH] = made_with
        even_weights(dtype=torch.bfloat16).check_memory(memory)
    for settings in ({}, {"window_overlap": 4}, {"full_weight_tokens": 32}):
        even_weights(settings).check_memory(memory)
    with pytest.raises(ValueError, match="mem_positionals=True, not False" if says else "by other weights"):
        even_weights({"mem_positionals": False}).check_memory(memory)


@pytest.mark.parametrize("made_with", [None, 3, {}, {"settings": 1}, "samples", {"samples": "%"}, {"samples": "AAAA"}])
def test_a_memory_that_does_not_say_what_it_was_made_with(made_with: Any) -> None:
    """The same model opens it, in the dtype that made it; damage is no crash."""
    memory = make(change=lambda plain: plain.half()).new_memory()
    fields = {} if made_with is None else {MADE_WITH: made_with}
    if isinstance(made_with, dict) and "samples" in made_with:
        fields = {MADE_WITH: memory.metadata[MADE_WITH] | made_with}
    memory.metadata = fields
    make(change=lambda plain: plain.half()).check_memory(memory)
    with pytest.raises(ValueError, match="made by other weights"):
        make().check_memory(memory)


def test_a_memory_without_a_fingerprint() -> None:
    with pytest.raises(ValueError, match="its fingerprint is missing"):
        make().check_memory(Memory((1, 3), 2, 8))


def test_it_is_made_of_few_numbers() -> None:
    found = Fingerprint.of(make())
    assert max(map(len, found.values.values())) <= 32
    assert sum(map(len, found.values.values())) > 500
