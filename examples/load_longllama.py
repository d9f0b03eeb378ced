"""Load a LongLLaMA checkpoint with transformers' own Auto classes and continue a long prompt.

    python examples/load_longllama.py [FOLDER_OR_HUB_ID]

The default is the hub id syzymon/long_llama_3b (7 GB). No remote code is run: importing fot is enough.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fot  # noqa: F401  teaches transformers the model type "longllama"


def main(name: str = "syzymon/long_llama_3b") -> None:
    """Load, feed a prompt of five windows, print the continuation."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", mem_attention_grouping=(4, 2048)).eval()
    config = model.memory_config
    print(f"memory layers {config.layers}, windows of {config.window} tokens, {config.key_dtype} memory")
    length = 5 * config.window
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        text = "My name is Julien and I like to read. " * length
        prompt = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    except (OSError, ValueError):  # weights without a tokenizer: any tokens do to show that it runs
        tokenizer = None
        prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    answer = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, length:]
    print(f"{length:,} tokens read; continued by:", answer.tolist() if tokenizer is None else tokenizer.decode(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
