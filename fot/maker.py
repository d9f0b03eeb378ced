"""Memories of a model: new ones, and whether one is of its making."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fot.config import MemoryConfig, check_memory_layers, merged
from fot.families import key_value_shape
from fot.fingerprint import Fingerprint, difference, tokenizer_fingerprint, weights_fingerprint
from fot.origin import origin
from memory import Memory

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel
    from typing_extensions import Self

    class CausalLM(PreTrainedModel, GenerationMixin):
        """What every class here is mixed into, for type checkers."""

        # transformers wraps these, and type checkers lose their first argument.
        def to(self, *args: Any, **kwargs: Any) -> Self: ...
        def cuda(self, *args: Any, **kwargs: Any) -> Self: ...
else:
    CausalLM = object


class MemoryMaker(CausalLM):
    """A causal language model that makes memories.

    Attributes:
        memory_config: resolved settings.
        tokenizer: set by ``from_pretrained`` if the checkpoint has one; ``ingest`` of text needs it.
        loaded_as: the name that ``from_pretrained`` was given, paths absolute; memories note it.
    """

    memory_config: MemoryConfig
    tokenizer: Any = None
    loaded_as: str = ""

    def new_memory(self, **settings: Any) -> Memory:
        """An empty memory for this model.

        Args:
            settings: what differs from ``memory_config``: ``key_dtype``, ``value_dtype``, ``index``, ``top_k``,
                ``device``.
        """
        config = self.memory_config
        defaults = {
            "key_dtype": config.key_dtype,
            "value_dtype": config.value_dtype,
            "index": config.index,
            "top_k": config.top_k,
            "device": config.memory_device,
        }
        heads, head_dim = key_value_shape(self)
        made_with = Fingerprint.of(self)
        memory = Memory(
            config.layers,
            heads,
            head_dim,
            fingerprint=made_with.name,
            **merged(defaults, settings),
        )
        memory.metadata |= origin(self, made_with)
        return memory

    def fingerprint(self) -> str:
        """Names the weights and settings that a memory's keys and values depend on."""
        return weights_fingerprint(self)

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError if token ids are missing or outside the vocabulary."""
        if ids.numel() == 0:
            raise ValueError("the prompt is empty: give at least one token")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary 0..{self.config.vocab_size - 1}: "
                "use the tokenizer that belongs to this model"
            )

    def check_memory(self, memory: Memory) -> None:
        """Raise ValueError, saying what differs, if a memory was made by other weights, settings or tokenizer."""
        check_memory_layers(self.memory_config)
        heads, dim = key_value_shape(self)
        ours = (self.memory_config.layers, heads, dim)
        theirs = (memory.layers, memory.num_key_value_heads, memory.head_dim)
        if ours != theirs:
            raise ValueError(
                "this memory was made by another model: it has (layers, KV heads, head size) = "
                f"{theirs}, the model {ours}; load the model that made it, or ingest again with this one"
            )
        differs = difference(self, memory)
        if differs:
            raise ValueError(
                f"this memory was made with {differs}, as in this model: load the model as it was then, or ingest "
                "again with this one"
            )
        if differs is None:
            raise ValueError(
                f"this memory was made by other weights: its fingerprint is {memory.fingerprint or 'missing'}, the "
                f"model's {self.fingerprint()}; load the model that made it, or ingest again with this one"
            )
        tokenizer = memory.metadata.get("tokenizer")
        if tokenizer and self.tokenizer is not None and tokenizer != tokenizer_fingerprint(self.tokenizer):
            raise ValueError(
                f"this memory was made with another tokenizer: its fingerprint is {tokenizer}, the model's "
                f"{tokenizer_fingerprint(self.tokenizer)}; load that tokenizer, or ingest again with this one"
            )

    def given_memories(self, memory: Memory | Sequence[Memory] | None) -> list[Memory]:
        """What ``memory=`` names, checked."""
        given = [] if memory is None else [memory] if isinstance(memory, Memory) else list(memory)
        for one in given:
            self.check_memory(one)
        return given
