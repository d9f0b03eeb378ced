"""Train short, test long (the experiment of ALiBi, arXiv 2108.12409): the same decoder with each kind of positions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fot.compare.decoder import Decoder, Size

# Texts of a step.
BATCH = 4
# Learning rates of the layers' matrices (Muon) and of all else (AdamW) after this share of the steps; they fall to 0 by
# a cosine.
MATRIX_RATE, RATE, WARM_UP = 2e-2, 4e-3, 0.05
# The first share of the steps sees the same number of bytes in stretches of a sixteenth of a text: where nothing but
# attention tells which byte came just before, it is found sooner among 32 bytes than among 512.
SHORT_SHARE, SHORTER = 0.4, 16
# Bytes of a text that count, its last ones, and texts of each length.
SCORED = 256
TEXTS = 4
# After the name of a kind, where its decoder reads by a memory.
MEMORY = " + memory"
# Share of the text, its end, that is kept to test.
HELD_OUT = 0.2

# Perplexities of a decoder by length, as it is and with a memory; None where there are no positions.
Read = list[dict[int, float | None]]


def run(
    text: bytes,
    kinds: Sequence[str],
    lengths: Sequence[int],
    *,
    steps: int,
    size: Size,
    seed: int,
    progress: Any,
    device: torch.device | str = "cpu",
    done: Mapping[str, Read] | None = None,
    report: Callable[[str, Read], None] = lambda kind, read: None,
) -> dict[str, Any]:
    """Perplexity of bytes against length.

    Args:
        text: to train on, and at its end to test on.
        kinds: of positions.
        lengths: bytes of the texts read.
        steps: of training, each with the bytes of ``BATCH`` texts of ``size.trained``, at first in shorter stretches.
        size: of each decoder.
        seed: draws weights, texts and positions.
        progress: a tqdm bar that is moved by each step.
        device: to compute on. What is drawn is the same on each.
        done: kinds that were read before, which are not trained again.
        report: is told each other kind and what it came to, as soon as it is read.

    Returns:
        ``{"kinds": {kind: {length: perplexity or None}}, "interrupted": bool}``; None where there are no positions.
        Each kind is there twice, the second time with ``MEMORY`` after its name: the same decoder, with a memory.
        Ctrl-C ends the run and keeps the finished kinds.

    Raises:
        ValueError: the text is too short.
        ImportError: torch is older than 2.9, where its optimiser Muon came.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"the decoders are trained with torch.optim.Muon, which torch {torch.__version__} has not: "
                          "install torch 2.9 or later")  # fmt: skip
    data = torch.tensor(np.frombuffer(text, dtype=np.uint8), dtype=torch.int64, device=device)
    cut = len(data) - max(int(HELD_OUT * len(data)), max(lengths) + 1)
    if cut <= size.trained:
        raise ValueError(f"a text of {len(text):,} bytes is too short to train on and to test at {max(lengths):,}: "
                         "give longer files or lower --lengths")  # fmt: skip
    found: dict[str, dict[int, float | None]] = {}
    try:
        for kind in kinds:
            read = (done or {}).get(kind)
            if read is None:
                with torch.device(device):
                    model = trained(kind, data[:cut], steps, size, seed, progress)
                    read = [
                        {
                            length: perplexity(model, data[cut:], length, seed, max(lengths), memory=memory)
                            for length in sorted(lengths)
                        }
                        for memory in (False, True)
                    ]
                report(kind, read)
            found[kind], found[kind + MEMORY] = read
    except KeyboardInterrupt:
        return {"kinds": found, "interrupted": True}
    return {"kinds": found, "interrupted": False}


def trained(kind: str, data: Tensor, steps: int, size: Size, seed: int, progress: Any) -> Decoder:
    """A decoder after so many steps. Every kind sees the same texts in the same order."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = Decoder(kind, size).train()
    model = model.to(data.device)
    texts, places = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2 if steps else 0.0

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in range(steps):
        parts = SHORTER if step < SHORT_SHARE * steps else 1
        length = size.trained // parts
        starts = torch.randint(len(data) - length, (BATCH * parts, 1), generator=texts, device="cpu").to(data.device)
        rows = data[starts + torch.arange(length + 1)]  # (B, T + 1)
        loss = cross_entropy(model(rows[:, :-1], places).flatten(0, 1), rows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress.update()
    return model.eval()


def _optimizers(model: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices: AdamW alone was still at the perplexity of pairs of bytes after 800 steps."""
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]


@torch.no_grad()
def perplexity(
    model: Decoder, data: Tensor, length: int, seed: int, longest: int = 0, *, memory: bool = False
) -> float | None:
    """Of the last ``SCORED`` bytes of ``TEXTS`` texts so long; None if the decoder has no positions for that.

    With a memory, texts of less than a window are read without. Texts end at the same bytes for all lengths up to
    ``longest``, so that lengths can be compared.
    """
    memory = memory and length >= model.size.trained
    if length > model.reach() and not memory:
        return None
    places, scored, losses = torch.Generator().manual_seed(seed), min(SCORED, length // 2, model.size.trained // 2), []
    for number in range(TEXTS):
        stop = len(data) - number * (len(data) - max(length, longest) - 1) // TEXTS
        piece = data[stop - length - 1 : stop]
        read = model.read if memory else model
        logits = read(piece[None, :-1], places, keep=scored)[0]
        losses.append(cross_entropy(logits, piece[-scored:]))
    return math.exp(float(torch.stack(losses).mean()))
