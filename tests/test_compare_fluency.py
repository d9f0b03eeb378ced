"""Measures of fluency, on texts whose shares can be counted."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import ModelMaker

from fot.compare.fluency import losses_in_windows, measures, newline_runs, repeated_ngrams, stretches, unlikely_tokens


def test_repeated_ngrams() -> None:
    assert repeated_ngrams(range(50)) == 0
    assert repeated_ngrams([1, 2, 3]) == 0
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4: one of five stands earlier
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_ngrams([7] * 103) == pytest.approx(0.99)


def test_newline_runs() -> None:
    assert newline_runs("") == 0
    assert newline_runs("one\n\ntwo\nthree") == 0
    assert newline_runs("ab\n\n\ncd") == pytest.approx(3 / 7)
    assert newline_runs("ab\n \n \n\n") == pytest.approx(4 / 8)
    assert newline_runs("\n" * 10) == 1


def test_unlikely_tokens() -> None:
    losses = torch.tensor([0.1, -math.log(2e-4), -math.log(0.5e-4), 20.0])
    assert unlikely_tokens(losses) == 0.5
    assert unlikely_tokens(torch.zeros(0)) == 0


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 24, 30, 41])
def test_every_token_is_judged_once(count: int, make_plain: ModelMaker, ids: Callable[..., torch.Tensor]) -> None:
    model, text = make_plain(), ids(count)[0].tolist()
    losses = losses_in_windows(model, text, window=16, step=8)
    model.requires_grad_(False)
    assert len(losses) == count - 1
    if count <= 16 and count > 1:
        whole = model(torch.tensor([text]), labels=torch.tensor([text])).loss
        assert float(losses.mean()) == pytest.approx(float(whole), rel=1e-4)
    if count == 41:  # windows end at 16, 24, 32 and 40: the last one is tokens 32..40
        logits = model(torch.tensor([text[32:40]])).logits[0, -1:]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text[40:]))
        assert float(losses[-1]) == pytest.approx(float(expected), rel=1e-4)


def test_measures() -> None:
    found = measures([1] * 10, "\n\n\n\n", torch.tensor([30.0]))
    assert found == {"repeated_ngrams": pytest.approx(6 / 7), "newline_runs": 1, "unlikely_tokens": 1}


def test_stretches_count_each_token_once() -> None:
    """Half a text of different tokens, then one token for ever, which the model did not expect."""
    ids = [*range(3000), *[7] * 3000]
    losses = torch.tensor([0.0] * 2999 + [30.0] * 3000)
    found = stretches(ids, losses, lambda part: "".join("\n" if token == 7 else "a" for token in part))
    assert [stretch["end"] for stretch in found] == [2000, 4000, 6000]
    assert [stretch["repeated_ngrams"] for stretch in found] == pytest.approx([0, 996 / 1997, 1996 / 1997])
    assert [stretch["unlikely_tokens"] for stretch in found] == pytest.approx([0, 0.5, 1])
    assert [stretch["newline_runs"] for stretch in found] == pytest.approx([0, 0.5, 1])
    (short,) = stretches(ids[:10], losses[:9], lambda part: "a")
    assert short == {"end": 10, **measures(ids[:10], "a", losses[:9])}
