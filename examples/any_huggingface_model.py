"""Give a Llama, Mistral, Qwen2 or Qwen3 model of transformers a memory, and continue a long text with it and without.

    python examples/any_huggingface_model.py Qwen/Qwen2.5-0.5B emma.txt --mem-layers 6 12 18
    python examples/any_huggingface_model.py mistralai/Mistral-7B-v0.3 emma.txt --window 4096

The model need not be trained for it. Then memory attention distracts as it grows, which is what fine-tuning with
crossbatch mends (``fot train``): compare the two continuations.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fot


def continued(model: Any, prompt: torch.Tensor, tokens: int, memory: fot.Memory | None = None) -> str:
    """The text that follows a prompt (1, T)."""
    output = model.generate(prompt, memory=memory, max_new_tokens=tokens, do_sample=False)
    return repr(model.tokenizer.decode(output[0, prompt.shape[1] :]))


def main() -> None:
    """Load, attach, read all of the text but its end, continue from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("text", type=Path)
    parser.add_argument("--mem-layers", nargs="+", type=int, metavar="N", help="default: at 1/4, 1/2 and 3/4 of them")
    parser.add_argument("--window", type=int, metavar="N", help="tokens (default: the model's, at most 2,048)")
    parser.add_argument("--tokens", type=int, default=32, help="longest continuation")
    args = parser.parse_args()

    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    model = fot.attach_memory(plain, fot.MemoryConfig(mem_layers=args.mem_layers, local_context=args.window))
    model.tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = model.memory_config
    print(f"{config.layers} of {plain.config.num_hidden_layers} layers with memory, windows of {config.window} tokens")

    ids = model.tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    end = config.window // 2
    if ids.shape[1] <= end:
        parser.error(f"{args.text} has {ids.shape[1]} tokens; give a text of more than {end}")
    memory = model.new_memory()
    model.ingest(ids[:, :-end], memory, source=args.text.name)
    print(memory.describe())
    print("with memory:   ", continued(model, ids[:, -end:], args.tokens, memory))
    print("without memory:", continued(model, ids[:, -end:], args.tokens))


if __name__ == "__main__":
    main()
