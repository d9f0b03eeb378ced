"""A memory whose tokens are shared out over the processes of ``torch.distributed``.

Rank 0 has the model. It sends the queries of a memory layer to every rank. Each attends to the tokens that it holds
and sends its output and log-sum-exp back, from which ``memory.softmax.merge`` makes one softmax over all of them. All
open one folder (or a copy each), mapped: a rank reads the vectors of its own tokens alone. Nobody writes to it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from memory.clustered import SEGMENT
from memory.index import Index
from memory.layer import LayerMemory
from memory.softmax import merge
from memory.store import Memory

ATTEND, SEARCH, CLOSE = range(3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RankLostError(ConnectionError):
    """A rank of a sharded memory does not answer any more."""


def shares(tokens: int, ranks: int) -> list[tuple[int, int]]:
    """First and past-the-end slot of each rank: whole stretches of clusters, as even as they can be."""
    stretches = -(-tokens // SEGMENT)
    bounds = [min(tokens, SEGMENT * (-(-stretches * rank // ranks))) for rank in range(ranks + 1)]
    return list(pairwise(bounds))


@contextmanager
def open_sharded(
    path: str | Path, *, index: str | None = None, top_k: int | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[Memory | None]:
    """Open a memory over all ranks of a process group. Every rank calls this, with the same arguments.

    Ranks that serve end with ``RankLostError`` if rank 0 asks nothing for longer than the group's timeout: choose the
    ``timeout`` of ``init_process_group`` by the longest pause.

    Args:
        path: the folder, as for ``Memory.open``.
        index: of each rank's share, as for ``Memory.open``; ``auto`` chooses by the size of the share.
        top_k: as for ``Memory.open``: each rank's share of the hits is merged.
        group: of processes; None for all.

    Yields:
        On rank 0 the memory, read-only. On the others None, after rank 0 has left its block: until then they serve.

    Raises:
        RankLostError: another rank has ended or does not answer within the group's timeout.
        ValueError, OSError: as ``Memory.open``.
    """
    link = _Link(group, Path(path))
    with Memory.open(path, index=index, top_k=top_k) as memory:
        bounds = shares(len(memory), link.ranks)
        share = memory.kept(torch.arange(*bounds[link.rank]))
        share.prepare()
        if link.rank:
            _serve(share, bounds[link.rank][0], link)
            yield None
            return
        memory.answer_by({number: _ShardedLayer(share[number], number, bounds, link) for number in memory.layers})
        try:
            yield memory
        finally:
            with link.exchange, suppress(RankLostError):  # who is gone needs no word
                for rank in range(1, link.ranks):
                    link.send(rank, _header(CLOSE))


class _Link:
    """Sends tensors to other ranks and receives them, and says which one is gone.

    Attributes:
        rank: of this process.
        ranks: how many there are.
        exchange: held from a question to its last reply, so that those of several threads do not mix.
    """

    def __init__(self, group: dist.ProcessGroup | None, path: Path) -> None:
        self._group, self._path = group, path
        self.exchange = threading.Lock()
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

    def send(self, rank: int, tensor: Tensor) -> None:
        try:
            dist.send(tensor.contiguous().to(self._device), group=self._group, group_dst=rank)
        except RuntimeError as error:
            raise self._lost(rank, error) from error

    def receive(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        try:
            dist.recv(tensor, group=self._group, group_src=rank)
        except RuntimeError as error:
            raise self._lost(rank, error) from error
        return tensor

    def _lost(self, rank: int, error: RuntimeError) -> RankLostError:
        return RankLostError(
            f"rank {rank} of the {self.ranks} that share {self._path} does not answer ({str(error).splitlines()[0]}): "
            "look for its own error, and start all ranks again; nothing was written to the memory"
        )


class _ShardedLayer(Index):
    """One layer on rank 0: its own share, and those of the others by asking them."""

    def __init__(self, own: LayerMemory, number: int, bounds: list[tuple[int, int]], link: _Link) -> None:
        self._own, self._number, self._link = own, number, link
        self._sizes = [stop - start for start, stop in bounds]
        self._others = [rank for rank in range(1, link.ranks) if self._sizes[rank]]

    def add(self, keys: Tensor) -> None:
        """Never called: the memory is open to be read."""
        raise ValueError("a memory over several ranks cannot grow: open it with Memory.open(path, mode='a')")

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The best of what every rank finds; shapes as in ``Index.search``."""
        with self._link.exchange:
            self._ask(SEARCH, queries, k=k)
            found = [self._own.search(queries, k)]
            for rank in self._others:
                shape = (*queries.shape[:2], min(k, self._sizes[rank]))
                scores, slots = (self._link.receive(rank, shape, dtype) for dtype in (torch.float32, torch.int64))
                found.append((scores.to(queries.device), slots.to(queries.device)))
        scores, slots = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        scores, order = scores.topk(k, dim=-1)
        return scores, slots.gather(-1, order)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention over the tokens of all ranks; shapes as in ``Index.attend``."""
        with self._link.exchange:
            self._ask(ATTEND, queries, scale=scale)
            parts = [self._own.attend(queries, scale=scale)]
            for rank in self._others:
                output, lse = (
                    self._link.receive(rank, tuple(shape), torch.float32).to(queries.device)
                    for shape in (queries.shape, queries.shape[:2])
                )
                parts.append((output, lse))
        return merge(parts)

    @property
    def attends_to_all(self) -> bool:
        """Whether the shares do."""
        return self._own.attends_to_all

    def nbytes(self) -> int:
        """0: each rank counts its own."""
        return 0

    def describe(self) -> str:
        """The index of this rank's share."""
        return f"{self._own.describe()}, on each of {self._link.ranks} ranks"

    def _ask(self, what: int, queries: Tensor, *, scale: float = 0.0, k: int = 0) -> None:
        header = _header(what, self._number, *queries.shape, k, DTYPES.index(queries.dtype), scale)
        for rank in self._others:
            self._link.send(rank, header)
            self._link.send(rank, queries.float())


def _header(*numbers: float) -> Tensor:
    """What is asked for: kind, layer, shape of the queries (3), k, place of their dtype in ``DTYPES``, scale."""
    header = torch.zeros(8, dtype=torch.float64)
    header[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    return header


@torch.no_grad()
def _serve(share: Memory, first: int, link: _Link) -> None:
    """Answer rank 0 until it closes; ``first`` is the slot of the share's first token in the whole memory."""
    while True:
        *numbers, scale = link.receive(0, (8,), torch.float64).tolist()
        what, layer, heads, rows, dim, k, dtype = map(int, numbers)
        if what == CLOSE:
            return
        queries = link.receive(0, (heads, rows, dim), torch.float32).to(DTYPES[dtype])
        if what == ATTEND:
            output, lse = share[layer].attend(queries, scale=scale)
            answer = (output.float(), lse)
        else:
            scores, slots = share[layer].search(queries, k)
            answer = (scores, torch.where(slots < 0, slots, slots + first))
        for tensor in answer:
            link.send(0, tensor)
