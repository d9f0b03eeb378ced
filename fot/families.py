"""Which models can have a memory: those whose attention goes through transformers' ``AttentionInterface``, and Falcon.

What the rest of this package asks of a model beyond that is here.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fot.config import MemoryConfig

# Each is run through tests/test_families.py. Others may work, but nobody has looked.
SUPPORTED_MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "longllama",
    "gemma3_text",
    "smollm3",
    "phi3",
    "olmo2",
    "granite",
    "cohere2",
    "gpt_neox",
    "gpt_oss",
    "falcon",
    "llama4_text",
)


def check_supported(model: Any) -> None:
    """Raise ValueError, naming the model, if memory cannot be attached to it."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{kind!r} models have no memory attention here; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} is no transformers model; attach memory to the model inside it, as "
            "peft_model.get_base_model() gives it"
        )
    if model.get_output_embeddings() is None or decoder_of(model) is model:
        raise ValueError(
            f"{type(model).__name__} is not a causal language model; load {kind} with AutoModelForCausalLM"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{type(model).__name__} caps its attention scores (attn_logit_softcapping); memory attention does not"
        )
    if getattr(config, "alibi", False):
        raise ValueError(
            f"{type(model).__name__} has ALiBi positions (alibi=True), which weigh keys by their distance; memory "
            "attention goes with rotary positions: use a Falcon checkpoint with alibi=False"
        )


def resolve_settings(settings: MemoryConfig, config: Any, dtype: str, name: str) -> MemoryConfig:
    """Settings filled in for a model, its memory layers those that see a whole window.

    Args:
        settings: of its memory.
        config: of the model.
        dtype: in which it computes.
        name: of the model, for messages.

    Raises:
        ValueError: settings that do not fit it.
    """
    shape = (config.num_hidden_layers, config.max_position_embeddings, dtype)
    resolved = settings.resolve(*shape)
    _check_window(config, name, resolved.window)
    whole, sliding = whole_layers(config, resolved.window), getattr(config, "sliding_window", None)
    short = [layer for layer in resolved.layers if layer not in whole]
    if short and settings.mem_layers is not None and sliding is None:
        raise ValueError(
            f"layer {short[0]} of {name} attends within chunks of {config.attention_chunk_size} tokens, and so has no "
            f"memory: choose mem_layers among {whole}"
        )
    if short and settings.mem_layers is not None:
        raise ValueError(
            f"layer {short[0]} of {name} attends within a sliding window of {sliding} tokens, shorter than the local "
            f"window of {resolved.window}: choose mem_layers among {whole}, or local_context={sliding}"
        )
    # A sliding window as long as the local one would do, but a layer that has one never learnt to look farther.
    far = [layer for layer in whole if _kinds(config)[layer] != "sliding_attention"] or whole
    if settings.mem_layers is None and not set(resolved.layers) <= set(far):
        near = {min(far, key=lambda one: abs(one - layer)) for layer in resolved.layers}
        resolved = settings.resolve(*shape, default_layers=tuple(sorted(near)))
    return resolved


def _check_window(config: Any, name: str, window: int) -> None:
    """Raise ValueError if a local window of so many tokens is too long for how a model attends."""
    sliding = getattr(config, "sliding_window", None)
    if not whole_layers(config, window):
        raise ValueError(
            f"{name} attends within a sliding window of {sliding} tokens, shorter than the local window of {window}: "
            f"use windows of at most {sliding} tokens (local_context={sliding})"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and window > chunk and "chunked_attention" in config.layer_types:
        raise ValueError(
            f"{name} attends within chunks of {chunk} tokens, shorter than the local window of {window}: use windows "
            f"of at most {chunk} tokens (local_context={chunk})"
        )
    # Llama 4 sharpens the attention of later tokens by their place in the cache, padding counted.
    if getattr(config, "attn_temperature_tuning", False) and window >= config.floor_scale:
        longest = config.floor_scale - 1
        raise ValueError(
            f"{name} attends with another temperature from token {config.floor_scale} on (attn_temperature_tuning), "
            f"within the local window of {window}: use windows of at most {longest} tokens (local_context={longest})"
        )


def whole_layers(config: Any, window: int) -> list[int]:
    """Layers that see a whole local window, so that the memory can continue it: all but those with a shorter sliding
    window, and those that attend within chunks."""
    sliding = getattr(config, "sliding_window", None)
    short = {"chunked_attention"} | ({"sliding_attention"} if sliding and sliding < window else set())
    return [number for number, kind in enumerate(_kinds(config)) if kind not in short]


def _kinds(config: Any) -> list[str]:
    """How each layer attends: ``layer_types``, or one kind for all."""
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else ""
    return getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers


def decoder_of(model: Any) -> Any:
    """A causal language model's decoder: ``base_model``, or ``model`` where transformers finds none (Llama 4)."""
    decoder = model.base_model
    return getattr(model, "model", model) if decoder is model else decoder


def layers_of(decoder: Any) -> nn.ModuleList:
    """The layers of a decoder, from the lowest."""
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def attention_modules(model: Any) -> Iterator[nn.Module]:
    """The attention module of each layer, from the lowest."""
    for layer in layers_of(decoder_of(model)):
        yield next(
            getattr(layer, name) for name in ("self_attn", "attention", "self_attention") if hasattr(layer, name)
        )


def key_value_shape(model: Any) -> tuple[int, int]:
    """(KV heads, size of a head) of every layer."""
    config, first = model.config, next(attention_modules(model))
    heads = getattr(config, "num_key_value_heads", None) or getattr(first, "num_kv_heads", config.num_attention_heads)
    size = getattr(first, "head_dim", None) or getattr(first, "head_size", None)
    return heads, size or config.hidden_size // config.num_attention_heads


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., hidden_size), with what some families do to them."""
    config, logits = model.config, model.get_output_embeddings()(hidden)
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if config.model_type.startswith("cohere"):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * (logits / cap).tanh()
