"""Train short, test long (the experiment of ALiBi, arXiv 2108.12409): the same decoder with each kind of positions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fot.compare.decoder import Decoder, Size

# Texts of a step, and the learning rate after 5 % of the steps; it falls to 0 by a cosine.
BATCH = 8
RATE = 2e-3
# Bytes of a text that count, its last ones, and texts of each length.
SCORED = 256
TEXTS = 4
# After the name of a kind, where its decoder reads by a memory.
MEMORY = " + memory"
# Share of the text, its end, that is kept to test.
HELD_OUT = 0.2


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
) -> dict[str, Any]:
    """Perplexity of bytes against length.

    Args:
        text: to train on, and at its end to test on.
        kinds: of positions.
        lengths: bytes of the texts read.
        steps: of training, each with ``BATCH`` texts of ``size.trained`` bytes.
        size: of each decoder.
        seed: draws weights, texts and positions.
        progress: a tqdm bar that is moved by each step.
        device: to compute on. What is drawn is the same on each.

    Returns:
        ``{"kinds": {kind: {length: perplexity or None}}, "interrupted": bool}``; None where there are no positions.
        Each kind is there twice, the second time with ``MEMORY`` after its name: the same decoder, with a memory.
        Ctrl-C ends the run and keeps the finished kinds.

    Raises:
        ValueError: the text is too short.
    """
    with torch.device(device):
        return _panel(text, kinds, lengths, steps, size, seed, progress)


def _panel(
    text: bytes, kinds: Sequence[str], lengths: Sequence[int], steps: int, size: Size, seed: int, progress: Any
) -> dict[str, Any]:
    data = torch.tensor(np.frombuffer(text, dtype=np.uint8), dtype=torch.int64)
    cut = len(data) - max(int(HELD_OUT * len(data)), max(lengths) + 1)
    if cut <= size.trained:
        raise ValueError(f"a text of {len(text):,} bytes is too short to train on and to test at {max(lengths):,}: "
                         "give longer files or lower --lengths")  # fmt: skip
    found: dict[str, dict[int, float | None]] = {}
    try:
        for kind in kinds:
            model = trained(kind, data[:cut], steps, size, seed, progress)
            for memory, name in ((False, kind), (True, kind + MEMORY)):
                found[name] = {
                    length: perplexity(model, data[cut:], length, seed, max(lengths), memory=memory)
                    for length in sorted(lengths)
                }
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / (0.05 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        starts = torch.randint(len(data) - size.trained, (BATCH, 1), generator=texts, device="cpu").to(data.device)
        rows = data[starts + torch.arange(size.trained + 1)]  # (B, T + 1)
        loss = cross_entropy(model(rows[:, :-1], places).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.update()
    return model.eval()


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
