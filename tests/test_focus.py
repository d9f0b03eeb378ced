"""Focus: the loss is -log of the measured share, its gradient exact, and training by it raises that share."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import WINDOW, ModelMaker
from joint_batch import LANES, WINDOWS, D, joint_batch, one_step, tiny_model
from torch.nn import functional
from train_helpers import SMALL, train, write_recipe

from fot.config import MemoryConfig
from training import focus, groups
from training.contexts import choose_all, choose_contexts, rows_of
from training.crossbatch import attend_batch, context_mass, enable_crossbatch
from training.focus import draw_queries
from training.groups import Contexts
from training.recipe import load_recipe
from training.schedule import ContextSchedule

Draw = Callable[..., torch.Tensor]

PADDING = torch.zeros(5, 7, dtype=torch.bool)
PADDING[2, 4:] = PADDING[4, 6:] = True
ASKED = torch.tensor([[0, 1, 6], [3, 3, 2], [1, 2, 3], [0, 5, 4]])


def seen(padding: torch.Tensor | None = None, copies: float | None = None) -> Contexts:
    """Four rows: two mixed ones with as many contexts, one with more, one that sees its own document alone."""
    rows = [torch.tensor(row) for row in ([1, 4], [0, 2], [3, 2, 0, 4], [1])]
    counts = None if copies is None else [torch.full((len(row),), copies) for row in rows]
    return Contexts(rows, padding, counts, positives=(1, 1, 3, 1), asked=ASKED)


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """queries and context keys: 4 query heads on 2 KV heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 4, 7, 8), (5, 2, 7, 8))
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


