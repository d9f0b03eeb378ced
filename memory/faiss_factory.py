"""FAISS factory strings: what they may be, and the index that one stands for."""

import re
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np

from memory.faiss_module import faiss

TRIAL_DIMS = (64, 80, 96, 100, 128, 256)  # head sizes that a factory string is tried with while none is known
POINTS_PER_CENTROID = 39  # below this FAISS warns, and centroids are poor (its wiki, "Guidelines to choose an index")
TRAIN_POINTS = 64  # per centroid; 256, FAISS's own limit, takes four times as long for nothing measurable
FIRST_LISTS_AT = 4096  # keys from which an ``IVF`` without a number is an inverted file
DEFAULT_NPROBE = 16
DEFAULT_EF_SEARCH = 128
DEFAULT_EF_CONSTRUCTION = 128
FORBIDDEN = {
    r"IVF0+\b": "an IVF index needs at least one list; use IVF,Flat",
    "IDMap": "the memory numbers its keys itself; omit IDMap",
    "NSG|NNDescent": "keys cannot be added to such a graph later; use HNSW32",
    "L2norm": "L2norm would rank keys by cosine and not by inner product; omit it",
    r"^HNSW.*(SQ|PQ)": "a search in a graph over compressed keys misses the best keys; use HNSW32 or IVF,SQ8",
    ",HNSW": "a graph over transformed keys gives poor results for inner products; start the string with HNSW",
}


@dataclass(frozen=True)
class Plan:
    """A factory string, taken apart."""

    text: str
    gpu: bool
    description: str  # for faiss.index_factory; ``IVF`` may still lack its number
    settings: str  # for faiss.ParameterSpace

    @property
    def graph(self) -> bool:
        return self.description.startswith("HNSW")

    def named(self, num_keys: int) -> str:
        """The description with the number of lists for this many keys put in."""
        return re.sub(r"\bIVF(?![\d(])", f"IVF{lists_for(num_keys)}", self.description)

    def keys_to_train(self) -> int:
        """Stored keys from which a trained index can be built without centroids that starve."""
        lists = re.search(r"\bIVF(\d*)", self.description)
        bits = re.search(r"(?:PQ|RQ|LSQ)\d+(?:x(\d+))?", self.description)
        least = POINTS_PER_CENTROID * max(
            int(lists[1]) if lists and lists[1] else 1, 1 << int(bits[1] or 8) if bits else 1
        )
        return max(least, FIRST_LISTS_AT if self.named(1) != self.description else 1)


def check_factory(factory: str, head_dim: int | None = None) -> None:
    """Raise if no index can be made from this string, before any key is stored.

    Args:
        factory: see the module's docstring.
        head_dim: D; None accepts a string that fits any usual one (``PQ25`` cannot split 64, but 100).

    Raises:
        ValueError: FAISS cannot build it for inner product, a parameter is unknown, or ``gpu:`` without a GPU.
    """
    plan = parse_factory(factory)
    problem = ""
    for dim in (head_dim,) if head_dim else TRIAL_DIMS:
        try:
            _try_out(plan, dim)
            break
        except RuntimeError as error:
            problem = problem or f"at head size {dim}: {_last_words(error)}"
    else:
        raise ValueError(
            f"FAISS cannot build index {factory!r} for inner products ({problem}); use exact, auto, or a "
            "factory string such as Flat, IVF,Flat, IVF1024,SQ8, IVF1024,PQ16 or HNSW32"
        )
    for setting in filter(None, plan.settings.split(",")):
        _check_setting(plan, setting, dim)
    if plan.gpu:
        _check_gpu(plan)


def parse_factory(factory: str) -> Plan:
    text, _, settings = factory.replace(" ", "").partition(";")
    description = text.removeprefix("gpu:")
    if re.search(r"\bIVF\d*$", description):
        description += ",Flat"
    return Plan(factory, text.startswith("gpu:"), description, settings)


