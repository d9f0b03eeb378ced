"""``output_attentions=True``: of one softmax over window and memory, the weights of the window."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker

import fot
from fot.local import LocalCache
from training.crossbatch import Contexts, enable_crossbatch

Draw = Callable[..., torch.Tensor]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
MEMORY_LAYERS = (1, 3)


def eager(make_model: ModelMaker, **settings: Any) -> Any:
    model = make_model(**settings)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_weights_are_those_of_one_softmax(
    rows: int, make_model: ModelMaker, ids: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two rows one is padded."""
    model, tokens = eager(make_model), ids(8, rows=rows)
    memory = model.new_memory()
    model.ingest(ids(40, seed=1), memory)
    seen: dict[int, Any] = {}
    plain = LocalCache.attend_and_weigh

    def noted(self: Any, layer: int, queries: torch.Tensor, keys: torch.Tensor, *rest: Any) -> Any:
        seen[layer] = queries, keys, rest[1]  # values, scale, learnt sinks
        return plain(self, layer, queries, keys, *rest)

    monkeypatch.setattr(LocalCache, "attend_and_weigh", noted)
    mask = torch.ones_like(tokens)
    mask[1:, :3] = 0
    output = model(tokens, attention_mask=mask, memory=memory, output_attentions=True)
    torch.testing.assert_close(output.logits, model(tokens, attention_mask=mask, memory=memory).logits, **CLOSE)
    assert [weights.shape for weights in output.attentions] == [(rows, 4, 8, 8)] * 4
    for layer in MEMORY_LAYERS:
        queries, keys, scale = seen[layer]
        stored = memory[layer].keys().expand(rows, -1, -1, -1)
        together = torch.cat([stored, keys], dim=2).repeat_interleave(2, dim=1)
        sees = torch.ones(8, 8, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        sees = torch.cat([torch.ones(rows, 1, 8, 40, dtype=torch.bool), sees], dim=3)
        scores = (queries @ together.mT * scale).masked_fill(~sees, -torch.inf)
        real = mask.bool()[:, None, :, None]
        expected = scores.softmax(-1)[..., 40:] * real
        torch.testing.assert_close(output.attentions[layer] * real, expected, **CLOSE)
        assert (output.attentions[layer].sum(-1) < 0.999).any()


def test_generated_tokens_have_weights_of_every_layer(make_model: ModelMaker, ids: Draw) -> None:
    """Past the window: sinks are local for plain layers alone, so memory layers give them no weight here."""
    model = eager(make_model)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": WINDOW, "return_dict_in_generate": True}
    output = model.generate(ids(10), output_attentions=True, **options)
    assert output.sequences.tolist() == make_model().generate(ids(10), **options).sequences.tolist()
    for step in output.attentions:
        assert len({weights.shape for weights in step}) == 1
        assert len(step) == 4
    last = output.attentions[-1]
    assert (last[1][..., :4] == 0).all()
    assert (last[0][..., :4] > 0).any()


@torch.no_grad()
def test_what_has_no_weights_is_refused(make_model: ModelMaker, make_plain: ModelMaker, ids: Draw) -> None:
    model = eager(make_model)
    with pytest.raises(ValueError, match="output_attentions is kept within one window of 16 tokens"):
        model(ids(40), output_attentions=True)
    plain = make_plain()
    plain.set_attn_implementation("eager")
    plain.config.output_attentions = True
    asked = fot.attach_memory(plain, model.memory_config)
    with pytest.raises(ValueError, match="output_attentions is kept within one window of 16 tokens"):
        asked(ids(40))
    assert len(asked(ids(10)).attentions) == 4
    crossbatch = enable_crossbatch(model, model.memory_config)
    crossbatch.contexts = Contexts([torch.tensor([], dtype=torch.int64), torch.tensor([0])])
    with pytest.raises(ValueError, match="output_attentions is not known while crossbatch trains"):
        model.base_model(ids(8, rows=2), use_cache=False, output_attentions=True)
