"""``generate`` of transformers, with a memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fot.cache import FoTCache
from fot.compat import CACHE, given_cache
from fot.maker import MemoryMaker
from memory import Memory


class GeneratesWithMemory(MemoryMaker):
    """What ``attach_memory`` changes in how a model generates."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        memory: Memory | Sequence[Memory] | None = None,
        update_memory: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``generate`` of transformers, with a prompt of any length and an optional memory.

        Goes on from a ``FoTCache`` unless the caller says ``use_cache=False``. What a checkpoint's own settings say of
        caches is not looked at: ``use_cache: false`` there is left over from training, and changes no token.

        Args:
            inputs: (B, T) prompt ids, padded on the left.
            memory: read by every row, or a list with one for each row. Not written to, so it can serve many prompts.
            update_memory: also store the prompt and the answer (but its last token) in ``memory``.
            generation_config, args, kwargs: as in transformers.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, a memory made by other weights, a cache of another
                kind.
        """
        implementation = _asked("cache_implementation", generation_config, kwargs)
        if implementation is not None:
            raise ValueError(
                f"cache_implementation is {implementation!r}; a model with memory keeps a cache of its own kind: leave "
                "it out"
            )
        early_exit = _asked("assistant_early_exit", generation_config, kwargs)
        if early_exit is not None and early_exit <= max(self.memory_config.layers, default=-1):
            raise ValueError(
                f"assistant_early_exit is {early_exit}, so memory layer {self.memory_config.layers[-1]} would not run: "
                f"use more layers, or assistant_model or prompt_lookup_num_tokens"
            )
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64):
            self.check_ids(ids)
        if update_memory and memory is None:
            raise ValueError("update_memory=True needs a memory to update: pass memory=model.new_memory()")
        cache = given_cache(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (CACHE, "past_key_values")}
        if cache is None and _asked("use_cache", generation_config, kwargs) is not False:
            cache = FoTCache(self.given_memories(memory), "row", write=update_memory)
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()
        elif memory is not None:
            if update_memory or cache is not None:
                raise ValueError("memory= cannot be joined with use_cache=False and update_memory, nor with a cache")
            kwargs["memory"] = memory
        result = super().generate(inputs, generation_config, *args, **{CACHE: cache}, **kwargs)
        if update_memory:
            cache.flush()
        return result

    def _prepare_generation_config(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        # The checkpoint's settings join the caller's here. What it says of caches must not reach the loop, which would
        # feed every token anew to a cache that has it.
        merged, rest = super()._prepare_generation_config(generation_config, *args, **kwargs)
        merged.use_cache = _asked("use_cache", generation_config, kwargs) is not False
        merged.cache_implementation = None
        return merged, rest

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        # transformers warns when an answer passes max_position_embeddings; here that is what the memory is for.
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None
        return criteria


def _asked(name: str, generation_config: Any, kwargs: dict[str, Any]) -> Any:
    """What the caller of ``generate`` says of a setting, by keyword or in a ``GenerationConfig``; None: nothing."""
    return kwargs[name] if kwargs.get(name) is not None else getattr(generation_config, name, None)
