"""The FAISS backend against the exact one. Tolerances and floors are explained where they stand."""

import faiss
import pytest
import torch
from torch import Tensor

from memory import ExactIndex, Memory, VectorBlocks, attention_mass_recall, faiss_factory
from memory.faiss_factory import new_index, parse_factory
from memory.faiss_index import FaissIndex, check_factory

G, D, K = 2, 32, 64
SCALE = D**-0.5


def clustered(num_keys: int, num_queries: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys (G, N, D) around 64 centres, as those of a text are, with a common mean; queries near the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(G, 64, D, generator=generator)
    heads = torch.arange(G).unsqueeze(1)
    keys = centres[heads, torch.randint(64, (G, num_keys), generator=generator)]
    keys = keys + 0.6 * torch.randn(keys.shape, generator=generator) + 2.0
    queries = centres[heads, torch.randint(64, (G, num_queries), generator=generator)]
    return keys, queries + torch.randn(queries.shape, generator=generator)


def lognormal(num_keys: int) -> tuple[Tensor, Tensor]:
    """Keys of every direction whose norms span two orders of magnitude."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.nn.functional.normalize(torch.randn(G, num_keys, D, generator=generator), dim=-1)
    norms = 4.0 * torch.exp(0.7 * torch.randn(G, num_keys, 1, generator=generator))
    return keys * norms, torch.randn(G, 64, D, generator=generator)


def giants(num_keys: int) -> tuple[Tensor, Tensor]:
    """Clustered keys, a few of them ten times as long."""
    keys, queries = clustered(num_keys)
    keys[:, ::1024] *= 10
    return keys, queries


def blocks_of(vectors: Tensor, dtype: torch.dtype = torch.float32) -> VectorBlocks:
    blocks = VectorBlocks(vectors.shape[0], vectors.shape[2], dtype)
    blocks.append(vectors)
    return blocks


def index_of(factory: str, keys: Tensor, *, dtype: torch.dtype = torch.float32, top_k: int | None = None) -> FaissIndex:
    """An index over keys that were all added at once; its values are the keys."""
    stored = blocks_of(keys, dtype)
    index = FaissIndex(factory, stored, blocks_of(keys), top_k)
    index.add(keys)
    return index


def kept(index: FaissIndex, keys: Tensor, queries: Tensor, k: int = K) -> float:
    """Mean attention mass recall of the index's hits, as a share of that of the exact hits."""
    blocks = blocks_of(keys)
    found = attention_mass_recall(queries, keys, index.search(queries, k)[1], scale=SCALE)
    best = attention_mass_recall(queries, keys, ExactIndex(blocks, blocks).search(queries, k)[1], scale=SCALE)
    return (found / best).mean().item()


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat;nprobe=16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_index_that_looks_at_everything_is_exact(factory: str, dtype: torch.dtype) -> None:
    keys, queries = (torch.round(64 * vectors) / 64 for vectors in clustered(1500))
    index = index_of(factory, keys, dtype=dtype)
    scores, slots = index.search(queries, K)
    blocks = blocks_of(keys, dtype)
    exact_scores, exact_slots = ExactIndex(blocks, blocks).search(queries, K)
    # On a grid of 1/64 every product fits float32, so the order of summation changes no bit; the scales of int8 do.
    tolerance = 1e-4 if dtype == torch.int8 else 0.0
    torch.testing.assert_close(scores, exact_scores, rtol=0, atol=tolerance)
    gaps = exact_scores[..., :-1] - exact_scores[..., 1:] > 2 * tolerance
    clear = gaps[..., :-1] & gaps[..., 1:]  # ties may swap
    assert clear.float().mean() > 0.9
    assert torch.equal(slots[..., 1:-1][clear], exact_slots[..., 1:-1][clear])
    assert index.describe() == f"{factory.partition(';')[0]}, top-128"


def test_flat_with_every_key_equals_dense_attention() -> None:
    keys, queries = clustered(1500)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    stored, stored_values = blocks_of(keys), blocks_of(values)
    index = FaissIndex("Flat", stored, stored_values, top_k=1500)
    index.add(keys)
    output, lse = index.attend(queries, scale=SCALE)
    exact_output, exact_lse = ExactIndex(stored, stored_values).attend(queries, scale=SCALE)
    torch.testing.assert_close(output, exact_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-5)
    fewer = FaissIndex("Flat", stored, stored_values, top_k=4)
    fewer.add(keys)
    assert (fewer.attend(queries, scale=SCALE)[0] - exact_output).abs().max() > 1e-3


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "HNSW16", "IVF16,Flat", "SQ8", "PCA16,IVF16,Flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_scores_are_inner_products_with_the_stored_keys(factory: str, dtype: torch.dtype) -> None:
    keys, queries = clustered(1000)
    index = index_of(factory, keys, dtype=dtype)
    scores, slots = index.search(queries, K)
    stored = blocks_of(keys, dtype).gather(slots.clamp(min=0), torch.float32)
    products = (stored @ queries.unsqueeze(-1)).squeeze(-1).masked_fill(slots < 0, -torch.inf)
    torch.testing.assert_close(scores, products, rtol=1e-5, atol=1e-4)  # order of summation, as above
    assert (scores[..., :-1] >= scores[..., 1:]).all()
    assert all(len(set(row.tolist())) == K for row in slots[0])


def test_missing_hits_are_padded_and_weigh_nothing() -> None:
    keys, queries = clustered(1500)
    index = index_of("IVF16,Flat;nprobe=1", keys, top_k=1400)
    scores, slots = index.search(queries, 1400)
    assert (slots < 0).any()
    assert torch.equal(slots < 0, scores == -torch.inf)
    output, lse = index.attend(queries, scale=SCALE)
    assert output.isfinite().all()
    assert lse.isfinite().all()


# --- quality --------------------------------------------------------------------------------------------------------

# (clustered, lognormal, giants). Measured: 0.01 to 0.03 above each floor, so that another seed or FAISS passes. Keys of
# any direction (lognormal) have no clusters, so lists must miss some.
FLOORS = {
    "Flat": (1.0, 1.0, 1.0),
    "IVF,Flat": (0.99, 0.95, 0.99),
    "IVF64,Flat;nprobe=4": (0.99, 0.86, 0.99),
    "IVF64,SQ8": (0.99, 0.96, 0.99),
    "SQ8": (0.99, 0.99, 0.99),
    "HNSW16": (0.99, 0.94, 0.99),
}


@pytest.mark.parametrize("factory", FLOORS)
@pytest.mark.parametrize("data", [clustered, lognormal, giants])
def test_hits_carry_the_attention_mass(factory: str, data) -> None:
    keys, queries = data(8192)
    share = kept(index_of(factory, keys), keys, queries)
    print(f"{factory} {data.__name__} {share:.4f}")
    assert share >= FLOORS[factory][[clustered, lognormal, giants].index(data)] - 1e-5


@pytest.mark.parametrize("factory", ["IVF64,PQ16x4", "PQ16x4"])
def test_product_codes_find_most_of_the_mass(factory: str) -> None:
    keys, queries = clustered(4096)
    index = index_of(factory, keys)
    assert index.describe() == f"{factory}, top-128"
    share = kept(index, keys, queries)
    print(f"{factory} {share:.4f}")
    assert share >= 0.9  # the 8 bytes of a key are coarse, more so without lists to take residuals from


@pytest.mark.parametrize("factory", ["PQ4x4", "IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4", "OPQ4,PQ4x4,RFlat"])
def test_centroids_of_codes_are_not_numbered_anew(factory: str) -> None:
    """FAISS does that by default, for a search that is not ours; it takes ten times as long as the rest of training."""
    whole = new_index(parse_factory(factory), D, 4096)
    index = whole  # which owns its parts
    while isinstance(index, (faiss.IndexPreTransform, faiss.IndexRefine)):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    assert not index.do_polysemous_training
    assert index.pq.cp.niter == 10


@pytest.mark.parametrize("data", [clustered, giants])
def test_raw_hnsw_fails_where_ours_does_not(data) -> None:
    keys, queries = data(4096)
    keys = keys + 6.0  # a common mean, which real keys have: one direction holds most of their length
    ours = kept(index_of("HNSW16", keys), keys, queries)
    raw = raw_kept("HNSW16", keys, queries)
    print(f"HNSW16 {data.__name__}: {ours:.3f}, raw inner product {raw:.3f}")
    assert ours > 0.95
    assert raw < 0.8


def test_plain_inverted_lists_hide_giants() -> None:
    keys, queries = giants(8192)
    assert raw_kept("IVF64,Flat", keys, queries) < 0.8
    assert kept(index_of("IVF64,Flat;nprobe=4", keys), keys, queries) > 0.99


def raw_kept(factory: str, keys: Tensor, queries: Tensor) -> float:
    """As ``kept``, for FAISS's own index on inner products."""
    slots = []
    for head, asked in zip(keys, queries, strict=True):
        index = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
        if "IVF" in factory:
            index.nprobe = 4
        else:
            index.hnsw.efSearch, index.hnsw.efConstruction = 128, 128
        index.train(head.numpy())
        index.add(head.numpy())
        slots.append(torch.from_numpy(index.search(asked.numpy(), K)[1]))
    blocks = blocks_of(keys)
    found = attention_mass_recall(queries, keys, torch.stack(slots), scale=SCALE)
    best = attention_mass_recall(queries, keys, ExactIndex(blocks, blocks).search(queries, K)[1], scale=SCALE)
    return (found / best).mean().item()


# --- growth ---------------------------------------------------------------------------------------------------------


def grow(index: FaissIndex, blocks: VectorBlocks, keys: Tensor) -> None:
    blocks.append(keys)
    index.add(keys)


def test_a_trained_index_is_exact_then_built_then_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_factory, "FIRST_LISTS_AT", 512)
    keys, queries = clustered(4096)
    blocks = VectorBlocks(G, D, torch.float32)
    index = FaissIndex("IVF", blocks, blocks)
    built = []
    monkeypatch.setattr(index, "_build", lambda build=index._build: (built.append(len(blocks)), build()))
    kinds = {}
    for start in range(0, 4096, 128):
        grow(index, blocks, keys[:, start : start + 128])
        kinds[start + 128] = index.describe()
        slots = index.search(queries, 8)[1]
        assert slots.max() < len(blocks)
        assert index.attend(queries, scale=SCALE)[0].isfinite().all()
    assert kinds[128] == kinds[384] == "exact until 512 keys are stored, then IVF"
    assert kinds[512] == "IVF8,Flat, top-128"
    assert kinds[2048] == "IVF32,Flat, top-128"
    assert built == [512, 2048]
    assert kept(index, keys, queries) > 0.97


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF16,Flat;nprobe=16", "IVF16,SQ8;nprobe=16", "SQ8"])
def test_searches_between_adds_see_all_that_is_stored(factory: str) -> None:
    keys, queries = clustered(2048)
    blocks = VectorBlocks(G, D, torch.float32)
    index, exact = FaissIndex(factory, blocks, blocks), ExactIndex(blocks, blocks)
    for start, stop in ((0, 1), (1, 300), (300, 1000), (1000, 1001), (1001, 2048)):
        grow(index, blocks, keys[:, start:stop])
        k = min(K, stop)
        slots, exact_slots = index.search(queries, k)[1], exact.search(queries, k)[1]
        same = (slots.unsqueeze(-1) == exact_slots.unsqueeze(-2)).any(-1).float().mean()
        assert same > 0.97, (stop, same)  # HNSW and 8-bit codes lose a key now and then
    newest = index.search(4 * keys[:, -1:], 32)[1]
    assert (newest == 2047).any(-1).all()


