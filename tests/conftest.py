"""Tiny random models of every supported family, and a tokenizer of bytes.

torch and transformers are imported where they are used: the process that hands tests out to workers needs neither.
"""

import copy
import gc
import os
import sys

# Before torch is imported, here and by the processes that tests start. On models so small, threads only wait for each
# other, and workers of pytest-xdist have a core each at best.
os.environ["OMP_NUM_THREADS"] = "1"
# Where there is no network, transformers would wait for the hub, even for what is on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 300
WINDOW = 16

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than trained models start with, so that attention is peaked and what it reads matters.
    "initializer_range": 0.3,
}
# The paper's method, which is the easiest to write out: windows do not overlap, and a large memory weighs more.
PAPER = {"window_overlap": 0, "full_weight_tokens": 0}


def configuration(family: str, **settings: Any) -> Any:
    """Of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(SHAPE | settings))


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": partial(configuration, "llama", tie_word_embeddings=True),
    "mistral": partial(configuration, "mistral", sliding_window=None, head_dim=12),
    "qwen2": partial(configuration, "qwen2", use_sliding_window=False),
    "qwen3": partial(configuration, "qwen3", head_dim=8),
}

ModelMaker = Callable[..., Any]

gc.disable()  # until all is imported: that makes no garbage, and takes a tenth longer with collections


def pytest_configure(config: pytest.Config) -> None:
    """Nearly every worker needs what the server of processes needs, so that the server is a copy of it."""
    if hasattr(config, "workerinput"):
        import forks

        forks.copy_this_process()


def pytest_collection_finish() -> None:
    """What is imported by now stays. Collections during tests need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def make_plain() -> ModelMaker:
    """family, layers -> a plain transformers model; the same weights each time."""

    import torch
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, int, int], tuple[Any, torch.Tensor]] = {}

    def make(family: str = "llama", seed: int = 0, layers: int = 4) -> Any:
        if (family, seed, layers) not in made:
            torch.manual_seed(seed)  # transformers.set_seed would load peft
            model = AutoModelForCausalLM.from_config(FAMILIES[family](num_hidden_layers=layers)).eval()
            made[family, seed, layers] = model, torch.get_rng_state()
        model, state = made[family, seed, layers]
        torch.set_rng_state(state)
        return copy.deepcopy(model)  # in half of the time

    return make


@pytest.fixture(scope="session")
def make_model(make_plain: ModelMaker) -> ModelMaker:
    """family, layers, settings -> a model with memory layers 1 and 3, windows of 16 tokens, and the paper's method.

    Where the depth does not matter, fewer layers save as much of the time.
    """

    import fot

    def make(family: str = "llama", seed: int = 0, layers: int = 4, **settings: Any) -> Any:
        defaults = {"mem_layers": (1, 3), "local_context": WINDOW, "index": "exact"} | PAPER
        return fot.attach_memory(make_plain(family, seed, layers), fot.MemoryConfig(**(defaults | settings)))

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A token a byte, after three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision that a process asks for, so that no other run could follow."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def checkpoint(
    make_plain: ModelMaker, tokenizer: "PreTrainedTokenizerFast", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a plain model and its tokenizer, which no test changes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_plain().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> "Callable[..., torch.Tensor]":
    """count, seed -> (1, count) random token ids, none of them special."""
    import torch

    def draw(count: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))

    return draw
