"""This memory beside what one would take instead: one random model's shape, one table, ratios of one run.

    python benchmarks/peers.py --lengths 4096,16384
    pip install --target EXTRA --no-deps memorizing-transformers-pytorch einops einops-exts joblib cloudpickle
    pip install --target EXTRA --no-deps optimum-quanto ninja
    pip install --target OLD --no-deps transformers==4.33.3 tokenizers==0.13.3 huggingface_hub==0.17.3
    python benchmarks/peers.py --extra EXTRA --longllama CHECKOUT --longllama-packages OLD --json OUT.json

Every measurement is a process of its own. Columns: tokens a second of reading a text, milliseconds of one token behind
it (best), bytes that a token of it takes, and the most memory that the process held. With one thread, times are CPU
times, which other programs disturb least. 8 layers of 512, 8 heads of 64, float32, windows of 512; memory in layers 2,
4 and 6. Peers that cannot run here are listed with the reason.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, WIDTH, HEADS, VOCABULARY, WINDOW = 8, 512, 8, 1000, 512
MEM_LAYERS = (2, 4, 6)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 1376,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
STEPS = 6

# (read all ids (1, N), read one token (1, 1), bytes held for the text)
Peer = tuple[Callable[[Tensor], object], Callable[[Tensor], object], Callable[[], int]]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def plain_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_key_value_heads=HEADS, max_position_embeddings=1 << 21)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def full_attention(kind: str) -> Peer:
    """transformers with a cache of everything, filled window by window: ``dynamic``, ``offloaded``, ``quantized``."""
    from transformers import DynamicCache
    from transformers.cache_utils import QuantizedCache

    model = plain_model()
    if kind == "quantized":
        cache: Any = QuantizedCache("quanto", model.config, nbits=4)
    else:
        cache = DynamicCache(offloading=kind == "offloaded")

    def read(ids: Tensor) -> None:
        for part in ids.split(WINDOW, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def held() -> int:
        if kind == "quantized":
            # 4 bits, and a scale and a zero point of 32 bits for every 64 numbers
            return cache.get_seq_length() * LAYERS * 2 * WIDTH * 5 // 8
        return sum(nbytes(layer.keys) + nbytes(layer.values) for layer in cache.layers)

    return read, read, held


def ours(index: str) -> Peer:
    """fot on the same weights, by backend."""
    import fot
    from fot.cache import FoTCache

    settings = {"mem_layers": MEM_LAYERS, "local_context": WINDOW, "window_overlap": 0, "index": index}
    model: Any = fot.attach_memory(plain_model(), fot.MemoryConfig(**settings))
    memory = model.new_memory()
    caches: list[Any] = []

    def step(token: Tensor) -> None:
        if not caches:
            caches.append(FoTCache([memory]))
        model(token, past_key_values=caches[0], use_cache=True)

    return (
        lambda ids: model.ingest(ids[0], memory, progress=False),
        step,
        lambda: sum(memory.nbytes().values()),
    )


def memorizing(folder: Path) -> Peer:
    """memorizing-transformers-pytorch: one KV head in memory layers, top-32 by HNSW, values in a file."""
    import faiss
    from memorizing_transformers_pytorch import MemorizingTransformer

    model = MemorizingTransformer(
        num_tokens=VOCABULARY, dim=WIDTH, depth=LAYERS, heads=HEADS, memorizing_layers=MEM_LAYERS,
        max_knn_memories=1 << 20, knn_memories_directory=str(folder), xl_max_memories=WINDOW,
    ).eval()  # fmt: skip
    memories = model.create_knn_memories(batch_size=1)
    state: dict[str, Any] = {"xl": None}

    def read(ids: Tensor) -> None:
        for part in ids.split(WINDOW, dim=1):
            _, state["xl"] = model(part, knn_memories=memories, xl_memories=state["xl"])

    def held() -> int:
        indexes = [faiss.serialize_index(memory.knns[0].index).size for memory in memories]
        return sum(indexes) + sum(int(memory.db_offsets[0]) * 2 * 64 * 4 for memory in memories)

    return read, read, held


def longllama() -> Peer:
    """LongLLaMA's own code."""
    from src.configuration_longllama import LongLlamaConfig
    from src.modeling_longllama import LongLlamaForCausalLM

    model = LongLlamaForCausalLM(
        LongLlamaConfig(**SHAPE, max_position_embeddings=WINDOW, last_context_length=WINDOW // 2,
                        mem_layers=list(MEM_LAYERS), mem_dtype="float32", torch_attention=True)
    ).eval()  # fmt: skip
    state: dict[str, Any] = {"past": None}

    def read(ids: Tensor) -> None:
        state["past"] = model(ids, past_key_values=state["past"], use_cache=True).past_key_values

    def held() -> int:
        def total(part: Any) -> int:
            if isinstance(part, Tensor):
                return nbytes(part)
            parts = part if isinstance(part, list | tuple) else vars(part).values() if hasattr(part, "__dict__") else ()
            return sum(map(total, parts))

        return total(state["past"])

    return read, read, held


