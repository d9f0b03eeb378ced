"""A Hugging Face causal language model with an external memory: attach, forward, generate, ingest."""

import functools
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fot.attention import CONTEXT, IMPLEMENTATIONS, PREFIX
from fot.cache import FoTCache
from fot.compat import CACHE, given_cache
from fot.config import CONFIG_KEY, MemoryConfig
from fot.families import attention_modules, check_supported, decoder_of, head, resolve_settings
from fot.generation import GeneratesWithMemory
from fot.implementation import bind_wrapped, set_attention
from fot.ingest import ingest
from fot.inputs import Inputs
from fot.local import LocalCache
from fot.loss import chunked_loss
from fot.recording import recorder_of
from fot.windows import SINGLE_WINDOW_OPTIONS, read
from memory import Memory


def attach_memory(model: Any, config: MemoryConfig | None = None) -> "FoTForCausalLM":
    """Give a loaded Hugging Face causal language model an external memory, in place.

    No parameter is added or renamed: what ``save_pretrained`` writes loads in plain transformers, and for inputs
    within one window the model computes what it did before. May be called again to change settings.

    Args:
        model: a causal language model of a supported family, on any device, quantised or not.
        config: memory settings; None for the defaults.

    Returns:
        the same object, now also a ``FoTForCausalLM``.

    Raises:
        ValueError: a model that has no memory attention (named), or settings that do not fit it.
    """
    check_supported(model)
    config = config or MemoryConfig()
    dtype = str(model.dtype).removeprefix("torch.")
    resolved = resolve_settings(config, model.config, dtype, type(model).__name__)
    if not isinstance(model, FoTForCausalLM):
        model.__class__ = _with_memory(type(model))  # type: ignore[arg-type]
        bind_wrapped(model)
    model.set_attn_implementation(model.config._attn_implementation)
    _remove_hooks(model)
    model.memory_config = resolved
    if model.config.model_type != "longllama":  # that has fields of its own
        setattr(model.config, CONFIG_KEY, config.to_dict() | {"mem_layers": list(resolved.layers)})
    hooks = [hand_over_window] if model.config.model_type == "falcon" else []
    if not resolved.mem_positionals:
        hooks.append(without_positions)
    model.memory_hooks = [
        attention.register_forward_pre_hook(hook, with_kwargs=True)
        for number, attention in enumerate(attention_modules(model))
        if number in resolved.layers
        for hook in hooks
    ]
    return model


def detach_memory(model: Any) -> PreTrainedModel:
    """Undo ``attach_memory``, in place: the same object is the plain transformers model again.

    ``attach_memory(model, config)`` brings the memory back. Saved without it, the model knows nothing of a memory.
    """
    _remove_hooks(model)
    vars(model.config).pop(CONFIG_KEY, None)
    model.__class__ = _plain_class(model)
    bind_wrapped(model)
    set_attention(model, model.config._attn_implementation.removeprefix(PREFIX))
    return model