def exact(queries: torch.Tensor, keys: torch.Tensor, contexts: Contexts, scale: float) -> torch.Tensor:
    """Query by query."""
    total = queries.new_zeros(())
    assert contexts.positives is not None
    for row, (others, own) in enumerate(zip(contexts.rows, contexts.positives, strict=True)):
        if not 0 < own < len(others):
            continue
        values = []
        for head in range(queries.shape[1]):
            for place in ASKED[row]:
                scores = scale * keys[others, head // 2] @ queries[row, head, place]  # (M, T)
                if contexts.padding is not None:
                    scores = scores.masked_fill(contexts.padding[others], -torch.inf)
                shares = scores.flatten().softmax(0).reshape(scores.shape)
                values.append(-shares[:own].sum().log())
        total = total + torch.stack(values).mean()
    return total


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("slices", ["whole", "single rows"])
def test_loss_and_gradients_are_those_of_the_formula(
    slices: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slices == "single rows":
        monkeypatch.setattr(focus, "SCORES", 1)
    contexts, given = seen(PADDING if padded else None, copies=9.0), tensors()
    found, right = focus.focus_loss(*given, contexts, scale=0.7), exact(*given, contexts, 0.7)
    assert found is not None
    torch.testing.assert_close(found, right)
    assert found > 0.1
    for one, other in zip(torch.autograd.grad(found, given), torch.autograd.grad(right, given), strict=True):
        torch.testing.assert_close(one, other)
        assert other.abs().max() > 1e-3


def test_bfloat16_is_close_also_under_autocast() -> None:
    given = tensors(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    right = exact(*wide, seen(), 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = focus.focus_loss(*given, seen(), scale=0.7)
    assert found is not None
    assert found.item() == pytest.approx(right.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(found, given), torch.autograd.grad(right, wide), strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_nothing_is_lost_where_all_goes_to_the_own_document() -> None:
    queries, keys = tensors()
    with torch.no_grad():
        keys.zero_()
        queries.fill_(1.0)
        keys[[1, 3]] = 50.0
    contexts = Contexts([torch.tensor([1, 3, 0, 2])] * 4, positives=(2,) * 4, asked=ASKED)
    found = focus.focus_loss(queries, keys, contexts, scale=1.0)
    assert found is not None
    assert found.item() == 0
    none = focus.focus_loss(queries, torch.zeros_like(keys), contexts, scale=1.0)
    assert none is not None
    assert none.item() / 4 == pytest.approx(torch.tensor(2.0).log().item()), "two of four, without a preference"


def test_rows_that_see_one_kind_have_no_loss() -> None:
    contexts = Contexts([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([])], positives=(0, 1, 0), asked=ASKED)
    assert contexts.mixed() == []
    assert focus.focus_loss(*tensors(), contexts, scale=1.0) is None


@torch.no_grad()
def test_it_is_the_share_that_crossbatch_reports(make_plain: ModelMaker, ids: Draw) -> None:
    """exp(-loss) of one query is the positive's share of the attention to the contexts."""
    model = make_plain()
    crossbatch = enable_crossbatch(model, MemoryConfig(mem_layers=(1,), local_context=WINDOW))
    rows = [torch.tensor([], dtype=torch.int64)] * 3 + [torch.arange(3)]
    crossbatch.contexts = Contexts(rows, positives=(0, 0, 0, 1), asked=torch.zeros(4, 1, dtype=torch.int64))
    taken: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.crossbatch.focus_loss", lambda *args, **options: taken.append((args, options)))
        model(ids(WINDOW, rows=4), use_cache=False)
    (queries, keys, contexts), options = taken[0]
    one = queries[:, :1, :1]  # one query of one head, and its keys
    loss = focus.focus_loss(one, keys[:, :1], contexts, **options)
    mass = context_mass(one.expand(-1, -1, keys.shape[2], -1), keys[:, :1], keys[:, :1], contexts, **options)[3]
    assert loss is not None
    assert (-loss).exp().item() == pytest.approx((mass[0] / mass.sum()).item(), rel=1e-4)


def test_positives_come_first_and_are_counted() -> None:
    batch = joint_batch(0)
    choice = choose_all(ContextSchedule(values=(D,)), rows_of(batch), D, "0")
    for row, (chosen, own) in enumerate(zip(choice.rows, choice.positives, strict=True)):
        same = [bool(batch.document[other] == batch.document[row]) for other in chosen]
        assert same == [True] * own + [False] * (len(chosen) - own)
    contexts = choice.of(range(LANES * WINDOWS), None)
    assert len(contexts.mixed()) == choice.mixed() > 0


def test_slices_of_rows_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()
    shapes = [(4, 4, 7, 8), *[(4, 2, 7, 8)] * 2, *[(5, 2, 7, 8)] * 2]
    contexts = seen(PADDING, copies=3.0)
    found = []
    for size in (groups.PICKED_BYTES, 1):
        monkeypatch.setattr(groups, "PICKED_BYTES", size)
        given = [torch.randn(shape, generator=generator.manual_seed(0)).requires_grad_() for shape in shapes]
        output = attend_batch(*given, contexts, scale=0.4)
        found.append([output, *torch.autograd.grad(output.square().sum(), given)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_queries_are_drawn_by_the_row_of_all_processes() -> None:
    lengths = [40, 512, 3, 0]
    whole = draw_queries(lengths, 0, "0/1/2")
    assert whole.shape == (4, focus.QUERIES)
    assert torch.equal(whole[1:2], draw_queries([512], 1, "0/1/2"))
    assert not torch.equal(whole[1:2], draw_queries([512], 1, "0/1/3"))
    assert len(set(whole[1].tolist())) == focus.QUERIES, "without repetition"
    for row, length in zip(whole, lengths, strict=True):
        assert 0 <= row.min() <= row.max() < max(1, length), "padding is not asked"


def test_contexts_follow_to_the_device_of_the_keys() -> None:
    """Those of held-out texts are made on the CPU, whatever the model is on."""
    contexts = seen(PADDING, copies=3.0)
    shapes = [(4, 4, 7, 8), *[(4, 2, 7, 8)] * 2, *[(5, 2, 7, 8)] * 2]
    given = [torch.empty(shape, device="meta") for shape in shapes]
    assert attend_batch(*given, contexts, scale=0.4).device.type == "meta"
    for group in contexts.mixed_groups(given[0].device):
        tensors = (group.rows, group.chosen, group.copies, group.hidden, group.positives)
        assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


MIXED = {"lanes": 4, "windows": 2, "contexts": {"values": [4]}, "learning_rate": 0.01, "eval_every": 0}


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def run(tmp_path: Path, name: str, *arguments: str, **changes: Any) -> list[dict[str, Any]]:
    recipe = write_recipe(tmp_path / f"{name}.yaml", **(MIXED | changes))
    assert train(recipe, tmp_path / name, *arguments) == 0
    return log_of(tmp_path / name)


def test_training_raises_the_positive_share(tmp_path: Path) -> None:
    """A weight too small to change anything measures what training without it does."""
    with_it = run(tmp_path, "with", focus=1.0, steps=30, save_every=30)
    without = run(tmp_path, "without", focus=1e-9, steps=30, save_every=30)
    first, last, other = with_it[0]["focus_loss"], with_it[-1]["focus_loss"], without[-1]["focus_loss"]
    assert first == without[0]["focus_loss"]
    assert first == pytest.approx(torch.tensor(4.0).log().item(), abs=0.2), "no preference among four"
    assert last < 0.8 * other
    assert "focus_loss" not in run(tmp_path, "none", steps=1)[0]


def test_without_focus_nothing_changes(tmp_path: Path) -> None:
    """Also what is evaluated, with a focus or without."""
    plain, zero, tiny = (
        run(tmp_path, name, steps=2, **changes)
        for name, changes in (("plain", {}), ("zero", {"focus": 0}), ("tiny", {"focus": 1e-12}))
    )
    for name in ("loss", "gradient_norm", "eval_answer_accuracy"):
        found = [[line.get(name) for line in lines] for lines in (plain, zero)]
        assert found[0] == found[1]
    assert [line["loss"] for line in tiny] == pytest.approx([line["loss"] for line in plain], rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}], ids=str)
def test_resumed_runs_have_the_same_losses(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", focus=0.5, steps=4, save_every=2, **settings)
    run(tmp_path, "parts", focus=0.5, steps=2, save_every=2, **settings)
    parts = run(tmp_path, "parts", "--resume", focus=0.5, steps=4, save_every=2, **settings)
    for name in ("loss", "focus_loss", "gradient_norm"):
        assert [line[name] for line in parts] == [line[name] for line in whole]


def test_the_gradient_is_that_of_both_means() -> None:
    """Of two batches, the focus over all their rows and layers; recomputed layers, too."""
    wanted = None
    for recomputed in (False, True):
        loss, gradients = one_step(Accelerator(cpu=True), focus=2.0, recomputed=recomputed)
        wanted = wanted or (loss, gradients)
        assert loss == pytest.approx(wanted[0], abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[1][name], atol=1e-6, rtol=1e-4)
    model, config = tiny_model()
    crossbatch = enable_crossbatch(model, config)
    total, weight, focused, rows = torch.zeros(()), 0.0, torch.zeros(()), 0
    for number in range(2):
        batch = joint_batch(number)
        contexts = choose_contexts(
            ContextSchedule(values=(D,)), rows_of(batch), range(len(batch.lane)), D, f"0/0/{number}"
        )
        lengths = (~batch.padding).sum(1).tolist()
        crossbatch.contexts = replace(contexts, asked=draw_queries(lengths, 0, f"0/0/{number}"))
        with crossbatch.collecting() as found:
            logits = model(batch.input_ids, use_cache=False).logits
        losses = functional.cross_entropy(logits.mT, batch.labels, ignore_index=-100, reduction="none")
        total, weight = total + (losses * batch.weights).sum(), weight + float(batch.weights.sum())
        focused, rows = focused + torch.stack(found).mean(), rows + len(contexts.mixed())
    assert rows > 0
    mean = total / weight + 2.0 * focused / rows
    names = [name for name, _ in model.named_parameters()]
    for name, gradient in zip(names, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(wanted[1][name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": 1}, "focus is 0.1, but with windows 1 and contexts {'values': (4,)} no window sees both"),
        ({"contexts": {"values": [1]}}, "no window sees both earlier windows of its document and windows of others"),
        ({"contexts": {"segments": [[0, 3], [1, 0]]}}, "no window sees both"),
        ({"contexts": {"values": [4], "previous_windows": 0}}, "no window sees both"),
        ({"focus": -1}, "focus"),
        ({"method": "memorizing", "contexts": {}, "memory": SMALL["memory"] | {"top_k": 4}},
         "method is 'memorizing', which shows no windows of other documents: omit focus"),
    ],
    ids=str,
)  # fmt: skip
def test_a_focus_on_nothing_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **(MIXED | {"focus": 0.1} | changes))
    assert train(recipe, tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_what_mixes_is_accepted() -> None:
    assert ContextSchedule(values=(2,)).mixes(2)
    assert ContextSchedule(kind="ramp", values=(0, 3), at=(5,), previous_windows=2).mixes(4)
    assert ContextSchedule(segments=((0, 0), (1, 2))).mixes(2)
    assert load_recipe("smollm2-135m", ["focus=0.1"]).focus == 0.1
