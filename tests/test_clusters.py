"""The backend ``clusters`` against exact attention."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory import Memory, VectorBlocks, cluster_table, clusters
from memory.clusters import ClusterIndex, ClusterPlan
from memory.levels import MOST_CHANGE, Level, Measured

HEADS, DIM, LAYER = 2, 16, 3
SCALE = DIM**-0.5


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "SEGMENT", 512)


@pytest.fixture
def two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of clusters from the first stretch on."""
    monkeypatch.setattr(cluster_table, "COARSE_FROM", 1)
    monkeypatch.setattr(cluster_table, "COARSE", 6)
    monkeypatch.setattr(cluster_table, "GROUP", 2)


def topics(count: int, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Keys and values (G, n, D) about 40 topics that come in runs."""
    generator = torch.Generator().manual_seed(seed)
    centres, meanings = 3 * torch.randn(2, HEADS, 40, DIM, generator=torch.Generator().manual_seed(99))
    of = torch.randint(40, (count // 8 + 1,), generator=generator).repeat_interleave(8)[:count]
    noise = torch.randn(2, HEADS, count, DIM, generator=generator)
    return centres[:, of] + spread * noise[0], meanings[:, of] + spread * noise[1]


def store(index: str, *parts: tuple[Tensor, Tensor], **options: Any) -> Memory:
    made = Memory([LAYER], HEADS, DIM, index=index, **options)
    for number, (keys, values) in enumerate(parts):
        made.append({LAYER: keys}, {LAYER: values}, range(keys.shape[1]), document=f"part {number}")
    return made


def queries(count: int, seed: int = 5) -> Tensor:
    return topics(count, seed)[0] / 2


def error(memory: Memory, exact: Memory, asked: Tensor, scale: float = SCALE) -> float:
    """Mean relative error of the output."""
    output, wanted = (one[LAYER].attend(asked, scale=scale)[0] for one in (memory, exact))
    return ((output - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean().item()


@given(st.integers(1, 1500), st.integers(1, 90), st.sampled_from(["float32", "bfloat16", "int8"]))
@settings(max_examples=15, deadline=None)
def test_all_clusters_attended_is_exact(count: int, asked: int, dtype: str) -> None:
    """Whatever stretches, outliers and keys behind them there are, each key counts once."""
    kinds = {"key_dtype": dtype, "value_dtype": dtype}
    some, exact = (store(index, topics(count), **kinds) for index in ("clusters;share=0.9999", "exact"))
    for found, wanted in zip(*(one[LAYER].attend(queries(asked), scale=SCALE) for one in (some, exact)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 60, 200])
def test_the_error_falls_with_the_share(rows: int) -> None:
    data = topics(4096, spread=1.0)
    exact, asked = store("exact", data), queries(rows)
    errors = [error(store(f"clusters;share={share}", data), exact, asked) for share in (0.01, 0.1, 0.4, 0.9999)]
    assert all(more < less + 1e-5 for less, more in pairwise(errors))
    assert errors[0] < 0.25
    assert errors[3] < 1e-5


def test_the_tail_counts() -> None:
    """Where attention is spread over everything, a few keys alone give another answer."""
    data = topics(4096)
    exact, asked = store("exact", data), queries(3) / 4
    lost = error(store("exact", data, top_k=82), exact, asked)
    assert lost > 0.3
    assert error(store("clusters;share=0.02", data), exact, asked) < lost / 4


@pytest.mark.parametrize("wanted", [0.2, 0.05, 0.01])
def test_an_error_chooses_the_share(wanted: float) -> None:
    data = topics(4096, spread=1.0)
    exact, memory = store("exact", data), store(f"clusters;error={wanted}", data)
    memory[LAYER].attend(queries(100, seed=8), scale=SCALE)  # what it tries shares on
    singles = [error(memory, exact, one) for one in queries(100).split(1, dim=1)]
    assert sum(singles) / len(singles) < 1.3 * wanted  # other queries than those that it tried


def test_too_small_a_share_errs_more() -> None:
    """So that the test above can fail."""
    data = topics(4096, spread=1.0)
    exact, loosest = store("exact", data), store("clusters;share=0.0025", data)
    assert sum(error(loosest, exact, one) for one in queries(100).split(1, dim=1)) / 100 > 0.05


@pytest.mark.parametrize("rows", [3, 40, clusters.MANY])
def test_gradients_reach_the_queries(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "DENSE_SHARE", 4.0)  # above which a window gets dense attention
    data = topics(1100)
    grads = []
    for index in ("clusters;share=0.9999", "exact"):
        asked = queries(rows).requires_grad_()
        store(index, data)[LAYER].attend(asked, scale=SCALE)[0].square().sum().backward()
        grads.append(asked.grad)
    torch.testing.assert_close(*grads, atol=2e-3, rtol=1e-3)  # of values near 1, for sums that nearly cancel


def test_a_sink_is_attended_to_exactly() -> None:
    """A tiny key of a tiny value, in a stretch of keys that no query likes."""
    keys, values = topics(2048)
    keys = keys + 20 * torch.ones(DIM)
    keys[:, 0], values[:, 0] = 0.01, 0.01
    asked = queries(9) - 4 * torch.ones(DIM)
    exact = store("exact", (keys, values))
    sunk = (exact[LAYER].attend(asked, scale=SCALE)[1]).abs().max()
    assert sunk < 0.3  # nothing much but the sink counts, and exp(0) is 1
    assert error(store("clusters;share=0.001", (keys, values)), exact, asked) < 1e-4


def test_stretches_do_not_change_when_more_is_appended() -> None:
    first, second = topics(1100, seed=1), topics(900, seed=2)
    memory = store("clusters", first)
    before = memory._indexed[LAYER].learnt()
    memory.append({LAYER: second[0]}, {LAYER: second[1]}, range(900))
    after = memory._indexed[LAYER].learnt()
    assert before is not None
    assert after is not None
    assert before.clusters.stretches[:, :2].tolist() == [[0, 512], [512, 512]]
    assert after.clusters.stretches[:, :2].tolist() == [[0, 512], [512, 512], [1024, 512]]
    for old, new in zip(before.clusters.split(), after.clusters.split()[:2], strict=True):
        assert all(torch.equal(vars(old)[name], vars(new)[name]) for name in vars(old))


def test_the_same_however_it_was_appended() -> None:
    keys, values = topics(1500)
    whole, asked = store("clusters", (keys, values)), queries(4)
    pieces = store("clusters")
    for some, others in zip(keys.split(217, dim=1), values.split(217, dim=1), strict=True):
        pieces.append({LAYER: some}, {LAYER: others}, range(some.shape[1]), document="part 0")
    for found, wanted in zip(
        pieces[LAYER].attend(asked, scale=SCALE),
        whole[LAYER].attend(asked, scale=SCALE),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_search_is_exact() -> None:
    data = topics(1500)
    some, exact = store("clusters", data), store("exact", data)
    assert torch.equal(some[LAYER].search(queries(5), 40)[1], exact[LAYER].search(queries(5), 40)[1])
    assert some[LAYER].attends_to_all


def test_truncated_and_cloned() -> None:
    data = topics(1700)
    memory = store("clusters;share=0.9999", data)
    copy = memory.clone()
    memory.truncate(1100)
    short = store("exact", (data[0][:, :1100], data[1][:, :1100]))
    assert error(memory, short, queries(3)) < 1e-5
    assert error(copy, store("exact", data), queries(3)) < 1e-5


@pytest.mark.parametrize("name", ["clusters;share=0", "clusters;share=1.5", "clusters;nprobe=3", "clusters;share="])
def test_names_that_are_not_understood(name: str) -> None:
    with pytest.raises(ValueError, match=r"share=0\.05"):
        Memory([LAYER], HEADS, DIM, index=name)


def test_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match="leave top_k out"):
        Memory([LAYER], HEADS, DIM, index="clusters", top_k=5)


def sunken(documents: int, tokens: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Documents that each begin with an attention sink of its own, and queries that find little else.

    No sink is among the smallest or the farthest keys: it lies where other keys do, of other values.
    """
    generator = torch.Generator().manual_seed(3)
    parts = []
    for number in range(documents):
        keys, values = topics(tokens, seed=number)
        keys[:, 0] = keys[:, 1:9].mean(1) - 0.5
        values[:, 0] = 20 * torch.randn(HEADS, DIM, generator=generator)
        parts.append((keys, values))
    firsts = torch.stack([keys[:, 0] for keys, _ in parts], dim=1)
    return parts, 2 * firsts


def test_the_first_tokens_of_documents_are_attended_to_exactly() -> None:
    parts, asked = sunken(20, 51)
    joined = [torch.cat(vectors, dim=1) for vectors in zip(*parts, strict=True)]
    exact = store("exact", *parts)
    known, unknown = store("clusters;share=0.001", *parts), store("clusters;share=0.001", (joined[0], joined[1]))
    learnt = known._indexed[LAYER].learnt()
    assert learnt is not None
    assert learnt.clusters.end == 512
    order, outliers = learnt.clusters.order[0], int(learnt.clusters.stretches[0, 2])
    assert set(order[:outliers].tolist()) >= {51 * document + place for document in range(10) for place in range(4)}
    assert error(known, exact, asked) < error(unknown, exact, asked) / 2


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.booleans())
@settings(max_examples=15, deadline=None)
def test_documents_of_any_length_count_once(lengths: list[int], again: bool) -> None:
    """Shorter than their first tokens, longer than a stretch, and clustered again after one was dropped."""
    parts = [topics(length, seed) for seed, length in enumerate(lengths)]
    memory = store("clusters;share=0.9999", *parts)
    if again and len(parts) > 1:
        memory.drop_document("part 0")
        parts = parts[1:]
    torch.testing.assert_close(
        memory[LAYER].attend(queries(5), scale=SCALE), store("exact", *parts)[LAYER].attend(queries(5), scale=SCALE),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_where_documents_start() -> None:
    from memory.tokens import TokenTable

    table = TokenTable()
    for name, count in (("a", 3), (None, 9), ("b", 7), ("a", 6)):
        table.commit(table.prepare(np.arange(count, dtype=np.int32), name, None))
    starts = [0, 1, 2, 3, 4, 5, 6, 12, 13, 14, 15, 19, 20, 21, 22]
    assert table.starts(0, 25, 4).tolist() == starts
    for first in range(25):
        for stop in range(first, 26):
            assert table.starts(first, stop, 4).tolist() == [slot for slot in starts if first <= slot < stop]


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("count", [511, 512, 1300, 3000])
@pytest.mark.parametrize("asked", [1, 3, 60])
def test_two_levels_of_clusters_hold_each_key_once(count: int, asked: int) -> None:
    data = topics(count)
    some, exact = (store(index, data)[LAYER] for index in ("clusters;share=0.9999", "exact"))
    for found, wanted in zip(*(one.attend(queries(asked), scale=SCALE) for one in (some, exact)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("lengths", [(4096,), (700, 300, 1300, 40)])
def test_a_query_that_prefers_nothing_gets_the_mean(
    levels: int, share: float, lengths: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    """Whatever is opened or stands in, by keys, clusters or coarse clusters: each key counts as one."""
    if levels == 2:
        request.getfixturevalue("two_levels")
    parts = [topics(length, seed) for seed, length in enumerate(lengths)]
    output, lse = store(f"clusters;share={share}", *parts)[LAYER].attend(torch.zeros(HEADS, 3, DIM), scale=SCALE)
    wanted = torch.cat([values for _, values in parts], dim=1).mean(1, keepdim=True).expand_as(output)
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse.exp(), torch.full_like(lse, sum(lengths)), atol=0, rtol=1e-4)


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("rows", [3, 60])
def test_with_two_levels_the_error_falls_with_the_share(rows: int) -> None:
    data = topics(4096, spread=1.0)
    exact, asked = store("exact", data), queries(rows)
    errors = [error(store(f"clusters;share={share}", data), exact, asked) for share in (0.005, 0.03, 0.2, 0.9999)]
    assert all(more < less + 1e-5 for less, more in pairwise(errors))
    assert errors[0] < 0.3
    assert errors[3] < 1e-5


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("seed", range(4))
def test_the_last_group_may_be_shorter_than_the_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads look into unequal numbers of coarse clusters, and what fills up a row must be a cluster that there is."""
    keys, values = topics(512 * 3, seed, spread=1.0)
    stretch = torch.arange(3).repeat_interleave(512)  # so that a coarse cluster lies in one stretch
    keys = keys + 6 * torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed))[stretch]
    exact, errors = store("exact", (keys, values)), []
    for coarse_from in (1, 4096):
        monkeypatch.setattr(cluster_table, "COARSE_FROM", coarse_from)
        memory = store("clusters;share=0.05", (keys, values))
        errors.append(sum(error(memory, exact, one) for one in (keys[:, ::20] / 4).split(1, dim=1)))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.usefixtures("two_levels")
def test_two_levels_rank_few_clusters_and_lose_little() -> None:
    data = topics(8192)
    keys, values = (VectorBlocks(HEADS, DIM, torch.float32) for _ in range(2))
    keys.append(data[0])
    values.append(data[1])
    index = ClusterIndex("clusters;share=0.01", keys, values, lambda start, stop: torch.arange(4)[start:stop])
    index.fill(None)
    asked = queries(30)
    found = torch.cat([index.attend(one, scale=SCALE)[0] for one in asked.split(1, dim=1)], dim=1)
    assert index._table is not None
    ranked = index._table.ask(slice(None), asked[:, :1] * SCALE, torch.full((HEADS,), 82.0)).estimate
    assert ranked.weights.shape[2] < 0.2 * len(keys) / 16
    exact = store("exact", data)[LAYER].attend(asked, scale=SCALE)[0]
    assert ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean() < 0.1


@pytest.mark.usefixtures("two_levels")
def test_coarse_clusters_of_full_groups_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = store("clusters;share=0.01", topics(3 * 512))
    memory[LAYER].attend(queries(1), scale=SCALE)
    made = []

    def assign(means: Tensor, number: int, most: int, of: Any = cluster_table.assign) -> Tensor:
        made.append(len(means))
        return of(means, number, most)

    monkeypatch.setattr(cluster_table, "assign", assign)
    more = topics(512, seed=3)
    memory.append({LAYER: more[0]}, {LAYER: more[1]}, range(512), document="more")
    memory[LAYER].attend(queries(1), scale=SCALE)
    stretch = (512 - 4 - 24) // 16
    assert all(count < 2.2 * stretch for count in made)  # the second group of two, not the first
    assert len(made) == HEADS


def test_the_default_share_falls_in_a_large_memory() -> None:
    default, named = ClusterPlan(), clusters.parse_clusters("clusters;share=0.02")
    assert [default.share_of(1 << bits) for bits in (10, 16, 18, 20)] == pytest.approx([0.02, 0.02, 0.01, 0.005])
    assert {named.share_of(1 << bits) for bits in (10, 16, 18, 20)} == {0.02}


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.sampled_from(["float32", "bfloat16", "int8"]))
@settings(max_examples=15, deadline=None)
def test_vectors_of_some_heads_are_gathered_from_all_blocks(lengths: list[int], dtype: str) -> None:
    blocks = VectorBlocks(3, 4, {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[dtype])
    for length in lengths:
        blocks.append(torch.randn(3, length, 4))
    slots = torch.randint(sum(lengths), (3, 70)).sort().values
    everything = blocks.take_range(0, sum(lengths), torch.float32)
    for heads in (slice(None), slice(1, 2)):
        wanted = everything[heads].gather(1, slots[heads].unsqueeze(2).expand(-1, -1, 4))
        assert torch.equal(blocks.gather_heads(heads, slots[heads]), wanted)


def test_clusters_attended_to_show_how_values_move() -> None:
    """Values move with keys, but by no one map: what is seen of them corrects the slope."""
    generator = torch.Generator().manual_seed(1)
    keys, asked = (scale * torch.randn(HEADS, count, DIM, generator=generator) for scale, count in ((2, 8192), (1, 24)))
    data = keys, keys.flip(2) * (keys.roll(1, 2) > 0) + keys.abs()
    exact, memory = store("exact", data), store("clusters;share=0.1", data)
    assert sum(error(memory, exact, one) for one in asked.split(1, dim=1)) / 24 < 0.038  # 0.043 by the slope alone


@pytest.mark.parametrize("width", [2.5, 3.5, 12.0])
def test_clusters_attended_to_show_what_others_weigh(width: float) -> None:
    """Of pairs of keys at their mean +- d: they weigh ``log cosh(q.d)`` more than at their mean, past the formula."""
    generator = torch.Generator().manual_seed(0)
    number, opened = 40, torch.arange(40)[None] < 20
    means = torch.randn(1, number, DIM, generator=generator)
    off = torch.zeros(1, number, DIM)
    off[..., 0] = width
    counts, spreads = torch.full((1, number), 2.0), off.square().sum(2)
    covariance = torch.zeros(1, DIM, DIM)
    covariance[:, 0, 0] = 1.0
    level = Level(means, means, torch.stack([counts, counts.log(), spreads]), covariance, torch.zeros(1, DIM, DIM))
    asked = torch.zeros(1, 1, DIM)
    asked[..., 0] = 1.0
    estimate = level.estimate(asked)
    formula = estimate.weights.clone()
    pairs = torch.stack([means + off, means - off], dim=2)  # (1, L, 2, D)
    truth = (pairs @ asked[0, 0]).logsumexp(2)
    of = torch.arange(20).repeat_interleave(2)[None]
    estimate.weights.masked_fill_(opened[:, None], -torch.inf)
    Measured(estimate, opened, of, (pairs @ asked[0, 0])[:, :20].flatten(1)[:, None])
    found = estimate.weights[0, 0]
    assert (found[:20] == -torch.inf).all()
    before, after = ((truth - weights)[0, 20:].abs().max() for weights in (formula[0], found[None]))
    assert after < before - 0.3
    assert ((found - formula)[0, 0, 20:].abs() <= MOST_CHANGE + 1e-5).all()