class FoTForCausalLM(GeneratesWithMemory):
    """What ``attach_memory`` adds to a causal language model. Load one with ``FoTForCausalLM.from_pretrained``.

    Attributes:
        memory_hooks: handles of what ``attach_memory`` hung on memory layers.
        aligned_windows: whether the windows of a padded batch start at its first column, as in LongLLaMA's ``forward``.
            Elsewhere they start at the first token of each row, which then gives the same result as it does alone.
            ``generate`` always does the latter.
    """

    memory_hooks: Sequence[Any] = ()
    aligned_windows = False

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *args: Any, **kwargs: Any) -> "FoTForCausalLM":
        """Load a checkpoint and attach a memory to it.

        Args:
            name_or_path: an alias (``smollm2-135m``, ``long-llama-3b``, ...), a folder, a GGUF file or a hub id.
            kwargs: settings of ``MemoryConfig`` (``mem_layers=[8, 16, 24]``, ``index=...``), and whatever
                ``AutoModelForCausalLM.from_pretrained`` takes (``dtype``, ``device_map``, ``quantization_config``).

        Raises:
            ValueError: a name or a setting that means nothing.
            OSError: the checkpoint cannot be had.
        """
        if issubclass(cls, PreTrainedModel):  # a concrete class, as the Auto classes call it
            return super().from_pretrained(name_or_path, *args, **kwargs)
        from fot.loading import load_model

        return load_model(name_or_path, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FoTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory: Memory | Sequence[Memory] | None = None,
        last_context_length: int | None = None,
        return_dict: bool | None = None,
        cache: FoTCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and a loss, of an input of any length.

        What does not fit the local window goes through in windows that fill a memory, as in LongLLaMA.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) or, with a cache, (B, tokens so far + T); 0 at padding. A single new token is
                taken to be real.
            position_ids: (B, T); None counts the tokens of each row. Where they start anew within a row, and neither
                mask nor cache is wanted, the row holds several texts that do not see one another, as in transformers.
            past_key_values: the ``FoTCache`` of an earlier call, as transformers called it up to 5.23.
            inputs_embeds: (B, T, hidden_size) instead of ``input_ids``.
            labels: (B, T), -100 where no loss is wanted. The loss is taken in chunks, over every label.
            use_cache: return a cache to go on with.
            logits_to_keep: logits of this many last tokens, or of these positions; 0 means all, and costs
                B x T x vocabulary numbers.
            memory: read by every row (or a list, one a row), besides what this input itself moves to memory.
            last_context_length: overrides the setting of this name.
            return_dict: False for a tuple.
            cache: the ``FoTCache`` of an earlier call.
            kwargs: passed to the decoder (``output_hidden_states=True``, ...) if the input fits one window. In memory
                layers, ``output_attentions=True`` (over ``eager``) gives the weights of the window's tokens: a row sums
                to 1 less the share of the memory, which ``fot.trace`` shows.

        Raises:
            ValueError: inputs that do not go together, a memory made by other weights, or ``output_router_logits`` of a
                mixture of experts.
        """
        _refuse_router_loss(self, kwargs)
        cache = self._open_cache(past_key_values if cache is None else cache, memory)
        inputs = Inputs.make(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if not cache.rows:
            cache.open_rows(inputs.batch_size, self)
        cache.watch(self.recorder)
        num_items = kwargs.pop("num_items_in_batch", None)
        for name in SINGLE_WINDOW_OPTIONS:
            if kwargs.get(name) is None and getattr(self.config, name, False):
                kwargs[name] = True
        needs_all = labels is not None or isinstance(logits_to_keep, Tensor) or logits_to_keep == 0
        keep = inputs.length if needs_all else min(int(logits_to_keep), inputs.length)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if not use_cache and attention_mask is None and _is_packed(position_ids):
            outputs = self._packed(inputs, cache, keep, kwargs)
        else:
            outputs = read(
                self,
                inputs,
                cache,
                keep,
                # transformers asks for the logits after the prompt and after each candidate.
                candidates=keep - 1 if cache.revertible and not needs_all else 0,
                last_context_length=last_context_length,
                options=kwargs,
            )
        hidden = outputs.last_hidden_state  # (B, keep, hidden_size)
        loss = None if labels is None else chunked_loss(hidden, labels, partial(head, self), num_items)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -int(logits_to_keep) :]
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=head(self, hidden),
            **{CACHE: cache if use_cache else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def _packed(self, inputs: Inputs, cache: FoTCache, keep: int, options: dict[str, Any]) -> Any:
        """Several texts in a row, one after another: transformers lets none see another, and so do we."""
        if cache.given or cache.seen:
            raise ValueError(
                "position_ids start anew within a row: packed texts read no memory and go on from no cache; give each "
                "text a row of its own"
            )
        if inputs.length > self.memory_config.window:
            raise ValueError(
                f"position_ids start anew within a row of {inputs.length} tokens: packed texts are read in one window "
                f"of {self.memory_config.window}; pack fewer tokens, or give each text a row of its own"
            )
        given = {"input_ids": inputs.ids} if inputs.embeds is None else {"inputs_embeds": inputs.embeds}
        outputs = decoder_of(self)(**given, position_ids=inputs.positions, use_cache=False, **options)
        outputs.last_hidden_state = outputs.last_hidden_state[:, -keep:]
        return outputs

    @property
    def recorder(self) -> Any:
        """What ``fot.trace.record`` set to work in this thread; None for nothing."""
        return recorder_of(self)

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the parameters, or where accelerate brings them that it keeps elsewhere."""
        first: torch.device = super().device
        hook = getattr(decoder_of(self).get_input_embeddings(), "_hf_hook", None) if first.type == "meta" else None
        brought_to = getattr(hook, "execution_device", None)
        return first if brought_to is None else torch.device(brought_to)

    def ingest(
        self,
        ids_or_text: "Tensor | Iterable[int] | str | Path",
        memory: Memory,
        source: str | None = None,
        *,
        tokenizer: Any = None,
        progress: bool | None = None,
    ) -> int:
        """Read tokens or text into a memory; see ``fot.ingest.ingest``."""
        return ingest(self, ids_or_text, memory, source, tokenizer=tokenizer, progress=progress)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers: what computes attention in layers without memory, and elsewhere within one window.

        Raises:
            ValueError: an implementation that the family does not have, as transformers says, or that memory attention
                does not go with.
        """
        if isinstance(attn_implementation, str) and not attn_implementation.startswith(PREFIX):
            if attn_implementation not in IMPLEMENTATIONS:
                raise ValueError(
                    f"memory attention does not go with the attention implementation {attn_implementation!r}; it goes "
                    f"with {', '.join(IMPLEMENTATIONS)}: load the model with attn_implementation='eager', for instance"
                )
            # First without the prefix: transformers refuses what a family does not have only by its own names.
            set_attention(self, attn_implementation, *args, **kwargs)
            attn_implementation = PREFIX + attn_implementation
        set_attention(self, attn_implementation, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when memory is attached, so pickle could not find it by its name.
        plain = _plain_class(self)
        if type(self) is not _with_memory(plain):  # LongLLaMA's, which can be found
            return super().__reduce_ex__(protocol)
        return _rebuilt, (plain,), self.__dict__

    def _open_cache(self, cache: Any, memory: Memory | Sequence[Memory] | None) -> FoTCache:
        if cache is None:
            return FoTCache(self.given_memories(memory), aligned=self.aligned_windows)
        if not isinstance(cache, FoTCache):
            raise ValueError(
                f"{CACHE} is a {type(cache).__name__}; a model with memory goes on from the FoTCache that it "
                "returned, or from None"
            )
        if memory is not None:
            raise ValueError("pass memory= with the first call only: the cache carries it on")
        return cache


def _refuse_router_loss(model: Any, options: dict[str, Any]) -> None:
    asked = options.get("output_router_logits")
    if getattr(model.config, "output_router_logits", False) if asked is None else asked:
        raise ValueError(
            f"{type(model).__name__} with memory gives no output_router_logits, nor the loss that evens out its "
            "experts: set model.config.output_router_logits = False"
        )


def _is_packed(position_ids: Tensor | None) -> bool:
    """Whether positions do not go up by one: transformers' sign of several texts in a row."""
    return position_ids is not None and position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) != 1).any())


