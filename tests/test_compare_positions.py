"""Positions that a decoder is trained with: each formula by hand, and the panel on a tiny text."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fot.cli import main
from fot.compare import panel, positions
from fot.compare.decoder import Decoder, Size
from fot.compare.panel import perplexity, trained

SIZE = Size(trained=24, longest=64, width=16, layers=2, heads=2)


class Bar:
    def update(self) -> None:
        pass


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sinusoidal() -> None:
    found = positions.sinusoidal(torch.tensor([3]), 4)[0].tolist()
    assert found == pytest.approx([math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)])


def test_alibi_slopes() -> None:
    assert positions.alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert positions.alibi_slopes(4) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    # 9 heads: those of 8, then the first of 16, which is 2^(-1/2)
    assert positions.alibi_slopes(9) == [*positions.alibi_slopes(8), pytest.approx(2**-0.5)]
    # 12: those of 8, then every second of 16: 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5
    assert positions.alibi_slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_t5_buckets() -> None:
    # 16 + floor(16 ln(n / 16) / ln 8): n = 20: 1.72, n = 64: 10.67, n = 127: 15.94, from 128 on the last
    distances = torch.tensor([0, 1, 15, 16, 20, 64, 127, 128, 10_000])
    assert positions.t5_buckets(distances).tolist() == [0, 1, 15, 16, 17, 26, 31, 31, 31]


def test_t5_buckets_are_transformers_own() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(400)
    theirs = T5Attention._relative_position_bucket(-distances, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(positions.t5_buckets(distances), theirs)


def test_xpos() -> None:
    # width 4: zeta = 0.4 / 1.4 and (0.5 + 0.4) / 1.4
    found = positions.xpos_scale(torch.tensor([512, 0, -256]), 4)
    assert found[0].tolist() == pytest.approx([0.4 / 1.4, 0.9 / 1.4])
    assert found[1].tolist() == [1, 1]
    assert found[2].tolist() == pytest.approx([(1.4 / 0.4) ** 0.5, (1.4 / 0.9) ** 0.5])


def test_rotated_by_hand() -> None:
    vectors = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    found = positions.rotated(vectors, torch.tensor([[5]])).flatten().tolist()
    assert found == pytest.approx([math.cos(5), -2 * math.sin(0.05), math.sin(5), 2 * math.cos(0.05)], abs=1e-6)


def test_random_positions() -> None:
    found = positions.random_positions(3, 10, 40, generator())
    assert (found.diff(dim=1) > 0).all()
    assert found.min() >= 0
    assert found.max() < 40
    assert not torch.equal(found[0], found[1])
    assert positions.random_positions(1, 7, 7, generator())[0].tolist() == list(range(7))
    with pytest.raises(ValueError, match="8 tokens"):
        positions.random_positions(1, 8, 7, generator())


def test_shifted_positions() -> None:
    found = positions.shifted_positions(50, 3, generator())
    assert torch.equal(found - found[:, :1], torch.arange(3).expand(50, 3))
    assert 0 <= found[:, 0].min() < found[:, 0].max() < 500
    assert positions.shifted_positions(2, 2, None).tolist() == [[500, 501], [500, 501]]


@pytest.mark.parametrize("kind", positions.KINDS)
def test_a_decoder_sees_the_past_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the same way, however many queries attend at once."""
    torch.manual_seed(0)
    model, text = Decoder(kind, SIZE).eval(), torch.randint(256, (1, 24), generator=generator(1))
    if model.table is not None:
        torch.nn.init.normal_(model.table)
    other = text.clone()
    other[0, 20:] = 7
    whole = model(text, generator())
    torch.testing.assert_close(model(other, generator())[:, :20], whole[:, :20])
    assert (model(other, generator())[:, 20:] - whole[:, 20:]).abs().max() > 1e-4
    monkeypatch.setattr("fot.compare.decoder.QUERIES", 7)
    torch.testing.assert_close(model(text, generator()), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(text, generator(), keep=3), whole[:, -3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", positions.KINDS)
def test_a_short_text_in_training_is_a_stretch_of_a_whole_one(kind: str) -> None:
    model, draws = Decoder(kind, SIZE).train(), generator()
    starts = []
    for _ in range(40):
        places = model._places(2, 6, draws)
        assert places.shape == (2, 6)
        assert (places.diff(dim=1) > 0).all()
        starts.append(int(places[0, 0]))
    if kind not in ("randomised", "shape"):
        assert (min(starts), max(starts)) == (0, 24 - 6)
    assert model._places(2, 24, draws).shape == (2, 24)
    first = model.eval()._places(1, 6, generator())[0]
    if kind not in ("randomised", "shape"):
        assert first.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", positions.KINDS)
def test_order_matters_to_all_kinds_but_none(kind: str) -> None:
    """In one layer without positions, a query sees the bytes before it in any order as the same."""
    torch.manual_seed(0)
    model = Decoder(kind, Size(trained=8, longest=16, width=16, layers=1, heads=2)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "first" not in name and "second" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(False)
    one, other = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[3, 1, 2, 4, 5]])
    difference = float((model(one, generator()) - model(other, generator()))[0, -1].abs().max())
    assert (difference < 1e-4) == (kind == "none")


def test_texts_of_all_lengths_end_at_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: dict[int, list[int]] = {}

    class Reader:
        size = SIZE

        def reach(self) -> float:
            return math.inf

        def __call__(self, ids: torch.Tensor, places: torch.Generator, keep: int) -> torch.Tensor:
            ends.setdefault(ids.shape[1], []).append(int(ids[0, -1]))
            return torch.zeros(1, keep, 256)

        read = __call__

    monkeypatch.setattr(panel, "trained", lambda *_: Reader())
    panel.run(bytes(range(256)) * 2, ["none"], [8, 16, 64], steps=1, size=SIZE, seed=0, progress=Bar())
    assert ends[8] == ends[16] == ends[64]
    assert len(set(ends[8])) == 4


@pytest.mark.parametrize("kind", positions.KINDS)
def test_training_helps(kind: str) -> None:
    data = torch.tensor(list(b"abcdefgh" * 60))
    before, after = (trained(kind, data, steps, SIZE, 0, Bar()) for steps in (0, 60))
    first, second = (perplexity(model, data, 24, 0) for model in (before, after))
    assert first is not None
    assert second is not None
    assert first > 100
    assert second < first / 4
    assert (perplexity(after, data, 65, 0) is None) == (kind in ("learnt", "randomised"))


def score(kind: str, query: torch.Tensor, key: torch.Tensor, distance: int, head: int) -> torch.Tensor:
    """Of a query so far behind a key, which stands at 0."""
    place, size = torch.tensor([[distance]]), len(query)
    if kind in ("rotary", "xpos"):
        query = positions.rotated(query[None, None, None], place)[0, 0, 0]
    if kind == "xpos":
        query = query * positions.xpos_scale(place[0, 0], size).repeat(2)
    bias = -positions.alibi_slopes(2)[head] * distance if kind == "alibi" else 0.0
    return query @ key / size**0.5 + bias


@pytest.mark.parametrize("windows", [3, 7])
@pytest.mark.parametrize("kind", ["none", "alibi", "rotary", "xpos"])
@torch.no_grad()
def test_memory_by_hand(kind: str, windows: int) -> None:
    """The last byte sees its window, and earlier windows as at its first place, in one softmax; the middle layer does.

    More than four windows in memory weigh as much as four.
    """
    torch.manual_seed(0)
    model = Decoder(kind, Size(trained=6, longest=64, width=16, layers=1, heads=2)).eval()
    torch.nn.init.normal_(model.layers[0].mixed.weight, std=0.5)
    text = torch.randint(256, (1, 6 * windows + 4), generator=generator(1))
    found = model.read(text, generator(), keep=2)[0, -1]
    layer, hidden = model.layers[0], model.embedding(text[0, 4:]) * 16**0.5
    queries, keys, values = layer.mixed(layer.first(hidden)).unflatten(-1, (3, 2, 8)).unbind(1)  # (S, H, D)
    stored, outputs = 6 * (windows - 1), []
    for head in range(2):
        query = queries[-1, head]
        scores = torch.stack([
            score(kind, query, keys[place, head], 5 if place < stored else len(keys) - 1 - place, head)
            - (math.log(max(1.0, stored / 24)) if place < stored else 0.0)
            for place in range(len(keys))
        ])  # fmt: skip
        outputs.append(scores.softmax(0) @ values[:, head])
    last = hidden[-1] + layer.out(torch.cat(outputs))
    last = last + layer.down(torch.nn.functional.gelu(layer.up(layer.second(last))))
    torch.testing.assert_close(found, model.norm(last) @ model.embedding.weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", positions.KINDS)
@torch.no_grad()
def test_memory_is_of_one_layer_and_reaches_any_length(kind: str) -> None:
    torch.manual_seed(0)
    model, text = Decoder(kind, SIZE).eval(), torch.randint(256, (1, 96), generator=generator(1))
    found = model.read(text, generator(), keep=5)
    torch.testing.assert_close(model.read(text[:, -24:], generator(), 5), model(text[:, -24:], generator(), 5))
    other = text.clone()
    other[0, :24] = 7
    assert (model.read(other, generator(), keep=5) - found).abs().max() > 1e-6
    data = text[0].repeat(3)
    read = perplexity(model, data, 72, 0, memory=True)
    assert read is not None
    assert perplexity(model, data, 12, 0, memory=True) == perplexity(model, data, 12, 0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} bottles hang on wall {number * 7 % 91}.\n" for number in range(200)))
    out = tmp_path / "out"
    few = ["compare", str(text), "--positions", "--lengths", "512,600", "--steps", "1", "--out", str(out)]
    assert main([*few, "--methods", "learnt,alibi"]) == 0
    shown = capsys.readouterr().out
    assert "alibi" in shown
    result = json.loads((out / "positions.json").read_text())
    assert result["kinds"]["learnt"].keys() == {"512", "600"}
    assert result["kinds"]["learnt"]["600"] is None
    assert result["kinds"]["learnt + memory"]["600"] > 1
    assert "alibi + memory" in shown
    assert result["kinds"]["alibi"]["600"] > 1
    assert (out / "positions.png").read_bytes().startswith(b"\x89PNG")
    assert main([*few, "--methods", "alibi"]) == 2
    assert "results.jsonl exists: go on with it by --resume" in capsys.readouterr().err
    assert main([*few, "--methods", "yarn"]) == 2
    assert "'yarn' is no kind of positions" in capsys.readouterr().err
    assert main(["compare", "--positions"]) == 2
    assert "name a text" in capsys.readouterr().err


def test_interrupted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"{number} bottles hang on wall {number * 7 % 91}.\n" for number in range(200)))
    command = [
        "compare",
        str(text),
        "--positions",
        "--lengths",
        "512,600",
        "--steps",
        "1",
        "--methods",
        "none,learnt,t5",
    ]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    train, kinds = panel.trained, []

    def interrupted(kind: str, *rest: Any) -> Decoder:
        kinds.append(kind)
        if len(kinds) == 3:
            raise KeyboardInterrupt
        return train(kind, *rest)

    monkeypatch.setattr(panel, "trained", interrupted)
    assert main([*command, "--out", str(out)]) == 130
    assert "finished kinds only; go on with --resume" in capsys.readouterr().out
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert kinds == ["none", "learnt", "t5", "t5"]
    whole, resumed = (json.loads((folder / "positions.json").read_text()) for folder in (tmp_path / "whole", out))
    assert resumed == whole
    assert main([*command, "--out", str(out), "--resume", "--seed", "1"]) == 2
    assert "seed 0, and now it is 1" in capsys.readouterr().err


def test_an_older_torch_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (text := tmp_path / "text.txt").write_text("words " * 2000)
    monkeypatch.delattr(torch.optim, "Muon")
    assert main(["compare", str(text), "--positions", "--lengths", "512", "--out", str(tmp_path / "out")]) == 2
    assert "install torch 2.9 or later" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", positions.KINDS)
def test_a_gpu_finds_what_the_cpu_does(kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    text = bytes(range(32, 122)) * 40
    both = [
        panel.run(text, [kind], [16, 48], steps=4, size=SIZE, seed=0, progress=Bar(), device=device)["kinds"]
        for device in ("cpu", "cuda")
    ]
    for name, found in both[0].items():
        for length, expected in found.items():
            assert both[1][name][length] == pytest.approx(expected, rel=1e-2)
