"""Reading tokens and text into a memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker
from transformers import PreTrainedTokenizerFast

from fot import ingest as ingest_module

Draw = Callable[..., torch.Tensor]

TEXT = (
    "It is a truth universally acknowledged,\nthat a single man — in possession of a good fortune —\nmust be in want.\n"
)


def test_any_iterable_stores_the_same(make_model: ModelMaker, ids: Draw) -> None:
    model, tokens = make_model(), ids(5 * WINDOW + 3)
    stored = []
    for form in (tokens, tokens[0], tokens[0].tolist(), tuple(tokens[0].tolist()), (int(i) for i in tokens[0])):
        memory = model.new_memory()
        assert model.ingest(form, memory) == len(memory) == 5 * WINDOW + 3
        stored.append(memory)
    for memory in stored[1:]:
        assert memory.token_ids().tolist() == tokens[0].tolist()
        for layer in memory.layers:
            assert torch.equal(memory[layer].keys(), stored[0][layer].keys())
            assert torch.equal(memory[layer].values(), stored[0][layer].values())


def test_nothing_above_the_last_memory_layer_runs(make_model: ModelMaker, ids: Draw) -> None:
    model, calls = make_model(mem_layers=(1, 3), layers=5), []
    watched = {
        "layer 3 mlp": model.model.layers[3].mlp,
        "layer 3 output": model.model.layers[3].self_attn.o_proj,
        "layer 4": model.model.layers[4],
        "head": model.lm_head,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *args, name=name: calls.append(name))
    model.ingest(ids(40), model.new_memory())
    assert calls == []


def test_text_has_spans(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    model, memory = make_model(), None
    memory = model.new_memory()
    model.ingest(TEXT, memory, "Austen", tokenizer=tokenizer)
    assert tokenizer.decode(memory.token_ids()) == TEXT
    assert memory.documents() == {"Austen": len(memory)}
    for slot in range(0, len(memory), 7):
        source = memory.source(slot)
        assert source.document == "Austen"
        assert source.span is not None
        first, last = source.span
        assert tokenizer.decode([int(memory.token_ids()[slot])]) in (TEXT[first:last], "�")


def test_file_streams_in_pieces(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes((TEXT * 20).replace("\n", "\r\n").encode())
    model = make_model()
    whole, pieces = model.new_memory(), model.new_memory()
    model.ingest(path, whole, tokenizer=tokenizer)
    monkeypatch.setattr(ingest_module, "PIECE", 50)
    model.ingest(path, pieces, tokenizer=tokenizer)
    assert len(whole) > 2000
    assert whole.token_ids().tolist() == pieces.token_ids().tolist()
    assert [whole.source(i) for i in range(len(whole))] == [pieces.source(i) for i in range(len(pieces))]
    assert list(whole.documents()) == [str(path)]


def test_one_endless_line(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_module, "PIECE", 50)
    monkeypatch.setattr(ingest_module, "LONGEST_PIECE", 100)
    text = "word " * 100
    memory = make_model().new_memory()
    make_model().ingest(text, memory, tokenizer=tokenizer)
    assert tokenizer.decode(memory.token_ids()) == text


def test_bad_utf8_is_refused_before_anything_is_stored(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"x" * 5000 + "café".encode("latin-1") + b" and more")
    model = make_model()
    memory = model.new_memory()
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text \(byte 5003\)"):
        model.ingest(path, memory, tokenizer=tokenizer)
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no tokens"),
        ("", "no tokens"),
        ([5, 300], "token id 300 is outside the vocabulary"),
        (torch.ones(2, 3, dtype=torch.int64), r"have shape \(2, 3\); one memory takes one row"),
    ],
)
def test_bad_input(bad: Any, message: str, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    memory = model.new_memory()
    with pytest.raises(ValueError, match=message):
        model.ingest(bad, memory, tokenizer=tokenizer)
    assert len(memory) == 0


def test_late_bad_id_is_refused_before_anything_is_stored(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model()
    memory = model.new_memory()
    with pytest.raises(ValueError, match="token id 999"):
        model.ingest([*ids(100)[0].tolist(), 999], memory)
    assert len(memory) == 0


def test_text_without_a_tokenizer(make_model: ModelMaker) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        model.ingest("text", model.new_memory())


def test_interrupted_keeps_whole_windows(make_model: ModelMaker, ids: Draw) -> None:
    tokens = ids(100)[0].tolist()

    def broken() -> Any:
        yield from tokens[:60]
        raise KeyboardInterrupt

    model = make_model()
    memory = model.new_memory()
    with pytest.raises(KeyboardInterrupt):
        model.ingest(broken(), memory)
    assert len(memory) == 3 * WINDOW
    model.ingest(tokens[3 * WINDOW :], memory)
    straight = model.new_memory()
    model.ingest(tokens, straight)
    for layer in memory.layers:
        assert torch.equal(memory[layer].keys(), straight[layer].keys())


def test_nan_keys_store_nothing(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(seed=9)
    memory = model.new_memory()
    model.ingest(ids(WINDOW), memory)
    model.model.layers[3].self_attn.k_proj.register_forward_hook(lambda m, a, output: output * float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite, so nothing was stored"):
        model.ingest(ids(WINDOW), memory)
    assert len(memory) == WINDOW
    assert all(len(memory[layer]) == WINDOW for layer in memory.layers)


def test_progress_bar_names_source_and_rate(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture
) -> None:
    model = make_model()
    model.ingest(TEXT, model.new_memory(), "Austen", tokenizer=tokenizer, progress=True)
    shown = capfd.readouterr().err
    assert "Austen" in shown
    assert "tok/s" in shown
    model.ingest(TEXT, model.new_memory(), tokenizer=tokenizer, progress=False)
    assert capfd.readouterr().err == ""


def test_isolated_windows_do_not_depend_on_what_was_stored_before(make_model: ModelMaker) -> None:
    model = make_model(isolated_windows=True)
    first, second = torch.arange(3, 3 + 3 * WINDOW + 5), torch.arange(80, 80 + 2 * WINDOW)
    both, other_order = model.new_memory(), model.new_memory()
    for ids, name in ((first, "a"), (second, "b")):
        model.ingest(ids, both, source=name)
    for ids, name in ((second, "b"), (first, "a")):
        model.ingest(ids, other_order, source=name)
    for layer in both.layers:
        keys, swapped = both[layer].keys(), other_order[layer].keys()
        torch.testing.assert_close(keys[:, : len(first)], swapped[:, len(second) :], atol=1e-6, rtol=1e-5)
    both.drop_document("a")
    alone = model.new_memory()
    model.ingest(second, alone, source="b")
    assert len(both) == len(alone)
    for layer in alone.layers:
        torch.testing.assert_close(both[layer].keys(), alone[layer].keys(), atol=1e-6, rtol=1e-5)


def test_isolated_windows_are_stored_as_if_each_were_ingested_into_nothing(make_model: ModelMaker) -> None:
    model = make_model(isolated_windows=True)
    ids = torch.randint(3, 300, (5 * WINDOW + 7,), generator=torch.Generator().manual_seed(0))
    memory = model.new_memory()
    model.ingest(ids, memory)
    reading = make_model(isolated_windows=False)
    for start in range(0, len(ids), WINDOW):
        one = reading.new_memory()
        reading.ingest(ids[start : start + WINDOW], one)
        for layer in memory.layers:
            mine = memory[layer].keys()[:, start : start + WINDOW]
            torch.testing.assert_close(mine, one[layer].keys(), atol=1e-5, rtol=1e-4)


def test_a_prompt_reads_the_memory_though_its_stored_windows_are_isolated(make_model: ModelMaker) -> None:
    model = make_model(isolated_windows=True)
    memory, ids = model.new_memory(), torch.arange(3, 3 + 3 * WINDOW).unsqueeze(0)
    model.ingest(torch.arange(100, 100 + 2 * WINDOW), memory)
    with_memory = model(ids, memory=memory).logits
    without = model(ids).logits
    assert (with_memory - without).abs().amax(-1).min() > 1e-4  # stored windows included: their logits read it


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("length", [WINDOW // 2, WINDOW, WINDOW + 1, 3 * WINDOW, 5 * WINDOW + 3])
def test_overlapping_windows_store_each_token_once(make_model: ModelMaker, isolated: bool, length: int) -> None:
    overlap = 5
    model = make_model(isolated_windows=isolated, window_overlap=overlap)
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(1))
    memory = model.new_memory()
    assert model.ingest(ids, memory) == length
    assert memory.token_ids().tolist() == ids.tolist()
    if isolated:  # each token's keys are those it has in its window, the overlap being local context alone
        plain = make_model(isolated_windows=True)
        for number, start in enumerate(range(0, length, WINDOW - overlap)):
            window = ids[start : start + WINDOW]
            one, skip = plain.new_memory(), overlap if number else 0
            plain.ingest(window, one)
            for layer in memory.layers:
                mine = memory[layer].keys()[:, start + skip : start + len(window)]
                torch.testing.assert_close(mine, one[layer].keys()[:, skip:], atol=1e-5, rtol=1e-4)


def test_overlap_gives_window_starts_their_context(make_model: ModelMaker) -> None:
    """Keys at a window's start depend on the tokens before it, as they do not without an overlap."""
    for overlap, depends in ((0, False), (6, True)):
        model = make_model(isolated_windows=True, window_overlap=overlap)
        ids = torch.arange(3, 3 + 2 * WINDOW)
        changed = ids.clone()
        stored = WINDOW  # the first token that the second window adds
        changed[stored - 1] = 250
        keys = []
        for tokens in (ids, changed):
            memory = model.new_memory()
            model.ingest(tokens, memory)
            keys.append(memory[3].keys()[:, stored])
        assert torch.equal(*keys) is not depends


