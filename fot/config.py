"""How a model uses its memory: which layers, how long a window, how pairs are stored and found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from memory.backends import Backends, check_index, is_clusters
from memory.vectors import VECTOR_DTYPES

# Key of the dictionary that `save_pretrained` leaves in config.json; plain transformers keeps it and ignores it.
CONFIG_KEY = "fot_memory"

# Settings of before, which changed no result and may stand in what was saved.
FORMER = ("mem_attention_grouping", "align_padding")

# Windows longer than this are of no use to a memory: the paper's models were trained with 2,048.
LONGEST_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class MemoryConfig:
    """Memory settings of one model. Where a setting is ``None``, ``resolve`` derives it from the model.

    Attributes:
        mem_layers: indices of the memory layers, ascending.
        local_context: number of tokens in a local window. Positions restart at 0 in each window. None takes the
            model's ``max_position_embeddings``, but at most 2,048.
        last_context_length: number of last tokens of an input that stay in the local window; the others go to the
            memory. An integer applies to every input, as in LongLLaMA's code. With None, an input that fits into the
            window stays there as a whole, and a longer one keeps half a window.
        overflow_keep: number of newest tokens that stay in the window when generation overflows it. The older tokens
            move to the memory. 0 is LongLLaMA's rule. None keeps seven eighths of a window, sinks included.
        attention_sinks: number of first tokens of the window that stay with them, in all layers without memory.
            Attention that finds nothing relevant goes to these tokens, and without them predictions become much worse
            (StreamingLLM, arXiv 2309.17453). With ``overflow_keep=0`` no sinks stay, because the next token starts a
            new window.
        full_weight_tokens: number of tokens from which on a larger memory weighs no more: attention to a memory of n
            tokens is lowered by the factor full_weight_tokens / n. Most of a large memory is of no use to a token, and
            this keeps it from drowning the rest. None takes four windows. 0 never lowers it, as in LongLLaMA and the
            paper.
        newest_full_weight: of those, number of newest tokens of a larger memory that keep their full weight; all others
            share the rest. What is near matters most to ordinary text, to code above all, and keys in a memory do not
            show how near they are. Half of ``full_weight_tokens`` suits text. But questions about a whole text are
            answered worse, so with 0, the default, all tokens weigh alike.
        retrieval_heads: (layer, head) of the query heads whose attention finds the passages that a question is about;
            ``fot eval heads`` chooses them. None takes all heads of the memory layers.
        memory_gates: for each memory layer, a number between 0 and 1 for each query head: the share of attention that
            the memory gets, as in Memorizing Transformers (arXiv 2203.08913), whose gates are learnt; the size of the
            memory then changes nothing (``full_weight_tokens``). None, as in the Focused Transformer: memory and
            window compete in one softmax.
        mem_positionals: whether memory layers use rotary positions. LongLLaMA uses them; the paper's small models do
            not.
        key_dtype: dtype in which keys are stored: float32, bfloat16, float16 or int8. None takes the model's dtype.
        value_dtype: dtype in which values are stored, likewise.
        index: ``auto``, ``exact`` or a FAISS factory string; see ``memory.Memory``.
        top_k: number of pairs that a query attends to. None means all pairs with the exact index, and 128 with FAISS.
        memory_device: device of the memories. None keeps each layer's vectors on the device of the layer.
        isolated_windows: whether a window is stored without reading the memory first. If so, the stored keys of a text
            do not depend on what was stored before: texts can be added in any order and dropped, and reading takes
            time linear in their length. Answers read the memory in both cases. False is the paper's method.
        window_overlap: number of tokens that each window of an ingested text repeats from the window before. They are
            not stored again. Only the first tokens of a text then lack local context, but ``window_overlap`` of every
            ``local_context`` tokens are read twice. Without an overlap, every window stores an attention sink of its
            own, and a model that was not trained for that is disturbed by them. None takes an eighth of a window. 0 is
            LongLLaMA's method.
    """

    mem_layers: tuple[int, ...] | None = None
    local_context: int | None = None
    last_context_length: int | None = None
    overflow_keep: int | None = None
    attention_sinks: int = 4
    full_weight_tokens: int | None = None
    newest_full_weight: int = 0
    retrieval_heads: tuple[tuple[int, int], ...] | None = None
    memory_gates: tuple[tuple[float, ...], ...] | None = None
    mem_positionals: bool = True
    key_dtype: str | None = None
    value_dtype: str | None = None
    index: str = "auto"
    top_k: int | None = None
    memory_device: str | None = None
    isolated_windows: bool = False
    window_overlap: int | None = None

    def __post_init__(self) -> None:
        if self.mem_layers is not None:
            object.__setattr__(self, "mem_layers", _layers(self.mem_layers))
        if self.retrieval_heads is not None:
            object.__setattr__(self, "retrieval_heads", _heads(self.retrieval_heads))
        if self.memory_gates is not None:
            object.__setattr__(self, "memory_gates", _gates(self.memory_gates))
        for name in ("local_context", "last_context_length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("overflow_keep", "attention_sinks", "full_weight_tokens", "newest_full_weight", "window_overlap"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        for name in ("key_dtype", "value_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in VECTOR_DTYPES:
                raise ValueError(f"{name} is {dtype!r}; choose one of {', '.join(VECTOR_DTYPES)}")
        check_index(self.index)
        Backends(self.index, self.top_k)

    def resolve(
        self,
        num_hidden_layers: int,
        max_position_embeddings: int,
        dtype: str,
        default_layers: tuple[int, ...] | None = None,
    ) -> "MemoryConfig":
        """Derive the settings that are None from the model, and check the others.

        Args:
            num_hidden_layers: of the model.
            max_position_embeddings: likewise.
            dtype: in which it computes.
            default_layers: memory layers where none are named; None: ``default_mem_layers``.

        Raises:
            ValueError: The model does not have one of the layers, or a length does not fit it.
        """
        mem_layers = self.mem_layers
        if mem_layers is None:
            mem_layers = default_layers or default_mem_layers(num_hidden_layers)
        for layer in mem_layers:
            if not 0 <= layer < num_hidden_layers:
                raise ValueError(
                    f"memory layer {layer} is out of range: the model has layers 0..{num_hidden_layers - 1}; "
                    f"for instance mem_layers={list(default_mem_layers(num_hidden_layers))}"
                )
        if self.memory_gates is not None and len(self.memory_gates) != len(mem_layers):
            raise ValueError(
                f"memory_gates are of {len(self.memory_gates)} layers, but the memory layers are {list(mem_layers)}: "
                "give as many, or omit memory_gates"
            )
        window = self.local_context or min(max_position_embeddings, LONGEST_DEFAULT_WINDOW)
        if window > max_position_embeddings:
            raise ValueError(
                f"local_context is {window}, but the model has only {max_position_embeddings} positions; "
                f"use at most {max_position_embeddings}"
            )
        if self.last_context_length is not None and self.last_context_length > window:
            raise ValueError(
                f"last_context_length is {self.last_context_length}, longer than the window of {window} tokens; "
                f"use at most {window}"
            )
        overlap = window // 8 if self.window_overlap is None else self.window_overlap
        if overlap >= window:
            raise ValueError(
                f"window_overlap is {overlap}, but a window has {window} tokens, so it would hold "
                "no new token: lower window_overlap"
            )
        # Rather much: what layers without memory have lost of the text is lost to them (docs/results.md).
        keep = max(0, window * 7 // 8 - self.attention_sinks) if self.overflow_keep is None else self.overflow_keep
        if keep and keep + self.attention_sinks >= window:
            raise ValueError(
                f"overflow_keep is {keep} and attention_sinks is {self.attention_sinks}, so a window "
                f"of {window} tokens would have no room for new tokens: lower one of them"
            )
        full = 4 * window if self.full_weight_tokens is None else self.full_weight_tokens
        newest = self.newest_full_weight
        if newest and full and newest >= full:
            raise ValueError(
                f"newest_full_weight is {newest}, and full_weight_tokens is {full}: the newest tokens would leave no "
                "weight for the others; lower newest_full_weight"
            )
        return replace(
            self,
            mem_layers=mem_layers,
            local_context=window,
            overflow_keep=keep,
            full_weight_tokens=full,
            window_overlap=overlap,
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
    def overlap(self) -> int:
        """``window_overlap`` of a resolved configuration."""
        assert self.window_overlap is not None, "resolve() comes first"
        return self.window_overlap

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
        """The settings that ``to_dict`` gave.

        Raises:
            ValueError: This version does not know one of the settings, or one has a wrong type.
        """
        if not isinstance(settings, dict):
            raise ValueError(f"the memory settings are {settings!r:.60}, and not an object of settings")
        known = get_type_hints(cls)
        settings = {name: value for name, value in settings.items() if name not in FORMER}
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"unknown memory setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        for name, value in settings.items():
            if not _is_of(value, known[name]):
                raise ValueError(f"the memory setting {name} is {str(value)[:60]!r}, which has a wrong type")
        return cls(**settings)


def merged(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are given now, over those of before.

    ``clusters`` attends to a share of the keys: whoever asks for it means no number of them that was saved.
    """
    index = given.get("index")
    by_share = isinstance(index, str) and is_clusters(index)
    return {name: value for name, value in saved.items() if not (by_share and name == "top_k")} | dict(given)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON, where tuples are lists, is of the type of a setting."""
    if get_origin(hint) is UnionType:
        return any(_is_of(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_of(one, get_args(hint)[0]) for one in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def default_mem_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """A quarter, half and three quarters up: 6, 12, 18 of 26 layers and 8, 16, 24 of 32, as in LongLLaMA."""
    step = max(1, round(num_hidden_layers / 4))
    return tuple(layer for layer in (step, 2 * step, 3 * step) if layer < num_hidden_layers) or (0,)


def check_memory_layers(config: MemoryConfig) -> None:
    """Raise ValueError if a model without memory layers is asked to remember something."""
    if not config.layers:
        raise ValueError(
            "this model has no memory layers (mem_layers is empty), so it cannot keep anything past "
            f"its window of {config.window} tokens: choose memory layers, for instance "
            "attach_memory(model, MemoryConfig(mem_layers=(8, 16, 24)))"
        )


def _layers(layers: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(int(layer) for layer in layers)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"mem_layers {list(numbers)} names a layer twice")
    return tuple(sorted(numbers))


def _heads(heads: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    pairs = []
    for pair in heads:
        if len(pair) != 2 or min(pair) < 0:
            raise ValueError(f"retrieval_heads names {list(pair)}; it takes pairs of a layer and a head, from 0")
        pairs.append((int(pair[0]), int(pair[1])))
    return tuple(sorted(set(pairs)))


def _gates(gates: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    for one in (one for layer in gates for one in layer):
        if not 0 < one < 1:
            raise ValueError(f"memory_gates has {one}; a gate lies between 0 and 1, both excluded")
    return tuple(tuple(float(one) for one in layer) for layer in gates)
