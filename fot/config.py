"""How a model uses its memory: which layers, how long a window, how pairs are stored and found."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from memory.backends import check_index
from memory.vectors import VECTOR_DTYPES

# Key of the dictionary that `save_pretrained` leaves in config.json; plain transformers keeps it and ignores it.
CONFIG_KEY = "fot_memory"

# Windows longer than this are of no use to a memory: the paper's models were trained with 2,048.
LONGEST_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class MemoryConfig:
    """Memory settings of one model. ``None`` means: derived from the model by ``resolve``.

    Attributes:
        mem_layers: indices of the layers with access to the memory, ascending.
        local_context: tokens of a local window; positions restart at 0 in each. None: the model's
            ``max_position_embeddings``, at most 2,048.
        last_context_length: tokens of a long prompt that stay in the local window to be answered from; the rest
            goes to the memory. An integer cuts every input so, as LongLLaMA's code does. None: inputs that fit the
            window stay whole, longer ones keep half a window.
        overflow_keep: newest tokens that stay local when generation outgrows the window and the older ones move to the
            memory. 0 is LongLLaMA's rule. None: half a window.
        attention_sinks: first tokens of the window that stay local with them, in all layers that have no memory. They
            draw the attention that has nothing to look for; without them the model loses its way (StreamingLLM, arXiv
            2309.17453). None stay with ``overflow_keep=0``, where the next token starts a new window.
        mem_positionals: rotary positions in memory layers (LongLLaMA), or none there (the paper's small models).
        key_dtype: how keys are stored: float32, bfloat16, float16, int8. None: the model's dtype.
        value_dtype: how values are stored, likewise.
        mem_attention_grouping: (heads, queries): memory attention takes at most heads * queries query vectors at
            once. None: a whole window.
        index: ``auto``, ``exact`` or a FAISS factory string; see ``memory.Memory``.
        top_k: pairs that a query attends to; None for all of them where the backend can, 128 elsewhere.
        memory_device: where memories are kept; None: where their layer is.
        isolated_windows: windows that go to the memory do not read it first, so that what is stored of a text does
            not depend on what was stored before it: texts can be stored in any order, added and dropped, and reading
            takes time linear in their length. Answers read the memory either way. False is the paper's way.
        window_overlap: each window of a text that is ingested starts with so many tokens of the window before, which
            are not stored again. So only a text's first tokens lack local context, at the price of reading
            ``window_overlap`` in ``local_context`` tokens twice. 0 is LongLLaMA's way.
        align_padding: windows of a padded batch start at each row's first token (``row``: a row gives what it gives
            alone) or at the batch's first column (``batch``: LongLLaMA's ``forward``). ``generate`` always uses
            ``row``.
    """

    mem_layers: tuple[int, ...] | None = None
    local_context: int | None = None
    last_context_length: int | None = None
    overflow_keep: int | None = None
    attention_sinks: int = 4
    mem_positionals: bool = True
    key_dtype: str | None = None
    value_dtype: str | None = None
    mem_attention_grouping: tuple[int, int] | None = None
    index: str = "auto"
    top_k: int | None = None
    memory_device: str | None = None
    isolated_windows: bool = False
    window_overlap: int = 0
    align_padding: str = "row"

    def __post_init__(self) -> None:
        if self.mem_layers is not None:
            object.__setattr__(self, "mem_layers", _layers(self.mem_layers))
        if self.mem_attention_grouping is not None:
            grouping = tuple(self.mem_attention_grouping)
            if len(grouping) != 2 or min(grouping) < 1:
                raise ValueError(f"mem_attention_grouping is {grouping}; it takes two positive numbers: heads, queries")
            object.__setattr__(self, "mem_attention_grouping", grouping)
        for name in ("local_context", "last_context_length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("overflow_keep", "attention_sinks", "window_overlap"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        for name in ("key_dtype", "value_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in VECTOR_DTYPES:
                raise ValueError(f"{name} is {dtype!r}; choose one of {', '.join(VECTOR_DTYPES)}")
        if self.align_padding not in ("row", "batch"):
            raise ValueError(f"align_padding is {self.align_padding!r}; choose row or batch")
        check_index(self.index)

    def resolve(self, num_hidden_layers: int, max_position_embeddings: int, dtype: str) -> "MemoryConfig":
        """Fill in what is None and check the rest against the model.

        Raises:
            ValueError: a memory layer or a length that this model does not have.
        """
        mem_layers = default_mem_layers(num_hidden_layers) if self.mem_layers is None else self.mem_layers
        for layer in mem_layers:
            if not 0 <= layer < num_hidden_layers:
                raise ValueError(
                    f"memory layer {layer} is out of range: the model has layers 0..{num_hidden_layers - 1}; "
                    f"for instance mem_layers={list(default_mem_layers(num_hidden_layers))}"
                )
        window = self.local_context or min(max_position_embeddings, LONGEST_DEFAULT_WINDOW)
        if window > max_position_embeddings:
            raise ValueError(
                f"local_context is {window}, but the model was made for {max_position_embeddings} positions; "
                f"use at most that many"
            )
        if self.last_context_length is not None and self.last_context_length > window:
            raise ValueError(
                f"last_context_length is {self.last_context_length}, longer than the window of {window} tokens; "
                f"use at most {window}"
            )
        if self.window_overlap >= window:
            raise ValueError(
                f"window_overlap is {self.window_overlap}, but a window has {window} tokens, so that it would hold "
                "nothing new: use less"
            )
        most = max(0, window - self.attention_sinks - 1)  # less than half of a window of a few tokens
        keep = min(window // 2, most) if self.overflow_keep is None else self.overflow_keep
        if keep and keep + self.attention_sinks >= window:
            raise ValueError(
                f"overflow_keep is {keep} and attention_sinks {self.attention_sinks}; a window of {window} tokens "
                "would never empty: use less"
            )
        return replace(
            self,
            mem_layers=mem_layers,
            local_context=window,
            overflow_keep=keep,
            key_dtype=self.key_dtype or dtype,
            value_dtype=self.value_dtype or dtype,
        )

    @property
    def window(self) -> int:
        """``local_context`` of a resolved configuration."""
        assert self.local_context is not None, "resolve() comes first"
        return self.local_context

    @property
    def layers(self) -> tuple[int, ...]:
        """``mem_layers`` of a resolved configuration."""
        assert self.mem_layers is not None, "resolve() comes first"
        return self.mem_layers

    @property
    def kept_tokens(self) -> int:
        """``overflow_keep`` of a resolved configuration."""
        assert self.overflow_keep is not None, "resolve() comes first"
        return self.overflow_keep

    @property
    def kept_sinks(self) -> int:
        """First tokens that stay local when the window overflows."""
        return self.attention_sinks if self.overflow_keep else 0

    def local_length(self, num_tokens: int) -> int:
        """How many of an input's last tokens stay in the local window; those before go to the memory."""
        if self.last_context_length is not None:
            return min(num_tokens, self.last_context_length)
        return num_tokens if num_tokens <= self.window else math.ceil(self.window / 2)

    def to_dict(self) -> dict[str, Any]:
        """For config.json: only what differs from the defaults."""
        return {f.name: value for f in fields(self) if (value := asdict(self)[f.name]) != f.default}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "MemoryConfig":
        """The opposite of ``to_dict``.

        Raises:
            ValueError: a setting that this version does not know.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"unknown memory setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**settings)


def default_mem_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """A quarter, half and three quarters up: 6, 12, 18 of 26 layers and 8, 16, 24 of 32, as in LongLLaMA."""
    step = max(1, round(num_hidden_layers / 4))
    return tuple(layer for layer in (step, 2 * step, 3 * step) if layer < num_hidden_layers) or (0,)


def check_memory_layers(config: MemoryConfig) -> None:
    """Raise ValueError if a model without memory layers is asked to remember something."""
    if not config.layers:
        raise ValueError(
            f"this model has no memory layers (mem_layers is empty), so nothing past its window of {config.window} "
            "tokens can be kept: name some, for instance attach_memory(model, MemoryConfig(mem_layers=(8, 16, 24)))"
        )


def _layers(layers: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(int(layer) for layer in layers)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"mem_layers {list(numbers)} names a layer twice")
    return tuple(sorted(numbers))
