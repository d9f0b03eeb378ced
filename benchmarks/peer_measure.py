"""One peer at one length, in a process of its own; ``peers.py`` starts it: ``peer_measure.py JOB.json``.

The last line of its output is what it found, in JSON, or why it found nothing.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peer_readers import CHUNK, PASSKEY, PEERS, PERPLEXITY, Job, Peer, Reader, perplexity

# Tokens written after the question: the key, and enough to time.
WRITTEN = 16
# Tokens whose perplexity counts, after as many more that are read with them.
SCORED = CHUNK // 2
# Tokens read before the clock starts: on a GPU so many that every kernel has run.
WARM_UP = {"cpu": CHUNK // 2, "cuda": 1 << 14}


def measure(job: Job, name: str, material: dict[str, Any]) -> dict[str, Any]:
    """Read, write and judge.

    Speeds are of the real text, where the model has a tokenizer: that of a passkey says the same again and again, and
    fot reads equal isolated windows once.

    Args:
        job: to open the peer for.
        name: of the peer.
        material: ``passkey``: trials, each a ``text``, a ``question`` and ids that ``peers.py`` judges; ``text``: ids
            of a real text, or None.

    Returns:
        ``tokens_per_second`` and ``bytes_per_token`` of the real text, or else of the first trial's, ``decode_ms``: the
        median of the tokens written after it, ``peak_bytes`` of that, ``answers``: ids written in each trial,
        ``perplexity`` of the real text's end or None, and ``note``.
    """
    peer = PEERS[name]
    reader = peer.open(job)
    trials, real = material[PASSKEY], material["text"]
    text, question = trials[0]["text"] if real is None else real, trials[0]["question"]
    clock = time.process_time if job.device == "cpu" and job.threads == 1 else time.perf_counter

    reader.read(text[: WARM_UP[job.device]])
    write(reader, question, 3, clock)
    reset_peak(job)

    scores = real is not None and PERPLEXITY in peer.tasks
    before = text[: -2 * SCORED] if scores else text
    start = clock()
    reader.read(before)
    seconds, held = clock() - start, reader.held_bytes()
    logits = reader.feed(text[-2 * SCORED :], SCORED + 1)[:-1] if scores else None
    ids, times = write(reader, question, WRITTEN, clock)
    found: dict[str, Any] = {
        "tokens_per_second": len(before) / seconds,
        "decode_ms": 1e3 * sorted(times)[len(times) // 2],
        "bytes_per_token": held / len(before),
        "peak_bytes": peak_bytes(job),
        "note": reader.note,
        "answers": [ids] if real is None else [],
        "perplexity": None if logits is None else perplexity(logits, text[-SCORED:]),
    }
    try:
        for trial in trials[len(found["answers"]) :] if PASSKEY in peer.tasks else ():
            reader.read(trial["text"])
            found["answers"].append(write(reader, trial["question"], WRITTEN, clock)[0])
    except Exception as error:  # what was measured before stays
        found["unfinished"] = reason(error)
    return found


def write(
    reader: Reader, question: Sequence[int], count: int, clock: Callable[[], float]
) -> tuple[list[int], list[float]]:
    """The likeliest tokens after a question, and the seconds of each but the first, which reads the question."""
    ids, times, given = list[int](), list[float](), list(question)
    for _ in range(count):
        start = clock()
        ids.append(int(reader.feed(given, 1)[0].argmax()))
        times.append(clock() - start)
        given = ids[-1:]
    return ids, times[1:]


def reset_peak(job: Job) -> None:
    """Let the most memory held count from now, where the system can."""
    if job.device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(job: Job) -> int:
    """Most memory held: of the GPU by tensors, or else of the machine by this process."""
    if job.device == "cuda" and "torch" in sys.modules:
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    try:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reason(error: BaseException) -> str:
    """Why a peer could not go on, in a few words."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out of memory"
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:160]


def without_gradients(peer: Peer) -> contextlib.AbstractContextManager[Any]:
    """For peers of torch; llama.cpp needs none, and its memory is counted without it."""
    if not peer.torch:
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path[1:1] = job["packages_before"]
    sys.path += job["packages_after"]
    material = json.loads(Path(job["material"]).read_text())
    try:
        with without_gradients(PEERS[job["peer"]]):
            found = measure(Job(**job["job"]), job["peer"], material)
    except Exception as error:
        found = {"failed": reason(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
