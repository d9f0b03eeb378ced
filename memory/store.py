"""Memory: everything stored for one logical context.

Per memory layer and KV head, keys and values in append order; once per token, its id and where it came from.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from memory.index import BackendChoice, ExactIndex, Index, choose_backend
from memory.tokens import Source, TokenTable
from memory.vectors import VECTOR_DTYPES, VectorBlocks

logger = logging.getLogger(__name__)

IndexFactory = Callable[[VectorBlocks, VectorBlocks], Index]


class LayerMemory:
    """Keys, values and the index of one memory layer; get it as ``memory[layer]``.

    G is the number of KV heads, D the head size. Query heads that share a KV head lie along the query axis T.
    """

    def __init__(self, owner: "Memory") -> None:
        self._owner = owner
        self._keys = VectorBlocks(owner.num_key_value_heads, owner.head_dim, VECTOR_DTYPES[owner.key_dtype])
        self._values = VectorBlocks(owner.num_key_value_heads, owner.head_dim, VECTOR_DTYPES[owner.value_dtype])
        self._index: Index | None = None
        self._choice: BackendChoice | None = None

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return self._keys.device or torch.device("cpu")

    @property
    def backend(self) -> BackendChoice | None:
        """The backend in use and why; None while nothing is stored."""
        return self._choice

    def describe(self) -> str:
        """The index in use, in a few words."""
        return "empty" if self._index is None else self._index.describe()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k stored keys of largest inner product with each query, best first.

        Args:
            queries: (G, T, D) float, any device.
            k: hits wanted; at least 1. More than are stored gives all.

        Returns:
            inner products (G, T, min(k, N)) float32 and slots, likewise, int64, on the device of ``queries``. An
            approximate backend that finds fewer pads with score -inf and slot -1.

        Raises:
            ValueError: k < 1, or queries of another shape than this memory's keys.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least 1 hit")
        self._check_shape(queries, "queries")
        if self._index is None:
            return queries.new_empty(*queries.shape[:2], 0).float(), queries.new_empty(*queries.shape[:2], 0).long()
        scores, slots = self._index.search(queries.to(self.device), min(k, len(self)))
        return scores.to(queries.device), slots.to(queries.device)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention of the queries to this memory, with its log-sum-exp (for ``memory.softmax.merge``).

        Args:
            queries: (G, T, D) float, any device.
            scale: factor on inner products, normally ``head_dim**-0.5``.

        Returns:
            output (G, T, D) in dtype and on device of ``queries``; log-sum-exp (G, T) float32, -inf if nothing is
            stored.
        """
        if self._index is None:
            empty = torch.full(queries.shape[:2], -torch.inf, device=queries.device)
            return torch.zeros_like(queries), empty
        output, lse = self._index.attend(queries.to(self.device), scale=scale)
        return output.to(queries.device), lse.to(queries.device)

    def keys(self, slots: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored keys: all as (G, N, D), or those in ``slots`` (G, ...) as (G, ..., D)."""
        return self._vectors(self._keys, slots, dtype)

    def values(self, slots: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored values: all as (G, N, D), or those in ``slots`` (G, ...) as (G, ..., D).

        Raises:
            IndexError: a slot lies outside 0..N-1.
        """
        return self._vectors(self._values, slots, dtype)

    def _vectors(self, blocks: VectorBlocks, slots: Tensor | None, dtype: torch.dtype) -> Tensor:
        if slots is None:
            return blocks.take_range(0, len(blocks), dtype)
        bad = slots[(slots < 0) | (slots >= len(blocks))]
        if bad.numel():
            raise IndexError(f"slot {bad[0].item()} is outside 0..{len(blocks) - 1}, what this memory holds")
        return blocks.gather(slots.to(self.device), dtype)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._keys.append(keys)
        self._values.append(values)
        choice = self._owner._choose(len(self), self.device)
        if self._index is None or self._choice is None or choice.name != self._choice.name:
            self._build_index()
        else:
            self._index.add(keys)

    def _build_index(self) -> None:
        self._index = self._choice = None
        if len(self):
            choice = self._owner._choose(len(self), self.device)
            self._index = self._owner._make_index(choice.name, self._keys, self._values)
            if not isinstance(self._index, ExactIndex):  # which reads the blocks, and needs no copy of them
                self._index.add(self._keys.take_range(0, len(self), self._keys.dtype))
            self._choice = choice
            logger.info("memory backend %s: %s", choice.name, choice.reason)

    def _reset(self) -> None:
        self._keys.reset()
        self._values.reset()
        self._index = self._choice = None

    def _truncate(self, length: int) -> None:
        if len(self._keys) > length or len(self._values) > length:
            self._keys.truncate(length)
            self._values.truncate(length)
            self._build_index()

    def _keep(self, slots: Tensor) -> None:
        keys, values = VectorBlocks.like(self._keys), VectorBlocks.like(self._values)
        keys.take(self._keys, slots.to(self.device))
        values.take(self._values, slots.to(self.device))
        self._keys, self._values = keys, values
        self._build_index()

    def _check_shape(self, tensor: Tensor, what: str) -> None:
        heads, dim = self._owner.num_key_value_heads, self._owner.head_dim
        if tensor.ndim != 3 or tensor.shape[0] != heads or tensor.shape[2] != dim:
            raise ValueError(f"{what} have shape {tuple(tensor.shape)}; this memory takes ({heads}, tokens, {dim})")


class Memory:
    """An external memory of (key, value) pairs for the memory layers of one model.

    Args:
        layers: indices of the memory layers.
        num_key_value_heads: G, KV heads of a layer.
        head_dim: D, size of a head.
        key_dtype: how keys are stored: float32, bfloat16, float16 or int8 (with a scale a vector).
        value_dtype: how values are stored, likewise.
        index: ``exact``, ``auto``, a FAISS factory string for inner product such as ``IVF1024,Flat``,
            ``IVF1024,SQ8`` or ``HNSW32`` (see ``memory.faiss_index``; ``gpu:`` in front puts it on a GPU), or a
            function of (key blocks, value blocks) that makes an ``Index``.
        top_k: pairs a query attends to; None for all of them where the backend can (``exact``), 128 elsewhere.
        device: where the vectors are kept; None keeps them where they come from.
        fingerprint: names the weights that the keys were made with; a model refuses a memory of other weights.

    Raises:
        ValueError: an argument is out of range or names nothing known.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_key_value_heads: int,
        head_dim: int,
        *,
        key_dtype: str = "float32",
        value_dtype: str = "float32",
        index: str | IndexFactory = "auto",
        top_k: int | None = None,
        device: str | torch.device | None = None,
        fingerprint: str = "",
    ) -> None:
        for name, dtype in (("key_dtype", key_dtype), ("value_dtype", value_dtype)):
            if dtype not in VECTOR_DTYPES:
                raise ValueError(f"{name} is {dtype!r}; choose one of {', '.join(VECTOR_DTYPES)}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; a query must retrieve at least 1 pair (None means all or 128)")
        check_index(index, head_dim)
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.key_dtype = key_dtype
        self.value_dtype = value_dtype
        self.index = index
        self.top_k = top_k
        self.device = None if device is None else torch.device(device)
        self.fingerprint = fingerprint
        self._layers = {layer: LayerMemory(self) for layer in layers}
        self._tokens = TokenTable()

    def __len__(self) -> int:
        """Stored tokens."""
        return len(self._tokens)

    def __getitem__(self, layer: int) -> LayerMemory:
        """Keys and values of one memory layer."""
        if layer not in self._layers:
            raise KeyError(f"layer {layer} has no memory; memory layers are {list(self._layers)}")
        return self._layers[layer]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the memory layers."""
        return tuple(self._layers)

    def append(
        self,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        token_ids: Tensor | Sequence[int],
        *,
        document: str | None = None,
        spans: Sequence[tuple[int, int]] | np.ndarray | None = None,
    ) -> None:
        """Add T tokens to every layer, or to none: everything is checked before anything is written.

        Args:
            keys: layer -> (G, T, D), for every memory layer.
            values: likewise.
            token_ids: (T,) ids.
            document: name of the text that these tokens come from.
            spans: (T, 2) first and past-the-end character of each token in that text.

        Raises:
            ValueError: shapes or layers that do not fit, or a key or value that is NaN or infinite.
        """
        ids = np.asarray(token_ids.cpu() if isinstance(token_ids, Tensor) else token_ids, dtype=np.int32)
        self._check(keys, values, len(ids))
        prepared = self._tokens.prepare(ids, document, spans)
        try:
            for number, layer in self._layers.items():
                layer._append(self._place(keys[number]), self._place(values[number]))
            self._tokens.commit(prepared)
        except BaseException:  # Ctrl-C or no memory left half-way: layers of different length would be garbage
            for layer in self._layers.values():
                layer._truncate(len(self))
            raise

    def token_ids(self, slots: "np.ndarray | Sequence[int] | slice" = slice(None)) -> np.ndarray:
        """Ids of the tokens in these slots (all by default), int32."""
        return self._tokens.ids[slots]

    def source(self, slot: int) -> Source:
        """Where the token in this slot came from."""
        if not 0 <= slot < len(self):
            raise IndexError(f"slot {slot} is outside 0..{len(self) - 1}, what this memory holds")
        return self._tokens.source(slot)

    def documents(self) -> dict[str, int]:
        """Name -> number of stored tokens, for each named document."""
        return self._tokens.documents()

    def drop(self, document: str) -> int:
        """Forget one document. The slots behind it move up, and indexes are built again.

        Returns:
            the number of tokens dropped.

        Raises:
            KeyError: no stored token belongs to a document of this name.
        """
        keep = self._tokens.slots_outside(document)
        dropped = len(self) - len(keep)
        for layer in self._layers.values():
            layer._keep(torch.from_numpy(keep))
        self._tokens.keep(keep, document)
        return dropped

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._layers.values():
            layer._reset()
        self._tokens = TokenTable()

    def clone(self) -> "Memory":
        """A copy that grows on its own."""
        copy = Memory(
            self.layers,
            self.num_key_value_heads,
            self.head_dim,
            key_dtype=self.key_dtype,
            value_dtype=self.value_dtype,
            index=self.index,
            top_k=self.top_k,
            device=self.device,
            fingerprint=self.fingerprint,
        )
        everything = torch.arange(len(self))
        for number, layer in self._layers.items():
            mine = copy._layers[number]
            mine._keys, mine._values = layer._keys, layer._values
            mine._keep(everything)
        copy._tokens = self._tokens.clone()
        return copy

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part: ``keys``, ``values``, ``index`` and ``tokens``."""
        layers = self._layers.values()
        return {
            "keys": sum(layer._keys.nbytes() for layer in layers),
            "values": sum(layer._values.nbytes() for layer in layers),
            "index": sum(layer._index.nbytes() for layer in layers if layer._index is not None),
            "tokens": self._tokens.nbytes(),
        }

    def describe(self) -> str:
        """One line: tokens, size, the index of each layer."""
        mib = sum(self.nbytes().values()) / 2**20
        kinds = ", ".join(f"layer {number}: {layer.describe()}" for number, layer in self._layers.items())
        return f"{len(self):,} tokens, {mib:,.1f} MiB; {kinds}"

    def _place(self, vectors: Tensor) -> Tensor:
        return vectors if self.device is None else vectors.to(self.device)

    def _choose(self, num_keys: int, device: torch.device) -> BackendChoice:
        if self.index == "auto":
            return choose_backend(num_keys, device)
        return BackendChoice(self.index if isinstance(self.index, str) else "custom", "asked for")

    def _make_index(self, name: str, keys: VectorBlocks, values: VectorBlocks) -> Index:
        if not isinstance(self.index, str):
            return self.index(keys, values)
        if name == "exact":
            return ExactIndex(keys, values, self.top_k)
        from memory.faiss_index import FaissIndex  # faiss is loaded only where it is used

        return FaissIndex(name, keys, values, self.top_k)

    def _check(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], count: int) -> None:
        finite = []
        for what, vectors in (("keys", keys), ("values", values)):
            if set(vectors) != set(self._layers):
                raise ValueError(f"{what} are of layers {sorted(vectors)}; this memory holds {sorted(self._layers)}")
            for number, tensor in vectors.items():
                self._layers[number]._check_shape(tensor, f"{what} of layer {number}")
                if tensor.shape[1] != count:
                    raise ValueError(f"{what} of layer {number} are {tensor.shape[1]} tokens, the ids are {count}")
                finite.append(torch.isfinite(tensor).all())
        # One transfer to the host for a whole window, not one a tensor.
        if not all(torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()):
            raise ValueError(
                "a key or value is NaN or infinite, so nothing was stored: the model overflows in this dtype or its "
                "weights are damaged; try dtype float32 or check the checkpoint"
            )


def check_index(index: "str | IndexFactory", head_dim: int | None = None) -> None:
    """Raise ValueError if no backend can be made from this, so that a typo shows before hours of work.

    Args:
        index: as for ``Memory``.
        head_dim: D; None if it is not known yet.
    """
    if isinstance(index, str) and index not in ("auto", "exact"):
        from memory.faiss_factory import check_factory

        check_factory(index, head_dim)
