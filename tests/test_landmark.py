"""Landmark attention: the grouped softmax against the paper's formula written out, training and reading alike."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ModelMaker
from torch import Tensor
from train_helpers import losses, train
from transformers import AutoModelForCausalLM

import fot
from fot.compare.landmark import (
    BLOCK,
    GIVEN,
    SPAN,
    TOP_K,
    LandmarkReader,
    block_attention,
    grouped_weights,
    reading_blocks,
    with_landmarks,
)
from fot.compare.methods import Setting, opened
from fot.compare.tuned import find_tuned
from fot.rotary import Rotary
from training.batches import IGNORED, batch_of
from training.methods.landmark import NAME, add_landmark, insert_landmarks
from training.pieces import task_span


def by_the_paper(scores: Tensor, query: int) -> list[float]:
    """Attention weights of one query: groups G, their softmax, and products with landmarks' weights (section 3.1)."""

    def landmark(place: int) -> int:
        return place // SPAN * SPAN + BLOCK

    def group(key: int) -> int:
        if key == landmark(query):
            return -1
        return landmark(query) if key == landmark(key) else landmark(key)

    soft = [
        math.exp(scores[key]) / sum(math.exp(scores[k]) for k in range(query + 1) if group(k) == group(key))
        for key in range(query + 1)
    ]
    found = []
    for key in range(query + 1):
        if key == landmark(key):
            found.append(0.0)
        elif landmark(key) == landmark(query):
            found.append(soft[key])
        else:
            found.append(soft[key] * soft[landmark(key)])
    return found + [0.0] * (len(scores) - query - 1)


