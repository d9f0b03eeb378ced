"""Memory attention against the method written out slowly, for every family."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import FAMILIES, PAPER, VOCABULARY, WINDOW, ModelMaker
from peft import LoraConfig, get_peft_model
from reference import _run, reference_logits
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.gemma2 import Gemma2Config
from transformers.models.mistral import MistralConfig

import fot
from fot.cache import FoTCache

Draw = Callable[..., torch.Tensor]

# float32 on both sides; merging by log-sum-exp adds in another order than one softmax.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
FULL = {"last_context_length": WINDOW}  # every window full, so that references can be cut by hand
# With one of two settings each, where what families differ in has nothing to do with it: one of them tries both.
ALTERNATELY = [(family, number % 2 == 0) for number, family in enumerate(FAMILIES) if family != "llama"]


@torch.no_grad()
def test_long_input_equals_reference(family: str, make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(family, layers=5, **FULL)
    tokens = ids(4 * WINDOW)
    logits = model(tokens).logits[:, -WINDOW:]
    expected = reference_logits(model, list(tokens.split(WINDOW, dim=1)))
    torch.testing.assert_close(logits, expected, **CLOSE)
    without = reference_logits(model, [tokens[:, -WINDOW:]])
    assert (logits - without).abs().max() > 0.05, "the memory must matter, or this test shows nothing"


@pytest.mark.parametrize("positionals", [True, False])
@torch.no_grad()
def test_positions_in_memory_layers(positionals: bool, family: str, make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(family, mem_positionals=positionals, **FULL)
    tokens = ids(3 * WINDOW)
    expected = reference_logits(model, list(tokens.split(WINDOW, dim=1)))
    torch.testing.assert_close(model(tokens).logits[:, -WINDOW:], expected, **CLOSE)


@torch.no_grad()
def test_ingest_then_read_equals_reference(family: str, make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(family)
    past, prompt = ids(3 * WINDOW, seed=1), ids(WINDOW - 3, seed=2)
    memory = model.new_memory()
    assert model.ingest(past, memory) == 3 * WINDOW
    logits = model(prompt, memory=memory).logits
    expected = reference_logits(model, [prompt], past=list(past.split(WINDOW, dim=1)))
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert len(memory) == 3 * WINDOW, "reading must not write"
    assert memory.token_ids().tolist() == past[0].tolist()


@torch.no_grad()
def test_short_input_equals_plain_model(family: str, make_model: ModelMaker, make_plain: ModelMaker, ids: Draw) -> None:
    tokens = ids(WINDOW, rows=2)
    torch.testing.assert_close(make_model(family)(tokens).logits, make_plain(family)(tokens).logits, **CLOSE)


@torch.no_grad()
def test_saved_model_loads_plainly_and_back(
    family: str, make_model: ModelMaker, make_plain: ModelMaker, ids: Draw, tmp_path: Path
) -> None:
    model, tokens = make_model(family), ids(WINDOW)
    names = list(make_plain(family).state_dict())
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(make_plain(family))
    torch.testing.assert_close(plain(tokens).logits, make_plain(family)(tokens).logits, atol=0, rtol=0)
    again = fot.FoTForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, fot.FoTForCausalLM)
    assert again.memory_config == model.memory_config
    long = ids(3 * WINDOW)
    torch.testing.assert_close(again(long).logits, model(long).logits, atol=0, rtol=0)


def test_auto_class_warns_that_it_loads_without_the_memory(make_model: ModelMaker, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"without it: load it with fot\.FoTForCausalLM\.from_pretrained") as caught:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fot.FoTForCausalLM.from_pretrained(tmp_path)
        fot.attach_memory(plain)
        fot.detach_memory(plain).save_pretrained(tmp_path / "plain")
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


@torch.no_grad()
def test_attach_and_detach(family: str, make_plain: ModelMaker, ids: Draw) -> None:
    plain = make_plain(family)
    expected = plain(ids(40)).logits
    kind = type(plain)
    model = fot.attach_memory(plain, fot.MemoryConfig(mem_layers=(1,), local_context=WINDOW))
    assert model is plain
    assert isinstance(model, fot.FoTForCausalLM)
    assert isinstance(model, kind)
    assert (model(ids(40)).logits - expected).abs().max() > 0.05
    fot.detach_memory(model)
    assert type(plain) is kind
    torch.testing.assert_close(plain(ids(40)).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize(("family", "hooks_first"), [("llama", True), ("llama", False), *ALTERNATELY])
@torch.no_grad()
def test_weights_kept_elsewhere(
    hooks_first: bool, family: str, make_plain: ModelMaker, make_model: ModelMaker, ids: Draw
) -> None:
    """accelerate's hooks, as device_map and offloading set them, move weights in and out around each module."""
    tokens = ids(3 * WINDOW)
    expected = make_model(family)(tokens).logits
    model = make_plain(family) if hooks_first else make_model(family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if hooks_first:
        fot.attach_memory(model, fot.MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, index="exact", **PAPER))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)
    assert len(model(tokens, logits_to_keep=1).past_key_values.rows[0].own) == 3 * WINDOW - WINDOW // 2