def new_index(plan: Plan, dim: int, num_keys: int) -> Any:
    """An empty FAISS index for this many keys, its search parameters set; RuntimeError if FAISS cannot."""
    metric = faiss.METRIC_L2 if plan.graph else faiss.METRIC_INNER_PRODUCT
    index: Any = faiss.index_factory(dim + 1 if plan.graph else dim, plan.named(num_keys), metric)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = min(DEFAULT_NPROBE, inverted.nlist)
    if plan.graph:
        index.hnsw.efSearch, index.hnsw.efConstruction = DEFAULT_EF_SEARCH, DEFAULT_EF_CONSTRUCTION
    _train_codes_quickly(index)
    if plan.settings:
        parameters: Any = faiss.ParameterSpace()
        parameters.set_index_parameters(index, plan.settings)
    return index


def _train_codes_quickly(index: Any) -> None:
    """Settings of product codes, where an index has some; FAISS's own take a minute a head."""
    index = downcast(index)
    if isinstance(index, faiss.IndexPreTransform):
        _train_codes_quickly(index.index)
    elif isinstance(index, faiss.IndexRefine):
        _train_codes_quickly(index.base_index)
    elif isinstance(index, (faiss.IndexPQ, faiss.IndexIVFPQ)):
        codes: Any = index
        codes.pq.cp.niter, codes.pq.cp.max_points_per_centroid = 10, TRAIN_POINTS  # not 25 rounds over 65,536 keys
        # It numbers centroids by annealing, for a search by Hamming distance, which is not ours. Hits are the same.
        codes.do_polysemous_training = False


def index_nbytes(index: Any, num_keys: int) -> int:
    index = downcast(index)
    if isinstance(index, faiss.IndexPreTransform):
        return index_nbytes(index.index, num_keys)
    if isinstance(index, faiss.IndexRefine):
        return index_nbytes(index.base_index, num_keys) + index_nbytes(index.refine_index, num_keys)
    if isinstance(index, faiss.IndexIVF):
        # An id is 8 bytes; the centroids are held by FAISS and by the head.
        return num_keys * (index.code_size + 8) + 2 * 4 * index.nlist * index.d
    if isinstance(index, faiss.IndexHNSW):
        graph: Any = index.hnsw
        upper = graph.nb_neighbors(1)
        links = graph.nb_neighbors(0) + upper / (upper - 1)  # one key in M reaches the next level
        return int(num_keys * (index.storage.sa_code_size() + 4 * links + 12))
    return int(num_keys * index.sa_code_size())


def downcast(index: Any) -> Any:
    return faiss.downcast_index(index)


def lists_for(num_keys: int) -> int:
    """A power of two of about 2..4 sqrt(N), so still sqrt(N) when the memory has grown fourfold."""
    return 1 << (max(1, min(4 * isqrt(num_keys), num_keys // POINTS_PER_CENTROID)).bit_length() - 1)


def _try_out(plan: Plan, dim: int) -> None:
    """RuntimeError unless the index can be built and filled step by step."""
    for pattern, reason in FORBIDDEN.items():
        if re.search(pattern, plan.description):
            raise RuntimeError(reason)
    index = new_index(replace(plan, settings=""), dim, FIRST_LISTS_AT)
    if index.is_trained:
        for _ in range(2):
            index.add(np.ones((2, index.d), np.float32))


def _check_setting(plan: Plan, setting: str, dim: int) -> None:
    try:
        if not re.fullmatch(r"\w+=0*[1-9]\d*", setting):
            raise RuntimeError("write name=number with a whole number above 0")
        new_index(replace(plan, settings=setting), dim, FIRST_LISTS_AT)
    except RuntimeError as error:
        raise ValueError(
            f"parameter {setting!r} of index {plan.text!r} cannot be set ({_last_words(error)}); IVF takes nprobe, "
            "HNSW takes efSearch and efConstruction"
        ) from None


def _check_gpu(plan: Plan) -> None:
    if plan.graph:
        raise ValueError(f"index {plan.text!r}: HNSW runs only on a CPU; omit gpu: or use gpu:IVF,Flat")
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise ValueError(
            f"index {plan.text!r} needs a GPU that FAISS can use, and there is none: install faiss-gpu-cu12 in place "
            "of faiss-cpu and use a machine with a CUDA device, or omit gpu:"
        )


def _last_words(error: Exception) -> str:
    """What FAISS says, without where in its source."""
    return str(error).rsplit(": ", 1)[-1].strip()