@pytest.mark.parametrize("isolated", [True, False])
@torch.no_grad()
def test_a_prompt_is_stored_as_ingest_stores_it(isolated: bool, make_model: ModelMaker, ids: Draw) -> None:
    """What of a long prompt goes to the memory overlaps as windows of a text do, whether logits are wanted or not."""
    model, tokens = make_model(isolated_windows=isolated, window_overlap=5), ids(4 * WINDOW + 3)
    for options in ({"logits_to_keep": 1}, {}):
        own = model(tokens, **options).past_key_values.rows[0].own
        expected = model.new_memory()
        model.ingest(tokens[:, : len(own)], expected)
        assert len(own) == 4 * WINDOW + 3 - WINDOW // 2
        assert own.token_ids().tolist() == expected.token_ids().tolist()
        for layer in own.layers:
            torch.testing.assert_close(own[layer].keys(), expected[layer].keys())
            torch.testing.assert_close(own[layer].values(), expected[layer].values())


def test_overlap_must_leave_room(make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match="window_overlap is 16"):
        make_model(window_overlap=WINDOW)
    with pytest.raises(ValueError, match="window_overlap is -1"):
        make_model(window_overlap=-1)


@pytest.mark.parametrize(
    ("dtype", "length"), [("float32", 0), ("float32", 3), ("float32", 15), ("bfloat16", 0), ("int8", 3)]
)
def test_windows_that_come_again_are_copied(
    make_model: ModelMaker, ids: Draw, monkeypatch: pytest.MonkeyPatch, dtype: str, length: int
) -> None:
    """A text of a short period: each of its windows goes through the layers once, and the memory is the same."""
    model = make_model(isolated_windows=True, window_overlap=4, key_dtype=dtype, value_dtype=dtype)
    monkeypatch.setattr(ingest_module, "ISOLATED_TOKENS", WINDOW)  # rounding may differ in windows read together
    tokens = torch.cat([ids(7)] * 18 + [ids(5, seed=1)] + [ids(7)] * 18 + [ids(length, seed=2)], dim=1)
    spans = [(i, i + 2) for i in range(tokens.shape[1])]
    rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: rows.append(len(args[0])))

    def read() -> Any:
        memory, pieces = model.new_memory(), ingest_module.Piece(tokens[0].tolist(), spans, 1.0)
        rows.clear()
        ingest_module.ingest_pieces(model, iter([pieces]), memory, "text", False)
        return memory

    found, count = read(), sum(rows)
    with monkeypatch.context() as patched:
        patched.setattr(ingest_module, "_name", lambda window: object())
        wanted = read()
    starts = range(0, tokens.shape[1] - 4, WINDOW - 4)
    windows = [(start == 0, *tokens[0, start : start + WINDOW].tolist()) for start in starts]  # all of the first is new
    assert count == len(set(windows)) < sum(rows) == len(windows)
    assert found.token_ids().tolist() == wanted.token_ids().tolist() == tokens[0].tolist()
    assert [found.source(slot) for slot in range(len(found))] == [wanted.source(slot) for slot in range(len(wanted))]
    for layer in found.layers:
        assert torch.equal(found[layer].keys(), wanted[layer].keys())
        assert torch.equal(found[layer].values(), wanted[layer].values())


def test_windows_that_come_again_read_together_and_forgotten(
    make_model: ModelMaker, ids: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model(isolated_windows=True, window_overlap=4), torch.cat([ids(9)] * 60, dim=1)
    wanted = model.new_memory()
    with monkeypatch.context() as patched:
        patched.setattr(ingest_module, "_name", lambda window: object())
        model.ingest(tokens, wanted)
    for known in (1, 2, 1 << 16):
        monkeypatch.setattr(ingest_module, "KNOWN_WINDOWS", known)
        monkeypatch.setattr(ingest_module, "ISOLATED_TOKENS", 5 * WINDOW)
        found = model.new_memory()
        model.ingest(tokens, found)
        for layer in found.layers:
            torch.testing.assert_close(found[layer].keys(), wanted[layer].keys())
            torch.testing.assert_close(found[layer].values(), wanted[layer].values())


def test_windows_that_read_the_memory_are_never_copied(make_model: ModelMaker, ids: Draw) -> None:
    model, rows = make_model(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: rows.append(len(args[0])))
    model.ingest(torch.cat([ids(WINDOW)] * 5, dim=1), model.new_memory())
    assert sum(rows) == 5
