"""Which layers should have the memory? Tried out on the untrained model, by greedy search.

In a pretrained model a few layers do the copying from earlier text, and one or two find the place; with the memory in
those, a model finds facts in memory before any training, and training is short. Which they are differs from model to
model. Here facts (``fot.evaluation.needles``) are hidden in text that lies in memory, and that layer joins the set
which makes the answers likeliest; then the next.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fot.evaluation.needles import Haystack, make_haystack, question_ids
from fot.model import attach_memory
from memory import Memory


@dataclass(frozen=True)
class Choice:
    """Memory in these layers.

    Attributes:
        layers: ascending.
        loss: mean negative log-likelihood of the answers' tokens, in nats.
        tokens_right: share of the answers' tokens that are the model's likeliest.
    """

    layers: tuple[int, ...]
    loss: float
    tokens_right: float


@torch.no_grad()
def run(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    count: int = 4,
    windows: int = 2,
    needles: int = 4,
    trials: int = 4,
    seed: int = 0,
    progress: Any = None,
) -> list[Choice]:
    """The best set of 0, 1, ..., ``count`` layers that greedy search finds.

    Args:
        model: a ``FoTForCausalLM`` with ``tokenizer``; it gets its own settings back.
        texts: token ids of real texts.
        count: largest set.
        windows: of text in memory, for each trial.
        needles: facts in each text.
        trials: texts.
        seed: draws texts and facts.
        progress: a tqdm bar that is moved by each set tried, or None.

    Returns:
        count + 1 choices; the first is without memory.

    Raises:
        ValueError: more layers than the model has.
    """
    config, number = model.memory_config, model.config.num_hidden_layers
    if not 1 <= count <= number:
        raise ValueError(f"{count} memory layers are asked for, but the model has {number} layers: choose 1..{number}")
    rng = random.Random(seed)
    length = windows * config.window
    haystacks = [make_haystack(model.tokenizer, texts, length, needles, rng) for _ in range(trials)]
    try:
        # Isolated windows store the same in a layer whichever other layers have memory, so one reading serves all.
        _attach(model, config, range(number))
        everything = [_read(model, haystack) for haystack in haystacks]
        found = [_judge(model, config, (), haystacks, everything)]
        for _ in range(count):
            tried = []
            for layer in sorted(set(range(number)) - set(found[-1].layers)):
                tried.append(_judge(model, config, (*found[-1].layers, layer), haystacks, everything))
                if progress is not None:
                    progress.update()
            found.append(min(tried, key=lambda choice: choice.loss))
    finally:
        attach_memory(model, config)
    return found


def sets_tried(num_hidden_layers: int, count: int) -> int:
    """How many sets the search looks at."""
    return sum(num_hidden_layers - taken for taken in range(count))


def _attach(model: Any, config: Any, layers: Sequence[int]) -> None:
    attach_memory(model, replace(config, mem_layers=tuple(sorted(layers)), isolated_windows=True, index="exact"))


def _read(model: Any, haystack: Haystack) -> Memory:
    memory: Memory = model.new_memory()
    model.ingest(haystack.ids, memory, progress=False)
    return memory


def _judge(
    model: Any, config: Any, layers: tuple[int, ...], haystacks: Sequence[Haystack], everything: Sequence[Memory]
) -> Choice:
    _attach(model, config, layers)
    losses, right = [], []
    for haystack, source in zip(haystacks, everything, strict=True):
        memory = _part(model, source)
        for needle in haystack.needles:
            prompt, target = question_ids(model.tokenizer, needle)
            ids = torch.tensor([prompt + target[:-1]], device=model.device)
            if not layers:  # without a memory, only a window of a long question can be read
                ids = ids[:, -model.memory_config.window :]
            logits: Tensor = model(ids, memory=memory, use_cache=False, logits_to_keep=len(target)).logits[0]
            wanted = torch.tensor(target, device=logits.device)
            losses.append(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none"))
            right.append(logits.argmax(-1) == wanted)
    return Choice(tuple(sorted(layers)), float(torch.cat(losses).mean()), float(torch.cat(right).float().mean()))


def _part(model: Any, source: Memory) -> Memory | None:
    """The part of a memory that the model's memory layers read; None if it has none."""
    if not model.memory_config.layers:
        return None
    memory: Memory = model.new_memory()
    layers = model.memory_config.layers
    keys = {layer: source[layer].keys() for layer in layers}
    values = {layer: source[layer].values() for layer in layers}
    memory.append(keys, values, source.token_ids().tolist())
    return memory
