"""Model FLOPs of training, by the rule of the PaLM paper (arXiv 2204.02311, appendix B)."""

from typing import Any


def flops_per_token(model: Any, window: int, mem_layers: int, d: int) -> float:
    """FLOPs of a forward and a backward pass for one token, recomputation not counted.

    Six for each weight of a matrix that tokens go through, all taken as trained, and twelve for each key that a query
    of a head meets: those of its window, and in a memory layer those of d other windows.

    Args:
        model: of transformers, plain.
        window: tokens of a window.
        mem_layers: number of memory layers.
        d: contexts of a window.
    """
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = window * (config.num_hidden_layers + mem_layers * d)
    return 6.0 * weights + 12.0 * config.num_attention_heads * head_dim * keys