@functools.cache
def _with_memory(plain: type) -> type:
    """The class of ``plain`` models with memory. It keeps the name, which save_pretrained writes to config.json."""
    return type(plain.__name__, (FoTForCausalLM, plain), {"__module__": plain.__module__})


def without_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook of memory layers that use no positions: where they attend to a memory, nothing is turned."""
    if kwargs.get(CONTEXT) is not None:
        given = kwargs["position_embeddings"]
        if isinstance(given, Tensor):  # complex, of Llama 4
            kwargs["position_embeddings"] = torch.ones_like(given)
        else:
            cos, sin = given
            kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
    return args, kwargs


def hand_over_window(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook of Falcon's memory layers: its decoder hands its layers a cache, but no keywords."""
    cache = given_cache(kwargs)
    if isinstance(cache, LocalCache):
        kwargs[CONTEXT] = cache
    return args, kwargs


def _plain_class(model: Any) -> Any:
    """The class of a model with memory, without it."""
    return next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, FoTForCausalLM))


def _rebuilt(plain: type) -> Any:
    """An empty model of the class that ``attach_memory`` gives models of ``plain``; unpickling fills it."""
    made: Any = _with_memory(plain)
    return made.__new__(made)


def _remove_hooks(model: Any) -> None:
    for handle in model.memory_hooks:
        handle.remove()
    model.memory_hooks = []
