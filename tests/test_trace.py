"""What is recorded of attention to memory, against a softmax written out in full."""

import contextvars
import json
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import WINDOW, ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.attention import attend_local, attend_memory
from fot.inspection.result import Found
from fot.trace import Recorder, Trace, record, trace
from memory import Memory

Draw = Callable[..., torch.Tensor]
Setting = tuple[Any, Memory]

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
TEXTS = {"one": "The vicar of Highbury is Mr Elton.\n" * 3, "two": "Tea is served at five in the garden.\n" * 4}


@pytest.fixture(scope="module")
def setting(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> Setting:
    """A model and a memory of two documents."""
    model = make_model()
    model.tokenizer = tokenizer
    memory = model.new_memory()
    for name, text in TEXTS.items():
        model.ingest(text, memory, name)
    return model, memory


@pytest.fixture(scope="module")
def traced(setting: Setting) -> Trace:
    return trace(setting[0], "Who is it?", setting[1], max_new_tokens=12, top=8, eos_token_id=None)


def queries_of(
    model: Any, prompt: torch.Tensor, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of one forward: the queries (H, T, D) and the local log-sum-exp (H, T) of each memory layer."""
    caught, local_lses = {}, []

    def local(*args: Any, **options: Any) -> Any:
        output, lse = attend_local(*args, **options)
        local_lses.append(lse[0])
        return output, lse

    def memories(queries: torch.Tensor, row: Any, layer: int, **options: Any) -> Any:
        caught[layer] = queries[0], local_lses[-1]
        return attend_memory(queries, row, layer, **options)

    monkeypatch.setattr("fot.attention.attend_local", local)
    monkeypatch.setattr("fot.attention.attend_memory", memories)
    with torch.no_grad():
        model(prompt, memory=memory)
    return caught


def test_changes_no_output(family: str, make_model: ModelMaker, ids: Draw) -> None:
    more = WINDOW  # so that a short prompt outgrows the window, too
    for length in (5, 3 * WINDOW + 2) if family == "llama" else (3 * WINDOW + 2,):
        model, prompt = make_model(family, layers=3, mem_layers=(0, 2)), ids(length)
        memory = model.new_memory()
        model.ingest(ids(100, seed=1), memory)
        options = GREEDY | {"max_new_tokens": more, "return_dict_in_generate": True, "output_logits": True}
        plain = model.generate(prompt, memory=memory, **options)
        with record(model, prompt=True, every_slot=True) as recorder:
            output = model.generate(prompt, memory=memory, **options)
        assert output.sequences.tolist() == plain.sequences.tolist()
        assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))
        assert model.recorder is None
        found = recorder.trace(output.sequences, length)
        assert [token.id for token in found.tokens if token.is_generated] == plain.sequences[0, length:].tolist()
        # every token but the last was read; of the prompt, those of the local window
        local = model.memory_config.local_length(length)
        assert found.found.positions.tolist() == list(range(length - local, length + more - 1))
        assert found.found.chose.sum() == more


def test_scores_are_those_of_one_softmax(setting: Setting, traced: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = setting
    prompt = torch.tensor([[token.id for token in traced.tokens if not token.is_generated]])
    caught = queries_of(model, prompt, memory, monkeypatch)
    scale, found = 8**-0.5, traced.found
    for number, layer in enumerate((1, 3)):
        queries, local_lse = caught[layer]
        logits = scale * queries @ memory[layer].keys().repeat_interleave(2, dim=0).mT  # (H, T, N)
        shares, best = logits.softmax(-1), logits.topk(8, dim=-1).values
        local = (local_lse - torch.logaddexp(local_lse, logits.logsumexp(-1))).exp()
        for place in range(prompt.shape[1]):
            for head in range(4):
                at, here = (place, number, head), (head, place)
                expected = shares[here][found.slot[at]]  # equal tokens may have changed places
                assert found.score[at] == pytest.approx(best[here].numpy(), abs=1e-4)
                assert found.local[at] == pytest.approx(float(local[here]), abs=1e-5)
                assert found.knn_score[at] == pytest.approx(expected.numpy(), abs=1e-5)
                assert found.share[at] == pytest.approx((expected * (1 - local[here])).numpy(), abs=1e-5)
                for slot, focus in zip(found.slot[at], found.focus_score[at], strict=True):
                    near = logits[here][max(0, slot - 32) : slot + 33].softmax(-1)[min(slot, 32)]
                    assert focus == pytest.approx(float(near), abs=1e-5)


def test_mass_by_position_and_document_is_complete(setting: Setting, traced: Trace) -> None:
    memory = setting[1]
    assert traced.complete
    assert traced.coverage == pytest.approx(1.0, abs=1e-4)
    chose = traced.found.chose
    assert chose.sum() == 12
    strip = traced.strips[0]
    mass = (1 - traced.found.local[chose]).sum(axis=(0, 2))  # (L,)
    own = traced.strips[1].bins.sum(1)
    assert strip.bins.sum(1) + own == pytest.approx(mass, rel=1e-4)
    assert strip.bins[:, len(memory) // strip.width + 1 :].sum() == 0
    shares = traced.documents()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) >= set(TEXTS)
    bins = strip.bins[:, : memory.documents()["one"]].sum()  # one slot a bin
    assert strip.width == 1
    assert strip.documents["one"].sum() == pytest.approx(bins)


def test_records_for_pandas(traced: Trace, tmp_path: Path) -> None:
    frame = pandas.DataFrame(traced.to_records())
    assert len(frame) == 21 * 2 * 4 * 8
    assert set(frame["layer"]) == {1, 3}
    assert set(frame["head"]) == {0, 1, 2, 3}
    assert set(frame["document"]) >= set(TEXTS)
    assert frame.equals(pandas.DataFrame(traced.to_columns()))
    hits = frame[frame.document.isin(TEXTS)]
    for hit in hits.sample(50, random_state=0).itertuples():
        assert TEXTS[hit.document][int(hit.start) : int(hit.end)] == hit.text
    traced.to_json(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    assert pandas.DataFrame(content["hits"]).equals(pandas.DataFrame(traced.to_columns()))
    assert content["text"] == traced.text
    assert sum(sum(layer) for layer in content["positions"][0]["mass"]) > 0


def test_passages_merge_neighbours(setting: Setting, traced: Trace) -> None:
    passages = traced.passages(100)
    assert sum(passage.share for passage in passages) <= 1 + 1e-6
    assert any(passage.stop - passage.start > 1 for passage in passages)
    ranges = sorted((p.start, p.stop) for p in passages if p.document in TEXTS)
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    for passage in passages:
        if passage.document in TEXTS:
            assert passage.span is not None
            inside = TEXTS[passage.document][slice(*passage.span)]
            assert " ".join(inside.split()) == passage.text[slice(*passage.marked)].strip()
            assert len(passage.text) > len(inside.strip()) or passage.start == 0
    assert passages[:3] == traced.passages(3)


def test_what_gets_attention_at_every_token_counts_for_less(traced: Trace) -> None:
    """An attention sink has most of the mass, and comes behind what one token looked for."""
    share = np.array([[0.3, 0.1], [0.3, 0.3], [0.3, 0.1]], dtype=np.float32)[:, None, None]  # (3, 1, 1, 2)
    slot = np.array([[0, 150], [0, 60], [0, 100]])[:, None, None]
    zeros = np.zeros_like(share)
    found = Found(
        np.arange(3), np.ones(3, bool), np.zeros((3, 1, 1), np.float32), np.zeros_like(slot), slot, zeros, zeros, share,
        zeros,
    )  # fmt: skip
    passages = replace(traced, found=found, layers=(1,)).passages(4)
    assert [passage.start for passage in passages] == [60, 0, 100, 150]
    beyond = np.array([0.1 * np.log(4), 0.3 * np.log(4 / 3), 0.1 / 3 * np.log(4), 0.1 / 3 * np.log(4)])
    assert [passage.share for passage in passages] == pytest.approx((beyond / beyond.sum()).tolist())
    one = replace(found, **{field.name: getattr(found, field.name)[1:2] for field in fields(Found)})
    assert [passage.start for passage in replace(traced, found=one, layers=(1,)).passages(2)] == [0, 60]


def test_a_key_that_stands_out_is_the_first_passage(setting: Setting) -> None:
    """Keys far longer than the others, along every axis, so that one of them meets whatever asks."""
    model, memory = setting
    loud = memory.clone()
    axes = 100.0 * torch.cat([torch.eye(8), -torch.eye(8)]).expand(2, -1, -1)
    loud.append({1: axes, 3: axes}, {1: axes, 3: axes}, list(range(5, 21)), document="loud")
    found = trace(model, "Who is it?", loud, max_new_tokens=4, top=8, eos_token_id=None)
    assert found.passages(1)[0].document == "loud"
    assert next(iter(found.documents())) == "loud"


def test_prompt_longer_than_the_window(setting: Setting) -> None:
    model, memory = setting
    with_both = trace(model, "word " * 30, memory, max_new_tokens=3 * WINDOW, top=4, eos_token_id=None)
    assert with_both.own == 1
    assert set(with_both.found.memory.flatten().tolist()) == {0, 1}
    assert "(prompt)" in with_both.documents()
    # the prompt's memory grew while the answer was written: nothing is found before it was there
    own = with_both.found.memory == 1
    slots = (with_both.found.slot * own).max(axis=(1, 2, 3))
    assert (slots < with_both.found.positions).all()
    assert len(with_both.memories[1]) > 150
    alone = trace(model, "word " * 30, max_new_tokens=4, top=4)
    assert list(alone.documents()) == ["(prompt)"]
    assert {passage.document for passage in alone.passages()} == {"(prompt)"}
    assert alone.coverage == pytest.approx(1.0, abs=1e-4)


def test_no_memory_at_all(setting: Setting) -> None:
    found = trace(setting[0], "Hi", max_new_tokens=3)
    assert found.memory_share == pytest.approx(0.0, abs=1e-6)
    assert found.to_records() == []
    assert found.passages() == []
    assert found.documents() == {}


@pytest.mark.parametrize("settings", [{"index": "HNSW8"}, {"index": "exact", "top_k": 6}])
def test_retrieved_hits_are_what_was_attended_to(
    settings: dict[str, Any], make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(**settings)
    model.tokenizer = tokenizer
    memory = model.new_memory()
    for name, text in TEXTS.items():
        model.ingest(text, memory, name)
    found = trace(model, "Who is it?", memory, max_new_tokens=3, top=8, eos_token_id=None)
    assert not found.complete
    assert found.coverage == pytest.approx(1.0, abs=1e-3)  # what was retrieved is what was attended to
    if "top_k" in settings:
        assert (found.found.slot >= 0).sum(-1).max() == 6
        assert found.found.knn_score.sum(-1) == pytest.approx(1.0, abs=1e-4)


def test_streaming_needs_no_more_than_the_recorder(setting: Setting, traced: Trace) -> None:
    """``record`` by default keeps the tokens that chose, which is enough for passages."""
    model, memory = setting
    prompt = torch.tensor([[token.id for token in traced.tokens if not token.is_generated]])
    with record(model, top=8) as recorder:
        model.generate(prompt, memory=memory, **GREEDY)
    assert [p.start for p in recorder.passages(5)] == [p.start for p in traced.passages(5)]
    assert recorder.passages(1)[0].share == pytest.approx(traced.passages(1)[0].share, rel=1e-4)


def test_a_cache_that_goes_on(setting: Setting, ids: Draw) -> None:
    """A second turn with the same cache is recorded alone."""
    model, memory = setting
    first = model.generate(ids(6), memory=memory, return_dict_in_generate=True, **GREEDY)
    prompt = torch.cat([first.sequences, ids(5, seed=3)], dim=1)
    with record(model) as recorder:
        output = model.generate(prompt, past_key_values=first.past_key_values, **GREEDY)
    found = recorder.trace(output, prompt.shape[1])
    assert found.found.positions.tolist() == list(range(prompt.shape[1] - 1, output.shape[1] - 1))


def test_bad_input(setting: Setting, make_model: ModelMaker, ids: Draw) -> None:
    model, memory = setting
    with pytest.raises(ValueError, match=r"top is 0; it must be 1\.\.128"):
        trace(model, "Hi", memory, top=0)
    with pytest.raises(ValueError, match="runs 2 sequences at once"):
        trace(model, "Hi", memory, num_beams=2)
    assert model.recorder is None
    with pytest.raises(ValueError, match=r"needs model\.tokenizer"):
        trace(make_model(), "Hi")
    with record(model) as recorder, pytest.raises(ValueError, match="nothing was recorded"):
        recorder.passages(1)
    # numbers without a tokenizer
    bare = make_model()
    assert trace(bare, ids(4), max_new_tokens=2, eos_token_id=None).tokens[0].text.startswith("‹")


def test_a_recording_belongs_to_its_thread(setting: Setting, ids: Draw) -> None:
    """What another thread generates is not in it, unless that runs in a copy of this one's context."""
    model, memory = setting
    prompt, other = ids(6), ids(9, seed=4)

    def positions(recorder: Recorder, output: Any, length: int) -> list[int]:
        return recorder.trace(output, length).found.positions.tolist()

    def in_thread(*work: Any) -> None:
        thread = threading.Thread(target=work[0], args=work[1:])
        thread.start()
        thread.join()

    outputs: dict[str, Any] = {}

    def generate(name: str, prompt: torch.Tensor) -> None:
        outputs[name] = model.generate(prompt, memory=memory, **GREEDY)

    def generate_and_record() -> None:
        assert model.recorder is None
        with record(model) as recorder:
            generate("recorded", other)
        outputs["positions"] = positions(recorder, outputs["recorded"], 9)

    with record(model) as mine:
        generate("mine", prompt)
        in_thread(generate, "ignored", other)
        in_thread(generate_and_record)
        with record(model) as inner:
            generate("inner", other)
        assert model.recorder is mine
    assert positions(mine, outputs["mine"], 6) == list(range(5, 17))
    assert positions(inner, outputs["inner"], 9) == outputs["positions"] == list(range(8, 20))
    with record(model) as mine:
        in_thread(contextvars.copy_context().run, generate, "copied", other)
    assert positions(mine, outputs["copied"], 9) == list(range(8, 20))
    assert model.recorder is None
