"""Fine-tune OpenLLaMA 3B with crossbatch through the Python API, on the values of the paper.

    python examples/finetune_openllama.py OUT [KEY=VALUE ...]                                        # one device
    accelerate launch --num_processes 8 examples/finetune_openllama.py OUT                          # eight, one machine
    accelerate launch --config_file examples/fsdp.yaml examples/finetune_openllama.py OUT           # the same, sharded
    accelerate launch --num_machines 4 --num_processes 32 --machine_rank RANK --main_process_ip HOST \\
        --main_process_port 29500 examples/finetune_openllama.py OUT lanes=1                        # on each of four
    python examples/finetune_openllama.py OUT --tiny                                                # seconds, anywhere

OUT takes checkpoints, log and the result; entries of the recipe, such as ``steps=1000``, are changed by KEY=VALUE.
Lanes times processes is 32 in the paper. --tiny trains a small random model on Python's own library, to see it run.
"""

import argparse
import json
import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import fot
from training.recipe import load_recipe
from training.train import train


def make_tiny_model(folder: Path) -> list[str]:
    """Write a random model that reads bytes, and return what the recipe must say instead to train it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return [
        f"model={folder}",
        "sources=[{path: '{stdlib}', pattern: 'a*.py', min_tokens: 256}]",
        "memory={mem_layers: [1, 2], local_context: 64, last_context_length: 32, overflow_keep: 0}",
        "learning_rate=0.003", "warmup_steps=2", "steps=12", "dtype=float32",
    ]  # fmt: skip


def main() -> None:
    """Train; then read a text into the result's memory and go on from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_intermixed_args()
    tiny = make_tiny_model(args.out / "tiny") if args.tiny else []

    recipe = load_recipe("open-llama-3b", [*tiny, *args.overrides])
    last = train(recipe, args.out, resume=args.resume)
    if os.environ.get("RANK", "0") != "0":  # accelerate runs this script once a process
        return

    first = json.loads((args.out / "log.jsonl").read_text().splitlines()[0])
    print(f"loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}")
    model = fot.FoTForCausalLM.from_pretrained(args.out / "model")
    memory = model.new_memory()
    model.ingest(Path(__file__).read_text(), memory, source="this script", progress=False)
    print(f"{args.out / 'model'} reads: {memory.describe()}")


if __name__ == "__main__":
    main()