def test_larger_keys_make_a_graph_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = clustered(1024)
    blocks = VectorBlocks(G, D, torch.float32)
    index = FaissIndex("HNSW16", blocks, blocks)
    built = []
    monkeypatch.setattr(index, "_build", lambda build=index._build: (built.append(len(blocks)), build()))
    grow(index, blocks, keys[:, :512])
    grow(index, blocks, keys[:, 512:1000])
    assert built == [512]
    keys[:, 1000:] *= 100
    grow(index, blocks, keys[:, 1000:])
    assert built == [512, 1024]
    assert kept(index, keys, queries) > 0.98


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF", "IVF16,SQ8", "SQ8", "PCA16,IVF16,Flat", "HNSW16"])
def test_building_writes_nothing_to_stderr(factory: str, capfd: pytest.CaptureFixture[str]) -> None:
    keys, queries = clustered(4096)
    index_of(factory, keys[:, :640]).search(queries, K)
    index_of(factory, keys).search(queries, K)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF64,SQ8", "HNSW16", "SQ8"])
def test_nbytes_is_what_faiss_would_write(factory: str) -> None:
    keys, _ = clustered(4096)
    index = index_of(factory, keys)
    written = sum(len(faiss.serialize_index(head.index)) for head in index._heads or ())
    assert index.nbytes() == pytest.approx(written, rel=0.05)  # centroids twice, links by expectation
    assert FaissIndex(factory, VectorBlocks(G, D, torch.float32), VectorBlocks(G, D, torch.float32)).nbytes() == 0


