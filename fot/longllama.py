"""LongLLaMA checkpoints (``model_type: longllama``), loaded by the Auto classes without remote code.

Importing this module, as ``import fot`` does, registers them.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fot.config import MemoryConfig
from fot.model import FoTForCausalLM, attach_memory


class LongLlamaConfig(LlamaConfig):
    """A Llama configuration with LongLLaMA's memory settings, under the names of the authors' code.

    ``max_position_embeddings`` is the length of a local window there. ``index`` and ``top_k`` are ours
    (``MemoryConfig``); a checkpoint without them gets the defaults.
    """

    model_type = "longllama"

    pad_token_id: int | None = 0
    last_context_length: int = 1024
    mem_layers: list[int] | tuple[int, ...] = ()
    mem_positionals: bool = True
    mem_dtype: str = "bfloat16"
    mem_attention_grouping: Any = None  # (heads, queries); JSON makes it a list
    index: str = "auto"
    top_k: int | None = None

    def memory_config(self) -> MemoryConfig:
        """The same settings in our words."""
        return MemoryConfig(
            mem_layers=tuple(self.mem_layers),
            local_context=self.max_position_embeddings,
            last_context_length=self.last_context_length,
            overflow_keep=0,
            full_weight_tokens=0,
            window_overlap=0,
            mem_positionals=self.mem_positionals,
            key_dtype=self.mem_dtype,
            value_dtype=self.mem_dtype,
            mem_attention_grouping=self.mem_attention_grouping,
            index=self.index,
            top_k=self.top_k,
            align_padding="batch",
        )


class LongLlamaForCausalLM(FoTForCausalLM, LlamaForCausalLM):
    """LongLLaMA for causal language modelling; the same numbers as the authors' code."""

    config_class = LongLlamaConfig

    def __init__(self, config: LongLlamaConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        attach_memory(self, config.memory_config())


AutoConfig.register("longllama", LongLlamaConfig)
AutoModelForCausalLM.register(LongLlamaConfig, LongLlamaForCausalLM)
