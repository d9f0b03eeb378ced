"""Text tokenised in pieces: together they are what the tokenizer makes of the whole text."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WINDOW, ModelMaker
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fot import ingest as ingest_module
from fot.documents import add_document
from fot.documents.add import _rest
from fot.ingest import Piece, text_pieces
from memory import Memory

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
TEMPLATES = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "twice": "<s> <s> $A </s> </s>"}


def fast(inner: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """As those of GPT-2 and Llama 3."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "Ġth", "ne"]
    inner = Tokenizer(
        models.BPE(SPECIAL | {token: 4 + n for n, token in enumerate(tokens)}, [("t", "h"), ("Ġ", "th"), ("n", "e")])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return fast(inner, template)


def sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """As that of Llama 2: a space in front of every text, and bytes for what it has no token for."""
    tokens = ["▁", *"abcdefghijklmnopqrstuvwxyzL0123456789.", *(f"<0x{n:02X}>" for n in range(256)), "th", "▁th"]
    inner = Tokenizer(
        models.BPE(
            SPECIAL | {token: 4 + n for n, token in enumerate(tokens)},
            [("t", "h"), ("▁", "th")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(inner, template)


def metaspace(template: str) -> PreTrainedTokenizerFast:
    """As SentencePiece's are converted now."""
    tokenizer = sentencepiece(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def words(template: str) -> PreTrainedTokenizerFast:
    """Words alone; lines' ends are no part of any token."""
    inner = Tokenizer(models.WordLevel(SPECIAL | {"line": 4, "the": 5}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(inner, template)


class SlowTokenizer(ByT5Tokenizer):
    """Bytes, in Python, with a template."""

    template = "$A"

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        before, after = self.template.split("$A")
        return [*[1] * before.count("<s>"), *token_ids_0, *[2] * after.count("</s>")]


def slow(template: str) -> ByT5Tokenizer:
    tokenizer = SlowTokenizer()
    tokenizer.template = template
    return tokenizer


KINDS: list[Callable[[str], Any]] = [byte_level, sentencepiece, metaspace, words, slow]


def random_text(seed: int, lines: int) -> str:
    """Lines of words; single ends of lines between them, so that no token goes across."""
    draw = random.Random(seed)
    some = ["the", "line", "né", "thin 12", "x  y", "L.", "— ok", "😀"]
    text = "\n".join(" ".join(draw.choices(some, k=draw.randint(1, 12))) for _ in range(lines))
    return text + draw.choice(["", "\n"])


def pieces_of(text: str, tokenizer: Any) -> list[Piece]:
    return list(text_pieces(io.StringIO(text, newline=""), len(text.encode()), tokenizer))


def assert_whole(text: str, tokenizer: Any, pieces: list[Piece]) -> None:
    whole = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    assert [number for piece in pieces for number in piece.ids] == whole["input_ids"]
    if not tokenizer.is_fast:
        assert all(piece.spans is None for piece in pieces)
        return
    behind = len(tokenizer("x")["input_ids"]) - len(tokenizer("x", add_special_tokens=False)["input_ids"])
    behind -= whole["input_ids"][:2].count(1)
    spans = [(a, b) for a, b in whole["offset_mapping"]]
    wanted = spans[: len(spans) - behind] + [(len(text), len(text))] * behind  # the end's are at the end
    assert [span for piece in pieces for span in piece.spans or []] == wanted


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind: Callable[[str], Any], template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = kind(TEMPLATES[template])
    monkeypatch.setattr(ingest_module, "PIECE", 70)
    for seed in range(12):
        text = random_text(seed, lines=1 + 3 * seed)
        pieces = pieces_of(text, tokenizer)
        assert_whole(text, tokenizer, pieces)
        assert seed < 6 or len(pieces) > 5
        assert pieces[-1].done == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_several_pieces_of_the_usual_size(kind: Callable[[str], Any]) -> None:
    text = random_text(0, lines=6000)
    pieces = pieces_of(text, kind(TEMPLATES["both"]))
    assert len(pieces) > 2
    assert_whole(text, kind(TEMPLATES["both"]), pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_line(kind: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "PIECE", 70)
    monkeypatch.setattr(ingest_module, "LONGEST_PIECE", 140)
    text, tokenizer = "the line thin 12 " * 60, kind(TEMPLATES["both"])
    pieces = pieces_of(text, tokenizer)
    assert len(pieces) > 5
    assert_whole(text, tokenizer, pieces)


def test_the_rest_of_a_text_starts_at_the_right_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "PIECE", 70)
    text, tokenizer = random_text(1, lines=20), byte_level(TEMPLATES["both"])
    ids = tokenizer(text)["input_ids"]
    for skip in [0, 1, 2, 65, 66, 67, 150, len(ids) - 1, len(ids)]:
        rest = [number for piece in _rest(pieces_of(text, tokenizer), skip) for number in piece.ids]
        assert rest == ids[skip:]


@pytest.mark.parametrize("stop", [1, 6, 23])
def test_interrupted_documents_go_on(
    stop: int, make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_module, "PIECE", 70)
    model = make_model()
    model.tokenizer = byte_level(TEMPLATES["both"])
    text, left, append = random_text(2, lines=20), [stop], Memory.append

    def interrupting(self: Memory, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *args, **kwargs)

    model.new_memory().save(tmp_path / "m")
    with Memory.open(tmp_path / "m", "a") as memory:
        monkeypatch.setattr(Memory, "append", interrupting)
        with pytest.raises(KeyboardInterrupt):
            add_document(model, memory, "a", text)
        monkeypatch.setattr(Memory, "append", append)
        assert len(memory) == stop * WINDOW
        add_document(model, memory, "a", text)
        assert memory.token_ids().tolist() == model.tokenizer(text)["input_ids"]
        assert memory.source(0).span == (0, 0)
        assert memory.source(len(memory) - 1).span == (len(text), len(text))
