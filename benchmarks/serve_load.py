"""Many clients at once: requests answered, refused and lost, and whether the server's memory use grows.

    python benchmarks/serve_load.py --minutes 30                         # starts a server of a tiny random model
    python benchmarks/serve_load.py http://127.0.0.1:8321 --pid PID      # or one that runs

Each client asks questions one after another: whole, streamed, going on with its conversation, or leaving half-way. An
answer counts as lost if it is an error other than 429 (the line is full), or ends without a reason for its end.
Every five minutes and at the end: requests of each kind so far, and the server's resident memory.
"""

import argparse
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil

QUESTIONS = ("Who is it?", "What happened then?", "Where do they live?", "Why did she say so?", "When was that?")
KINDS = ("whole", "streamed", "going on", "leaving")
REPORT = 300.0  # seconds between reports


@dataclass
class Result:
    """What all clients have seen so far."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between questions of a client, on average")
    parser.add_argument("--waiting", type=int, default=24, help="of the server that is started: requests that may wait")
    parser.add_argument("--pid", type=int, help="process of the server")
    args = parser.parse_args()
    with nullcontext((args.address, args.pid)) if args.address else tiny_server(args.waiting) as (address, pid):
        measure(address, pid, args)


def measure(address: str, pid: int | None, args: argparse.Namespace) -> None:
    """Let the clients ask, and print what became of it."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=args.key, max_retries=0, timeout=600)
    names = [model.id for model in client.models.list()]
    for name in names:  # what is made at the first question is no growth
        ask(client, name, [{"role": "user", "content": QUESTIONS[0]}], 1, "whole")
    result, start = Result(), time.monotonic()
    end = start + 60 * args.minutes
    threads = [
        threading.Thread(target=work, args=(client, names, args, end, number, result), daemon=True)
        for number in range(args.clients)
    ]
    print("minutes  MiB   CPU s  " + "  ".join(f"{kind:>8}" for kind in (*KINDS, "refused", "lost")))
    report(result, 0.0, pid)
    for thread in threads:
        thread.start()
    due = start + REPORT
    while any(thread.is_alive() for thread in threads):
        threads[0].join(1)
        time.sleep(0.2)
        if time.monotonic() >= due:
            report(result, time.monotonic() - start, pid)
            due += REPORT
    report(result, time.monotonic() - start, pid)
    print("\n".join(sorted(set(result.lost))[:10]))
    if len(result.seconds) > 1:
        cuts = statistics.quantiles(result.seconds, n=20)
        middle, most = statistics.median(result.seconds), max(result.seconds)
        print(f"seconds of an answer: median {middle:.2f}, 95 % below {cuts[-1]:.2f}, longest {most:.2f}")
    left = openai.OpenAI(base_url=address, api_key=args.key).get("/health", cast_to=object)
    print(f"the server says: {left}")


def report(result: Result, seconds: float, pid: int | None) -> None:
    """A line of the table."""
    mib = cpu = float("nan")
    if pid:
        process = psutil.Process(pid)
        mib, cpu = process.memory_info().rss / 2**20, sum(process.cpu_times()[:2])
    counts = [*(result.counts[kind] for kind in (*KINDS, "refused")), len(result.lost)]
    print(f"{seconds / 60:>7.1f}  {mib:<5.0f} {cpu:<6.0f} " + "  ".join(f"{count:>8,}" for count in counts), flush=True)


def work(
    client: openai.OpenAI, names: list[str], args: argparse.Namespace, end: float, number: int, result: Result
) -> None:
    """One client, until the end."""
    draw, messages = random.Random(number), list[dict[str, str]]()
    name = draw.choice(names)
    while True:
        time.sleep(draw.uniform(0, 2 * args.pause))
        if time.monotonic() >= end:
            return
        kind = draw.choice(KINDS)
        if kind != "going on" or len(messages) > 10:
            messages, name = [], draw.choice(names)
        messages.append({"role": "user", "content": draw.choice(QUESTIONS)})
        start = time.monotonic()
        try:
            text = ask(client, name, messages, args.max_tokens, kind)
        except openai.RateLimitError:
            result.counts["refused"] += 1
            messages = []
            time.sleep(draw.random())
            continue
        except Exception as error:
            result.lost.append(f"{kind}: {type(error).__name__} {error}"[:200])
            messages = []
            continue
        result.counts[kind] += 1
        result.seconds.append(time.monotonic() - start)
        messages.append({"role": "assistant", "content": text})


def ask(client: openai.OpenAI, model: str, messages: list[dict[str, str]], max_tokens: int, kind: str) -> str:
    """The answer to the last message; a part of it, if the client leaves.

    Raises:
        RuntimeError: an answer or a stream ended without a reason.
    """
    options = {"model": model, "messages": messages, "max_tokens": max_tokens}
    if kind in ("whole", "going on"):
        done = client.chat.completions.create(**options)
        if done.choices[0].finish_reason not in ("stop", "length"):
            raise RuntimeError("an answer without a reason for its end")
        return done.choices[0].message.content or ""
    text, finish = "", None
    with client.chat.completions.create(**options, stream=True) as stream:
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
            if kind == "leaving" and text:
                return text
    if finish is None:
        raise RuntimeError("a stream ended early")
    return text


@contextmanager
def tiny_server(waiting: int) -> Iterator[tuple[str, int]]:
    """The address and the process of ``fot serve`` with two memories of a tiny random model."""
    with tempfile.TemporaryDirectory() as folder:
        memories = make_memories(Path(folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "fot", "serve", *map(str, memories), "--port", port, "--no-uploads"]
        process = subprocess.Popen([*command, "--waiting", str(waiting), "--device", "cpu"], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has loaded everything
            address = f"http://127.0.0.1:{port}"
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=20)
            client.models.list()
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(60)


def make_memories(folder: Path) -> list[Path]:
    """A tiny random model that reads bytes, saved, and two memories that it made."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from fot import FoTForCausalLM

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    model = FoTForCausalLM.from_pretrained(folder / "tiny", mem_layers=(1, 3), local_context=512)
    made = []
    for name, text in (("one", "They live in a house by the sea. "), ("two", "She came back in autumn. ")):
        memory = model.new_memory()
        model.ingest(text * 300, memory, source=f"{name}.txt", progress=False)
        memory.save(folder / f"{name}.memory")
        made.append(folder / f"{name}.memory")
    return made


if __name__ == "__main__":
    main()
