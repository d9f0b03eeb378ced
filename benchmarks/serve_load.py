"""Many clients at once: ``python benchmarks/serve_load.py http://127.0.0.1:8321 --minutes 30``.

Each client asks questions one after another: whole, streamed, going on with its conversation, or leaving half-way.
At the end: requests of each kind, how many were refused (429) or lost, and how long the others took; with ``--pid``,
the resident memory of the server every ten seconds.
"""

import argparse
import random
import statistics
import threading
import time
from collections import Counter

import openai
import psutil

QUESTIONS = ("Who is it?", "What happened then?", "Where do they live?", "Why did she say so?", "When was that?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--pid", type=int, help="process of the server")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=args.key, max_retries=0, timeout=600)
    names = [model.id for model in client.models.list()]
    counts, seconds, lost = Counter[str](), list[float](), list[str]()
    end = time.monotonic() + 60 * args.minutes
    threads = [
        threading.Thread(target=work, args=(client, names, args.max_tokens, end, number, counts, seconds, lost))
        for number in range(args.clients)
    ]
    for thread in threads:
        thread.start()
    sizes = []
    while any(thread.is_alive() for thread in threads):
        if args.pid:
            sizes.append(psutil.Process(args.pid).memory_info().rss / 2**20)
        for thread in threads:
            thread.join(10 / len(threads))
    print(", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())), f"; {len(lost)} lost")
    print("\n".join(sorted(set(lost))[:10]))
    if len(seconds) > 1:
        cuts = statistics.quantiles(seconds, n=20)
        print(
            f"seconds: median {statistics.median(seconds):.2f}, 95 % below {cuts[-1]:.2f}, longest {max(seconds):.2f}"
        )
    if sizes:
        print("resident MiB:", " ".join(f"{size:.0f}" for size in sizes[:: max(1, len(sizes) // 20)]))


def work(
    client: openai.OpenAI,
    names: list[str],
    max_tokens: int,
    end: float,
    number: int,
    counts: Counter[str],
    seconds: list[float],
    lost: list[str],
) -> None:
    """One client, until the end."""
    draw, messages = random.Random(number), list[dict[str, str]]()
    while time.monotonic() < end:
        kind = draw.choice(("whole", "streamed", "going on", "leaving"))
        if kind != "going on" or len(messages) > 10:
            messages = []
        messages.append({"role": "user", "content": draw.choice(QUESTIONS)})
        start = time.monotonic()
        try:
            text = ask(client, draw.choice(names), messages, max_tokens, kind)
        except openai.RateLimitError:
            counts["refused"] += 1
            messages = []
            time.sleep(draw.random())
            continue
        except Exception as error:
            lost.append(f"{kind}: {type(error).__name__} {error}"[:200])
            messages = []
            continue
        counts[kind] += 1
        seconds.append(time.monotonic() - start)
        messages.append({"role": "assistant", "content": text})


def ask(client: openai.OpenAI, model: str, messages: list[dict[str, str]], max_tokens: int, kind: str) -> str:
    """The answer to the last message; a part of it, if the client leaves.

    Raises:
        RuntimeError: a stream ended without a reason.
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


if __name__ == "__main__":
    main()
