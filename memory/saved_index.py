"""The index part of a memory's folder: what the indexes of its layers learnt."""

from pathlib import Path

import torch
from torch import Tensor

from memory.clustered import Clusters, LearntClusters
from memory.index import Learnt, LearntIndex
from memory.manifest import Manifest
from memory.parts import MappedPart, Stream
from memory.vectors import VECTOR_DTYPES

COARSE = "coarse_"  # before the names of coarse clusters' tensors


def learnt_streams(learnt: dict[int, Learnt]) -> dict[str, Stream]:
    """The tensors of the index part."""
    streams: dict[str, Stream] = {}
    for layer, one in learnt.items():
        if isinstance(one, LearntClusters):
            streams |= {f"{name}.{layer}": Stream.of(tensor) for name, tensor in vars(one.clusters).items()}
            if one.coarse is not None:
                streams |= {f"{COARSE}{name}.{layer}": Stream.of(tensor) for name, tensor in vars(one.coarse).items()}
            continue
        streams[f"centroids.{layer}"] = Stream.of(one.centroids)
        streams[f"lists.{layer}"] = Stream.of(one.lists)
        streams[f"codec.{layer}"] = Stream.of(one.codec)
        streams[f"trained_on.{layer}"] = Stream.of(torch.tensor([one.trained_on]))
    return streams


def map_learnt(folder: Path, manifest: Manifest) -> dict[int, Learnt]:
    """What the indexes of some layers learnt, mapped; sizes are checked, numbers when an index is built from them.

    Raises:
        ValueError: as ``map_segment``.
    """
    if manifest.learnt is None:
        return {}
    part, heads = MappedPart(folder, manifest.learnt), manifest.num_key_value_heads
    learnt: dict[int, Learnt] = {}
    for layer in manifest.layers:
        if f"trained_on.{layer}" in part.names:
            centroids = part.take(f"centroids.{layer}", torch.float32, (heads, None, manifest.head_dim))
            lists = part.take(f"lists.{layer}", torch.int32, (heads, None))
            codec = part.take(f"codec.{layer}", torch.float32, (heads, None))
            trained_on = int(part.take(f"trained_on.{layer}", torch.int64, (1,)))
            if not 0 < trained_on < 1 << 48:
                raise part.damaged(f"trained_on is {trained_on}")
            learnt[layer] = LearntIndex(manifest.learnt_name, trained_on, centroids, lists, codec, str(part.path))
        elif f"stretches.{layer}" in part.names:
            coarse = None
            if f"key_scales.{layer}" in part.names:
                clusters = _map_clusters(part, "", layer, manifest)
                if f"{COARSE}stretches.{layer}" in part.names:
                    coarse = _map_clusters(part, COARSE, layer, manifest)
            else:
                clusters = _map_first_clusters(part, layer, manifest)
            learnt[layer] = LearntClusters(manifest.learnt_name, clusters, coarse, str(part.path))
    return learnt


def check_learnt(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the numbers of the index part."""
    dropped = sum(document.tokens for document in manifest.documents if document.dropped)
    most, problems = manifest.tokens() - dropped, []
    for layer, one in map_learnt(folder, manifest).items():
        if isinstance(one, LearntClusters):
            problems += [f"{one.origin}: layer {layer}: {what}" for what in _cluster_problems(one, manifest, most)]
            continue
        low, high = (int(one.lists.min()), int(one.lists.max())) if one.lists.numel() else (0, 0)
        if one.lists.shape[1] > most or low < 0 or high >= max(1, one.centroids.shape[1]):
            problems.append(f"{one.origin}: lists of layer {layer} do not fit the keys and centroids")
        if not (one.centroids.isfinite().all() and one.codec.isfinite().all()):
            problems.append(f"{one.origin}: a centroid or code of layer {layer} is NaN or infinite")
    return problems


def _map_clusters(part: MappedPart, prefix: str, layer: int, manifest: Manifest) -> Clusters:
    heads, dim = manifest.num_key_value_heads, manifest.head_dim
    keys, values = VECTOR_DTYPES[manifest.key_dtype], VECTOR_DTYPES[manifest.value_dtype]
    numbers, squares = (torch.bfloat16, torch.int8) if keys == torch.int8 else (torch.float32, torch.float32)
    shapes: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "stretches": (torch.int64, (None, 4)),
        "order": (torch.int16, (heads, None)),
        "counts": (torch.int16, (heads, None)),
        "mean_keys": (keys, (heads, None, dim)),
        "key_scales": (torch.bfloat16, (heads, None, 1)),
        "mean_values": (values, (heads, None, dim)),
        "value_scales": (torch.bfloat16, (heads, None, 1)),
        "spreads": (numbers, (heads, None)),
        "covariances": (squares, (heads, None, dim, dim)),
        "covariance_scales": (torch.bfloat16, (heads, None, dim, 1)),
        "slopes": (squares, (heads, None, dim, dim)),
        "slope_scales": (torch.bfloat16, (heads, None, dim, 1)),
    }
    return Clusters(**{name: part.take(f"{prefix}{name}.{layer}", *kind) for name, kind in shapes.items()})


def _map_first_clusters(part: MappedPart, layer: int, manifest: Manifest) -> Clusters:
    """Those of format version 1."""
    heads, dim = manifest.num_key_value_heads, manifest.head_dim

    def take(name: str, *shape: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
        return part.take(f"{name}.{layer}", dtype, shape)

    return Clusters.of(
        take("stretches", None, 4, dtype=torch.int64),
        take("order", heads, None, dtype=torch.int16),
        take("counts", heads, None, dtype=torch.int32),
        (take("mean_keys", heads, None, dim), take("mean_values", heads, None, dim)),
        take("spreads", heads, None),
        (take("covariances", heads, None, dim, dim), take("slopes", heads, None, dim, dim)),
        (torch.float32, torch.float32),
    )


def _cluster_problems(one: LearntClusters, manifest: Manifest, num_keys: int) -> list[str]:
    heads, dim = manifest.num_key_value_heads, manifest.head_dim
    try:
        one.clusters.check(heads, dim, num_keys)
        if one.coarse is not None:
            one.coarse.check(heads, dim, one.clusters.counts.shape[1])
    except ValueError as error:
        return [str(error)]
    return one.clusters.problems() + ([] if one.coarse is None else one.coarse.problems())