PEERS: dict[str, Callable[[Path], Peer]] = {
    "fot exact": lambda _: ours("exact"),
    "fot clusters": lambda _: ours("clusters"),
    "fot IVF": lambda _: ours("IVF,Flat"),
    "transformers, dynamic cache": lambda _: full_attention("dynamic"),
    "transformers, quantized cache": lambda _: full_attention("quantized"),
    "transformers, offloaded cache": lambda _: full_attention("offloaded"),
    "memorizing-transformers-pytorch": memorizing,
    "LongLLaMA's code": lambda _: longllama(),
}


@torch.no_grad()
def measure(name: str, length: int) -> dict[str, float]:
    """One peer at one length, in this process."""
    import resource

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (1, length))
    with tempfile.TemporaryDirectory() as folder:
        read, step, held = PEERS[name](Path(folder))
        start = clock()
        read(ids)
        seconds, size = clock() - start, held()
        times = []
        for number in range(STEPS):
            start = clock()
            step(ids[:, number : number + 1])
            times.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens_per_second": length / seconds, "decode_ms": 1e3 * min(times[1:]), "bytes_per_token": size / length,
            "peak_rss_mb": peak / (1e6 if sys.platform == "darwin" else 1e3)}  # fmt: skip


def apart(name: str, length: int, packages: list[str], seconds: float) -> dict[str, Any]:
    """``measure`` in a process of its own; or why it failed."""
    code = f"import sys; sys.path[1:1] = {packages!r}\n" if name.startswith("LongLLaMA") else (
        f"import sys; sys.path += {packages!r}\n"
    )  # fmt: skip
    code += f"import json, peers; print(json.dumps(peers.measure({name!r}, {length})))"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=seconds,
            cwd=Path(__file__).parent, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {seconds:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:100]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Parse, measure each peer at each length, print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,16384,65536")
    parser.add_argument("--peers", help="separated by ;, of: " + "; ".join(PEERS))
    parser.add_argument("--extra", type=Path, help="folder with packages of peers")
    parser.add_argument("--longllama", type=Path, help="checkout of CStanKonrad/long_llama")
    parser.add_argument("--longllama-packages", type=Path, help="folder with the transformers that it needs")
    parser.add_argument("--seconds", type=float, default=1800, help="most time of a measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    paths = [str(path.absolute()) for path in (args.longllama_packages, args.longllama) if path]
    extra = [str(args.extra.absolute())] if args.extra else []
    rows = []
    print("| tokens | | ingest, tokens/s | one token, ms | bytes a token | peak RSS, MB |\n" + "| --- " * 6 + "|")
    for length in map(int, args.lengths.split(",")):
        for name in args.peers.split(";") if args.peers else PEERS:
            found = apart(name, length, paths if name.startswith("LongLLaMA") else extra, args.seconds)
            rows.append({"peer": name, "tokens": length, **found})
            cells = found.get("failed") or (
                f"{found['tokens_per_second']:,.0f} | {found['decode_ms']:.1f} | {found['bytes_per_token']:,.0f} | "
                f"{found['peak_rss_mb']:,.0f}"
            )
            print(f"| {length:,} | {name} | {cells} |", flush=True)
    if args.json:
        report = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
