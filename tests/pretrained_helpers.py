"""Tiny checkpoints for the tests of fot.pretrained."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_complete(folder: Path, content: str = "{}") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    (folder / "model.safetensors").write_bytes(b"")


def tiny_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_gguf(path: Path) -> Path:
    """A one-layer random Llama in float32 with SmolLM2's kind of byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ċ Ċ", "Ġ Ġ", "Ġ i"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *sorted(ByteLevel.alphabet()), *[merge.replace(" ", "") for merge in merges]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Title")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    rng = np.random.default_rng(0)
    for name, shape in named.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
