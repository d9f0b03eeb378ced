"""Tiny models with room for a window of some hundred tokens."""

import copy
from typing import Any

from conftest import FAMILIES, PAPER
from transformers import AutoModelForCausalLM, set_seed

import fot


def make_wide(tokenizer: Any, window: int, family: str = "llama") -> Any:
    """A tiny random model with memory layers 1 and 3 of four, and a tokenizer of its own."""
    set_seed(0)
    config = FAMILIES[family](num_hidden_layers=4)
    config.max_position_embeddings = 4096
    plain = AutoModelForCausalLM.from_config(config).eval()
    settings = {"mem_layers": (1, 3), "local_context": window, "index": "exact"} | PAPER
    model = fot.attach_memory(plain, fot.MemoryConfig(**settings))
    model.tokenizer = copy.deepcopy(tokenizer)
    return model
