"""Hide a number in a long text, read the text into a memory, ask for the number.

    python examples/passkey.py [MODEL] [TOKENS]

MODEL is an alias, a folder, a GGUF file or a hub id (default: smollm2-135m), TOKENS the length of the text (4096).
"""

import random
import sys

import torch

import fot
from fot.evaluation.passkey import make_prompt


def main(name: str = "smollm2-135m", tokens: str = "4096") -> None:
    """Read, ask, print."""
    model = fot.FoTForCausalLM.from_pretrained(name)
    prompt = make_prompt(model.tokenizer, int(tokens), random.Random(0))
    question = model.memory_config.local_length(len(prompt.ids))

    memory = model.new_memory()
    if len(prompt.ids) > question:
        model.ingest(prompt.ids[:-question], memory, source="haystack", progress=True)
    last = torch.tensor([prompt.ids[-question:]])
    answer = model.generate(last, memory=memory, max_new_tokens=8, do_sample=False)

    print(memory.describe())
    print(f"hidden at {prompt.depth:.0%} of the text: {prompt.key}")
    print(f"answered: {model.tokenizer.decode(answer[0, question:])!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