@torch.no_grad()
def test_attaching_again_changes_settings(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model("llama", mem_layers=(1, 3))
    fot.attach_memory(model, fot.MemoryConfig(mem_layers=(2,), local_context=WINDOW, index="exact", **FULL, **PAPER))
    tokens = ids(3 * WINDOW)
    expected = reference_logits(model, list(tokens.split(WINDOW, dim=1)))
    torch.testing.assert_close(model(tokens).logits[:, -WINDOW:], expected, **CLOSE)


@torch.no_grad()
def test_eager_attention_gives_the_same(family: str, make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(family), ids(50)
    expected = model(tokens).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)


@pytest.mark.parametrize("keep", [1, 5, 40, 60])
@torch.no_grad()
def test_logits_to_keep(keep: int, make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(), ids(50)
    everything = model(tokens).logits
    kept = model(tokens, logits_to_keep=keep).logits
    assert kept.shape == (1, min(keep, 50), VOCABULARY)
    torch.testing.assert_close(kept, everything[:, -keep:], **CLOSE)
    chosen = torch.tensor([0, 17, 49])
    torch.testing.assert_close(model(tokens, logits_to_keep=chosen).logits, everything[:, chosen], **CLOSE)


def test_one_logit_costs_one_row_of_the_head(make_model: ModelMaker, ids: Draw) -> None:
    """A long prompt never makes a tokens x vocabulary tensor, and its stored windows stop at the last memory layer."""
    model = make_model()
    rows: list[int] = []
    top: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    model.model.layers[-1].register_forward_hook(lambda module, args, output: top.append(1))
    with torch.no_grad():
        model(ids(20 * WINDOW), logits_to_keep=1)
    assert rows == [1]
    assert len(top) == 1


def test_loss_equals_that_of_the_logits(family: str, make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(family), ids(50, rows=2)
    labels = tokens.clone()
    labels[0, :10] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels, logits_to_keep=1)
        logits = model(tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape[1] == 1


def test_gradients_equal_the_reference(family: str, make_model: ModelMaker, ids: Draw) -> None:
    """The last window's gradient with the stored windows as constants; merged parts must not lose any of it."""
    model, tokens = make_model(family, **FULL), ids(2 * WINDOW)
    with torch.no_grad():
        memory = model.new_memory()
        model.ingest(tokens[:, :WINDOW], memory)
    weight = model.model.layers[1].self_attn.q_proj.weight
    model(tokens[:, WINDOW:], memory=memory).logits.square().mean().backward()
    merged, weight.grad = weight.grad, None
    local = tokens[:, WINDOW:]
    frozen: dict[int, Any] = {}
    for layer in model.memory_config.layers:
        frozen[layer] = [(memory[layer].keys()[None], memory[layer].values()[None])]
    model.lm_head(_run(model, local, frozen)).square().mean().backward()
    torch.testing.assert_close(merged, weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("family", "isolated"), [("llama", True), ("llama", False), *ALTERNATELY])
def test_gradients_over_several_windows(isolated: bool, family: str, make_model: ModelMaker, ids: Draw) -> None:
    """A loss over five windows at once, as a plain training loop takes it: what is stored passes no gradient on."""
    model, tokens = make_model(family, isolated_windows=isolated), ids(3 * WINDOW + 9)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    memory: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in model.memory_config.layers}
    hidden = []
    for window in tokens.split([WINDOW, WINDOW, WINDOW, 1, WINDOW // 2], dim=1):  # half a window stays local
        before = {layer: [(k.detach(), v.detach()) for k, v in pairs] for layer, pairs in memory.items()}
        hidden.append(_run(model, window, before))
        alone: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in memory}
        if isolated:
            _run(model, window, alone)
        for layer in memory:
            memory[layer].append((alone if isolated else before)[layer][-1])
    logits = model.lm_head(torch.cat(hidden, dim=1))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE, msg=name)


@torch.no_grad()
def test_cached_steps_equal_one_pass(family: str, make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(family), ids(WINDOW)
    expected = model(tokens).logits
    cache, steps = None, []
    for piece in tokens.split([5, 1, 1, 4, 5], dim=1):
        output = model(piece, past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, **CLOSE)
    assert isinstance(cache, FoTCache)
    assert cache.get_seq_length() == WINDOW


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(family: str, make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(family)
    rows = [ids(count, seed=count) for count in (70, 41, 9)]
    alone = [model(row).logits[0] for row in rows]
    for side in ("left", "right"):
        tokens = torch.zeros(3, 70, dtype=torch.int64)
        mask = torch.zeros(3, 70, dtype=torch.int64)
        for number, row in enumerate(rows):
            where = slice(-row.shape[1], None) if side == "left" else slice(0, row.shape[1])
            tokens[number, where], mask[number, where] = row[0], 1
        logits = model(tokens, attention_mask=mask).logits
        for number, expected in enumerate(alone):
            torch.testing.assert_close(logits[number][mask[number].bool()], expected, **CLOSE)


@torch.no_grad()
def test_embeddings_instead_of_ids(make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(), ids(50)
    embedded = model(inputs_embeds=model.model.embed_tokens(tokens)).logits
    torch.testing.assert_close(embedded, model(tokens).logits, **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@torch.no_grad()
def test_compact_memories_stay_close(dtype: str, make_model: ModelMaker, ids: Draw) -> None:
    tokens = ids(4 * WINDOW)
    exact = make_model()(tokens).logits
    compact = make_model(key_dtype=dtype, value_dtype=dtype)(tokens).logits
    difference = (compact - exact).abs().max() / exact.abs().max()
    assert 0 < difference < 0.05


@torch.no_grad()
def test_top_k_of_everything_is_dense(make_model: ModelMaker, ids: Draw) -> None:
    tokens = ids(4 * WINDOW)
    dense = make_model()(tokens).logits
    torch.testing.assert_close(make_model(top_k=4 * WINDOW)(tokens).logits, dense, **CLOSE)
    assert (make_model(top_k=2)(tokens).logits - dense).abs().max() > 0.01


def test_bfloat16_model_runs(family: str, make_plain: ModelMaker, ids: Draw) -> None:
    model = fot.attach_memory(make_plain(family).to(torch.bfloat16), fot.MemoryConfig(local_context=WINDOW))
    with torch.no_grad():
        assert model(ids(50)).logits.isfinite().all()
    assert model.memory_config.key_dtype == "bfloat16"


class TestRefusals:
    def test_other_architectures(self) -> None:
        config = Gemma2Config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                              num_key_value_heads=1, head_dim=8, vocab_size=16)  # fmt: skip
        with pytest.raises(ValueError, match="'gemma2' models have no memory attention"):
            fot.attach_memory(AutoModelForCausalLM.from_config(config))

    def test_sliding_windows(self) -> None:
        config = MistralConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                               num_key_value_heads=1, vocab_size=16, sliding_window=32)  # fmt: skip
        with pytest.raises(ValueError, match="MistralForCausalLM attends within a sliding window of 32"):
            fot.attach_memory(AutoModelForCausalLM.from_config(config))

    def test_wrapped_models(self, make_plain: ModelMaker) -> None:
        wrapped = get_peft_model(make_plain(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"PeftModel is no transformers model.*get_base_model"):
            fot.attach_memory(wrapped)
        assert isinstance(fot.attach_memory(wrapped.get_base_model()), fot.FoTForCausalLM)

    def test_models_without_a_head(self, make_plain: ModelMaker) -> None:
        with pytest.raises(ValueError, match="not a causal language model"):
            fot.attach_memory(make_plain().model)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mem_layers": (4,)}, r"memory layer 4 is out of range: the model has layers 0\.\.3"),
            ({"mem_layers": (1, 1)}, "names a layer twice"),
            ({"local_context": 65}, "has only 64 positions"),
            ({"last_context_length": 17}, "longer than the window"),
            ({"overflow_keep": 16}, "would have no room for new tokens"),
            ({"top_k": 0}, "top_k is 0"),
            ({"key_dtype": "int4"}, "key_dtype is 'int4'"),
            ({"index": "nonsense"}, "nonsense"),
            ({"index": "clusters", "top_k": 9}, "top_k is 9, but clusters attends to a share of the keys"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str, make_model: ModelMaker) -> None:
        with pytest.raises(ValueError, match=message):
            make_model(**settings)

    def test_a_saved_number_of_pairs_gives_way_to_clusters(self, make_model: ModelMaker, tmp_path: Path) -> None:
        model = make_model(top_k=7)
        assert (model.new_memory().top_k, model.new_memory(index="clusters").top_k) == (7, None)
        model.save_pretrained(tmp_path)
        again: Any = fot.FoTForCausalLM.from_pretrained(tmp_path, index="clusters")
        assert (again.memory_config.index, again.memory_config.top_k) == ("clusters", None)
        again = fot.FoTForCausalLM.from_pretrained(tmp_path, index="Flat")
        assert again.memory_config.top_k == 7

    def test_memory_of_other_weights(self, make_model: ModelMaker, ids: Draw) -> None:
        memory = make_model(seed=1).new_memory()
        model = make_model(seed=2)
        for attempt in (lambda: model.ingest(ids(4), memory), lambda: model.generate(ids(4), memory=memory)):
            with pytest.raises(ValueError, match=f"{memory.fingerprint}.*{model.fingerprint()}"):
                attempt()

    def test_memory_of_another_shape(self, make_model: ModelMaker, ids: Draw) -> None:
        memory = make_model(mem_layers=(2,)).new_memory()
        with pytest.raises(ValueError, match="made by another model"):
            make_model()(ids(4), memory=memory)

    def test_foreign_caches(self, make_model: ModelMaker, ids: Draw) -> None:
        with pytest.raises(ValueError, match="DynamicCache"):
            make_model()(ids(4), past_key_values=DynamicCache())

    def test_inputs(self, make_model: ModelMaker, ids: Draw) -> None:
        model = make_model()
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model()
        with pytest.raises(ValueError, match="at least one each"):
            model(torch.zeros(1, 0, dtype=torch.int64))
        with pytest.raises(ValueError, match="covers 3 tokens; the input has 4"):
            model(ids(4), attention_mask=torch.ones(1, 3))
        with pytest.raises(ValueError, match="output_hidden_states is kept within one window"):
            model(ids(40), output_hidden_states=True)


def test_fingerprint_follows_the_weights(make_model: ModelMaker) -> None:
    model = make_model(seed=3, layers=5)
    first = model.fingerprint()
    assert make_model(seed=3, layers=5).fingerprint() == first
    assert make_model(seed=3, layers=5).to(torch.bfloat16).fingerprint() == first
    assert make_model(seed=4, layers=5).fingerprint() != first
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight.add_(1.0)
    assert model.fingerprint() == first, "layers above the last memory layer store nothing"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert model.fingerprint() != first


@torch.no_grad()
def test_hidden_states_within_a_window(make_model: ModelMaker, ids: Draw) -> None:
    output = make_model()(ids(10), output_hidden_states=True)
    assert len(output.hidden_states) == 5


def test_gradient_checkpointing_with_a_memory_is_refused(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model().train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    model(ids(10), labels=ids(10)).loss.backward()  # within a window there is nothing to hide
    with pytest.raises(ValueError, match="gradient checkpointing hides the memory"):
        model(ids(40), labels=ids(40))


def test_settings_that_changed_no_result_may_stand_in_what_was_saved() -> None:
    saved = {"mem_layers": [1], "mem_attention_grouping": [4, 2048], "align_padding": "row"}
    assert fot.MemoryConfig.from_dict(saved) == fot.MemoryConfig(mem_layers=(1,))
    with pytest.raises(ValueError, match="unknown memory setting 'nonsense'"):
        fot.MemoryConfig.from_dict(saved | {"nonsense": 1})