@pytest.mark.parametrize(("first", "length", "size"), [(0, 180, 180), (100, 53, 153), (152, 1, 153), (0, 20, 20)])
def test_grouped_softmax_is_the_papers(first: int, length: int, size: int) -> None:
    torch.manual_seed(0)
    scores = 2 * torch.randn(2, length, size)
    found = grouped_weights(scores, first)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, length))
    for row in {0, length // 2, length - 1, min(length - 1, 50), min(length - 1, 52)}:
        expected = by_the_paper(scores[1, row], first + row)
        torch.testing.assert_close(found[1, row], torch.tensor(expected))


def test_landmarks_stand_after_every_50_tokens() -> None:
    found, places = with_landmarks(list(range(100, 210)), 0, 7)
    assert [place for place, one in enumerate(found) if one == 7] == [50, 101]
    assert [one for one in found if one != 7] == list(range(100, 210))
    assert places[48:51] == [48, 50, 51], "after a whole block the landmark foretells the next token"
    whole = with_landmarks(list(range(110)), 0, -1)[0]
    pieces: list[int] = []
    for start in range(0, 110, 13):
        pieces += with_landmarks(list(range(start, min(110, start + 13))), len(pieces), -1)[0]
    assert pieces == whole


def test_labels_of_a_batch_with_landmarks(make_plain: ModelMaker) -> None:
    model = make_plain()
    before = model.config.vocab_size
    add_landmark(model, fot.MemoryConfig())
    assert model.get_input_embeddings().weight.shape[0] == before + 1
    ids = list(range(3, 3 + 121))
    batch = batch_of([task_span(0, (ids, [1.0] * len(ids), []))], 1, 120, 0)
    found = insert_landmarks(batch, model)
    assert found.input_ids.shape == (1, 122)
    assert found.input_ids[0, [50, 101]].tolist() == [before, before]
    assert found.labels[0, [49, 50, 100, 101]].tolist() == [IGNORED, ids[50], IGNORED, ids[100]]
    counted = found.labels[found.weights > 0].tolist()
    assert counted == batch.labels[batch.weights > 0].tolist(), "each token gives loss once"
    assert found.padding.shape == found.answers.shape == (1, 122)


def landmark_model(make_plain: ModelMaker) -> Any:
    model = make_plain("qwen3")
    model.config.max_position_embeddings = 1024
    add_landmark(model, fot.MemoryConfig())
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return model


@torch.no_grad()
def test_a_short_text_is_read_as_in_training(make_plain: ModelMaker, ids: Any) -> None:
    """As long as no block is left out, whatever pieces it is read in; what is foretold after a block is so there."""
    model, text = landmark_model(make_plain), ids(TOP_K * BLOCK + 30)[0].tolist()
    given, places = with_landmarks(text, 0, model.config.vocab_size - 1)
    model.set_attn_implementation(NAME)
    expected = model(torch.tensor([given]), use_cache=False).logits[0, places, :-1]
    model.set_attn_implementation("sdpa")
    plain = model(torch.tensor([given]), use_cache=False).logits[0, places, :-1]
    assert not torch.allclose(plain, expected, atol=1e-2)
    with reading_blocks(model):
        reader = LandmarkReader(model)
        whole = reader.feed(reader.read([], lambda tokens: None), text, len(text))
        state, parts = reader.read(text[:40], lambda tokens: None), []
        for start in range(40, len(text), 37):
            piece = text[start : start + 37]
            parts.append(reader.feed(state, piece, len(piece)))
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(parts), expected[40:], atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_long_texts_are_read_by_the_best_blocks() -> None:
    """A query at a time: which blocks, at which distance, with which weights."""
    torch.manual_seed(1)
    size, asked = 9 * SPAN + 20, 70
    rotary = Rotary((torch.tensor([1.0, 0.1, 0.01]),))
    queries, keys, values = torch.randn(1, 4, asked, 6), torch.randn(1, 2, size, 6), torch.randn(1, 2, size, 6)
    module = torch.nn.Module()
    module.layer_idx = 0
    found, _ = block_attention(module, queries, keys, values, None, scaling=0.7, **{GIVEN: rotary})

    def turned(vector: Tensor, place: int) -> Tensor:
        return rotary.back(0, vector[None, None], torch.tensor([-place]))[0, 0]

    for row in (0, 30, 50, 69):
        place = size - asked + row
        block, head = place // SPAN, 3
        near = block - TOP_K
        query = turned(queries[0, head, row], place - near * SPAN + SPAN)
        scores = torch.full((size,), -torch.inf)
        for key in range(place + 1):
            number, offset = divmod(key, SPAN)
            scores[key] = 0.7 * query @ turned(keys[0, 1, key], offset + SPAN * max(0, number - near + 1))
        marks = scores[BLOCK::SPAN][:block]
        for number in set(range(block)) - set(marks.topk(TOP_K).indices.tolist()):
            scores[number * SPAN : (number + 1) * SPAN] = -1e4  # a weight of 0
        weights = grouped_weights(scores[None, : place + 1], place)[0]
        torch.testing.assert_close(found[0, row, head], weights @ values[0, 1, : place + 1], atol=1e-4, rtol=1e-4)


def test_a_run_is_resumed_and_read_by_blocks(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} bottles hang on the wall of room {number * 7 % 91}.\n" for number in range(40)))
    recipe, out, parts = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "parts"
    settings = {"method": "landmark", "model": str(checkpoint), "length": 60, "windows": 1, "lanes": 2, "steps": 4,
                "trainable": "lora", "lora": {"r": 4}, "sources": [{"path": str(text)}], "learning_rate": 0.01,
                "held_out": [{"path": str(text)}], "eval_batches": 1, "save_every": 2, "dtype": "float32"}  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    assert train(recipe, out) == 0
    assert train(recipe, parts, "steps=2") == 0
    assert train(recipe, parts, "steps=4", "--resume") == 0
    assert losses(parts) == losses(out)
    assert losses(out)[-1][1] < losses(out)[0][1]
    model: Any = AutoModelForCausalLM.from_pretrained(out / "model")
    base: Any = fot.FoTForCausalLM.from_pretrained(checkpoint, dtype="float32")
    assert model.config.vocab_size == base.config.vocab_size + 1
    tuned = find_tuned([f"marks={out / 'model'}"])
    with torch.no_grad(), opened("marks", base, Setting(600, tuned=tuned)) as reader:
        assert isinstance(reader, LandmarkReader)
        state = reader.read(list(range(3, 203)) * 3, lambda tokens: None)
        logits = reader.feed(reader.fork(state), [9, 8, 7], 2)
        assert logits.shape == (2, base.config.vocab_size)
        again = reader.feed(state, [9, 8, 7], 2)
    assert logits.isfinite().all()
    torch.testing.assert_close(again, logits)