# --- through Memory -------------------------------------------------------------------------------------------------


def memory_of(index: str, keys: Tensor, **options: str) -> Memory:
    memory = Memory([3], G, D, index=index, **options)
    half = keys.shape[1] // 2
    for name, part in (("a", keys[:, :half]), ("b", keys[:, half:])):
        memory.append({3: part}, {3: part}, torch.arange(part.shape[1]), document=name)
    return memory


@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16", "int8"])
def test_memory_drops_resets_and_clones(key_dtype: str) -> None:
    keys, queries = clustered(9000)
    memory = memory_of("IVF,Flat", keys, key_dtype=key_dtype)
    assert memory[3].describe().startswith("IVF")
    copy = memory.clone()
    torch.testing.assert_close(copy[3].search(queries, 8), memory[3].search(queries, 8))
    assert memory.drop_document("a") == 4500
    scores, slots = memory[3].search(queries, 8)
    assert len(memory) == 4500
    assert slots.max() < 4500
    stored = memory[3].keys(slots)
    torch.testing.assert_close(scores, (stored @ queries.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-4)
    assert copy[3].search(queries, 8)[1].max() >= 4500
    assert memory.nbytes()["index"] > 4500 * G * D * 4
    memory.reset()
    assert memory.nbytes()["index"] == 0
    assert memory[3].describe() == "empty"
    memory.append({3: keys[:, :10]}, {3: keys[:, :10]}, torch.arange(10))
    assert memory[3].search(queries, 99)[1].shape == (G, 64, 10)


def test_a_small_memory_with_a_trained_index_is_exact() -> None:
    keys, queries = clustered(1000)
    trained, exact = memory_of("IVF,Flat", keys), memory_of("exact", keys)
    for ours, theirs in zip(
        trained[3].attend(queries, scale=SCALE), exact[3].attend(queries, scale=SCALE), strict=True
    ):
        assert torch.equal(ours, theirs)


# --- the string -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    ["Flat", "HNSW32", "IVF1024,Flat", "IVF1024,SQ8", "IVF1024,PQ16", "IVF", "IVF,SQ8", "IVF256", "IVF64_HNSW32,Flat",
     "IVF,Flat;nprobe=32", "HNSW32;efSearch=64,efConstruction=80", "PQ25", "OPQ16,IVF64,PQ16", "IVF64,Flat; nprobe=4"],
)  # fmt: skip
def test_good_strings_pass(factory: str) -> None:
    check_factory(factory)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Flatt", "FAISS cannot build index 'Flatt' .*IVF,Flat"),
        ("", "FAISS cannot build index '' "),
        ("LSH", "LSH"),
        ("NSG32", "cannot be added"),
        ("IDMap,Flat", "omit IDMap"),
        ("L2norm,Flat", "cosine"),
        ("PCA32,HNSW32", "start the string with HNSW"),
        ("HNSW32,SQ8", "compressed"),
        ("IVF,Flat;probes=3", "'probes=3' of index .* takes nprobe"),
        ("IVF,Flat;nprobe=8,efSearch=4", "'efSearch=4'"),
        ("HNSW32;nprobe=8", "'nprobe=8'"),
        ("IVF,Flat;nprobe=0", "above 0"),
        ("IVF,Flat;nprobe", "name=number"),
        ("gpu:HNSW32", "only on a CPU"),
    ],
)
def test_bad_strings_are_refused_in_one_clear_line(factory: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_factory(factory)
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_a_head_size_that_codes_cannot_split_is_refused() -> None:
    with pytest.raises(ValueError, match="at head size 32"):
        FaissIndex("PQ25", VectorBlocks(G, D, torch.float32), VectorBlocks(G, D, torch.float32))


def test_parameters_change_the_search() -> None:
    keys, queries = lognormal(4096)
    one, many = (kept(index_of(f"IVF64,Flat;nprobe={n}", keys), keys, queries) for n in (1, 32))
    assert one < many
    narrow, wide = (kept(index_of(f"HNSW8;efSearch={n}", keys), keys, queries, k=4) for n in (4, 512))
    assert narrow < wide


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0, reason="has a GPU")
def test_gpu_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gpu:Flat' needs a GPU .* install faiss-gpu-cu12 in place of faiss-cpu"):
        check_factory("gpu:Flat")


