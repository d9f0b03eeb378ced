"""Weights in 4 bits by bitsandbytes (NF4 of QLoRA, arXiv 2305.14314), and what of a model cannot be in them."""

import copy
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch

# Logits are computed from 16-bit weights, as transformers does where nobody names modules to spare.
OUTPUT_LAYERS = ("lm_head", "embed_out")
# Bytes of a weight in NF4, scales included, which are quantised themselves (section 3 there).
NF4_BYTES = 0.516


def nf4(compute_dtype: torch.dtype, spared: Iterable[str] = ()) -> Any:
    """Arguments for ``from_pretrained(quantization_config=...)``.

    Args:
        compute_dtype: in which the layers compute.
        spared: regular expressions of modules that keep their dtype.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError("4-bit weights (nf4) take bitsandbytes: pip install 'fot[quantization]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[*OUTPUT_LAYERS, *spared],
    )


def spare(config: Any, modules: Iterable[str]) -> Any:
    """A quantization config by which these modules keep their dtype, too; of other kinds, the config as it is."""
    modules = list(modules)
    if not modules or not hasattr(config, "llm_int8_skip_modules"):
        return config
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or OUTPUT_LAYERS), *modules]
    return config


def is_quantised(model: Any) -> bool:
    """Whether some of a loaded model's weights are packed, so that nothing can be added to them."""
    return getattr(model, "quantization_method", None) is not None
