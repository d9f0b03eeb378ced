"""Falcon, whose layers choose the class of their attention by the implementation's name and call no
``AttentionInterface``: a class for the names that transformers' table of them does not have.

A layer of such a class is what its constructor would have made of it, since all classes have the same parameters.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.models.falcon.modeling_falcon import FALCON_ATTENTION_CLASSES, FalconAttention, apply_rotary_pos_emb

# The attention function ``eager`` of this module's class; see ``fot.attention``.
from transformers.models.llama.modeling_llama import eager_attention_forward

__all__ = ["FalconInterfaceAttention", "attention_class", "eager_attention_forward"]


class FalconInterfaceAttention(FalconAttention):
    """Falcon's attention by a function of transformers' ``AttentionInterface``, over KV heads that are not repeated."""

    @property
    def num_key_value_groups(self) -> int:
        """Query heads of a KV head: what attention functions ask for."""
        return self.num_heads // self.num_kv_heads

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``FalconAttention.forward``, without ALiBi.

        Args:
            hidden_states: (B, T, hidden_size).
            alibi: None.
            attention_mask: of the implementation under this one.
            layer_past: the cache.
            position_embeddings: cos and sin, (B, T, D) each.
            kwargs: passed to the attention function.

        Returns:
            (B, T, hidden_size), and weights (B, H, T, S) if the attention function gives any.
        """
        assert alibi is None, "fot.families refuses models with ALiBi"
        assert position_embeddings is not None
        queries, keys, values = self._split_heads(self.query_key_value(hidden_states))
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if layer_past is not None:
            keys, values = layer_past.update(keys, values, self.layer_idx)
        attend = AttentionInterface().get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, queries, keys, values, attention_mask, scaling=self.inv_norm_factor, dropout=0.0, **kwargs
        )
        return self.dense(output.flatten(2)), weights

    def _split_heads(self, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, ...) as projected -> queries (B, H, T, D), keys and values (B, G, T, D).

        Each KV head's keys and values come behind the queries of its group, in all of Falcon's layouts.
        """
        grouped = fused_qkv.unflatten(-1, (self.num_kv_heads, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, H/G+2, D)
        queries = grouped[..., :-2, :].transpose(2, 3).flatten(1, 2)
        return queries, grouped[..., -2, :], grouped[..., -1, :]


def attention_class(name: str) -> type[FalconAttention]:
    """The class for an implementation: Falcon's own, or else the one that asks ``AttentionInterface`` for it."""
    return FALCON_ATTENTION_CLASSES.get(name, FalconInterfaceAttention)