# --- process --------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    keys, queries = clustered(1000)
    index_of("IVF16,Flat", keys).search(queries, K)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


# --- GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF,Flat", "IVF64,SQ8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpu_indexes_agree_with_exact(factory: str, device: str) -> None:
    keys, queries = clustered(9000)
    blocks = blocks_of(keys.to(device))
    index = FaissIndex(f"gpu:{factory};nprobe=64" if "IVF" in factory else f"gpu:{factory}", blocks, blocks)
    index.add(keys.to(device))
    scores, slots = index.search(queries.to(device), K)
    assert scores.device.type == slots.device.type == device
    best = ExactIndex(blocks, blocks).search(queries.to(device), K)[1]
    found = attention_mass_recall(queries.to(device), keys.to(device), slots, scale=SCALE)
    assert (found / attention_mass_recall(queries.to(device), keys.to(device), best, scale=SCALE)).mean() > 0.97
    assert index.attend(queries.to(device), scale=SCALE)[0].isfinite().all()


@pytest.mark.gpu
def test_cuda_keys_are_searched_by_a_cpu_index() -> None:
    keys, queries = (vectors.cuda() for vectors in clustered(1500))
    scores, slots = index_of("IVF16,Flat;nprobe=16", keys).search(queries, K)
    assert scores.is_cuda
    assert slots.is_cuda
