"""``fot compare`` and ``fot cost`` on a tiny checkpoint, as a user runs them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import torch
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.compare import tasks
from fot.compare.catalogue import find_methods
from fot.compare.cost import Shape, cost, extrapolate
from fot.compare.methods import Setting, opened
from fot.compare.results import Draft, append, open_folder, perplexity_score, read_trials, rows, share_score
from fot.compare.run import plan, run, searched
from fot.compare.show import picture_along
from fot.compare.tasks import TASK_FUNCTIONS, Material
from fot.evaluation.intervals import wilson

METHODS = "plain,yarn,streaming,memory,bm25"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} bottles hang on the wall of room {number * 7 % 91}.\n" for number in range(99)))
    return path


def arguments(checkpoint: Path, text: Path, out: Path, *more: str) -> list[str]:
    return ["compare", str(checkpoint), str(text), "--methods", METHODS, "--tasks", "passkey,perplexity,needles",
            "--lengths", "400,450", "--window", "20", "--local-context", "32", "--mem-layers", "1,3", "--out", str(out),
            "--whole-up-to", "420", "--dtype", "float32", "--device", "cpu", *more]  # fmt: skip


def test_compare(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(arguments(checkpoint, text, out)) == 0
    shown = capsys.readouterr().out
    for word in ("trained", "B/token", "tok/s", "peak RSS", "95 %", "no, wants it", "up to 420 tokens"):
        assert word in shown
    trials = read_trials(out / "results.jsonl")
    # At 400 five methods, but bm25 knows no perplexity; at 450 the three of them that need not see all.
    assert len(trials) == 2 * 5 + 4 + 2 * 3 + 2
    assert sorted(path.name for path in out.iterdir()) == [
        "needles.png", "passkey.png", "perplexity.png", "results.jsonl", "settings.json",
    ]  # fmt: skip
    assert (out / "passkey.png").read_bytes().startswith(b"\x89PNG")
    by_method = {row.method: row for row in rows(trials) if (row.task, row.length) == ("perplexity", 400)}
    whole = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size, bytes
    assert by_method["plain"].bytes_per_token == whole
    assert by_method["streaming"].bytes_per_token == pytest.approx(whole * (24 + 4 / 2) / 200)  # sinks' keys twice
    assert by_method["memory"].bytes_per_token >= 2 * 2 * 2 * 8 * 4 + 16
    assert all(row.low <= row.score <= row.high for row in rows(trials))


def test_resume(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    few = [*arguments(checkpoint, text, out), "--methods", "plain,bm25", "--tasks", "needles,passkey"]
    assert main(few) == 0
    results = out / "results.jsonl"
    before = results.read_text().splitlines()
    capsys.readouterr()
    assert main(few) == 2
    assert "--resume" in capsys.readouterr().err
    results.write_text("\n".join(before[:2]) + "\n" + before[2][:40])  # as after a loss of power
    assert main([*few, "--resume", "--trials", "2"]) == 0
    after = results.read_text().splitlines()
    assert after[:2] == before[:2]
    assert len(after) == 2 * len(before)
    figures = [[json.loads(line)["figures"] for line in lines if json.loads(line)["trial"] == 0]
               for lines in (before, after)]  # fmt: skip
    assert sorted(map(str, figures[0])) == sorted(map(str, figures[1])), "the same trials, whenever they are made"
    assert main([*few, "--resume", "--seed", "1"]) == 2
    assert "seed 0, and now it is 1" in capsys.readouterr().err


def test_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"a": 1}\nrubbish\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        open_folder(tmp_path, {}, resume=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "yarn,rope"], "'rope' is no method"),
        (["--tasks", "perplexity"], "need a text"),
        (["--longrope-search", "1"], "need a text"),
        (["--index", "exact"], "memory-ivf"),
        (["--longrope-factors", "pyproject.toml"], "no JSON list"),
    ],
)
def test_mistakes(
    more: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["compare", str(checkpoint), "--out", str(tmp_path / "out"), *more]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown


def test_a_text_that_is_too_short_is_named(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = [*arguments(checkpoint, text, tmp_path / "out"), "--lengths", "9000", "--tasks", "perplexity"]
    assert main(few) == 2
    assert "perplexity at 9,000 needs as many" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    few[few.index("9000")] = "400,9000"
    assert main(few) == 2  # before the first trial
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_results_without_trials_are_none(resume: bool, tmp_path: Path) -> None:
    open_folder(tmp_path, {"seed": 0}, resume=False)
    assert open_folder(tmp_path, {"seed": 1}, resume=resume) == []
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}


@pytest.mark.parametrize("more", [[], ["--positions"]])
def test_matplotlib_is_missed_before_the_trials(
    more: list[str], checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*arguments(checkpoint, text, tmp_path / "out"), *more]) == 2
    assert "fot compare draws with matplotlib: pip install 'fot[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list(capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [method.name for method in find_methods("all")]


@pytest.fixture
def model(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> object:
    made = make_model()
    made.tokenizer = tokenizer
    return made


@pytest.fixture
def material(text: Path, tokenizer: PreTrainedTokenizerFast) -> Material:
    return Material(tokenizer, [tokenizer(text.read_text()).input_ids], 0)


def test_interrupted_runs_keep_their_trials(model: object, material: Material, tmp_path: Path) -> None:
    planned = plan(find_methods("plain,memory"), ["passkey"], [400], 2, 1000)
    assert len(planned) == 4

    def interrupt(trial: object) -> None:
        raise KeyboardInterrupt

    open_folder(tmp_path, {}, resume=False)
    found = run(model, planned, Setting(400), material, tmp_path, [], report=interrupt)
    assert found["interrupted"]
    assert read_trials(tmp_path / "results.jsonl") == found["trials"]
    assert len(found["trials"]) == 1


def test_perplexity_is_that_of_one_pass(model: object, material: Material) -> None:
    """The scored tokens are the last quarter, after all that comes before."""
    with opened("plain", model, Setting(60)) as reader:
        figures = TASK_FUNCTIONS["perplexity"](reader, material, 60, 0, lambda tokens: None).figures
        text, rng = material.texts[0], material.rng("perplexity", 60, 0)
        start = rng.randint(0, len(text) - 60)
        ids = torch.tensor([text[start : start + 60]])
        with torch.no_grad():
            logits = reader.model(ids).logits[0, -16:-1]  # type: ignore[attr-defined]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, -15:], reduction="none")
    assert figures["scored"] == 15
    assert figures["loss_sum"] == pytest.approx(float(losses.sum()), rel=1e-4)
    assert figures["loss_squares"] == pytest.approx(float((losses**2).sum()), rel=1e-4)


def test_fluency(model: object, material: Material, tmp_path: Path) -> None:
    """What each method writes after the beginning of a text, and the model as it is judges."""
    open_folder(tmp_path, {}, resume=False)
    planned = plan(find_methods("plain,streaming,memory,bm25"), ["fluency"], [60], 1, 1000)
    assert len(planned) == 3, "bm25 has nothing to read again"
    trials = run(model, planned, Setting(60, window=20), material, tmp_path, [])["trials"]
    for trial in trials:
        names = {"repeated_ngrams", "newline_runs", "unlikely_tokens"}
        assert trial["figures"].keys() == names | {"right", "asked", "by_stretch"}
        assert trial["figures"]["asked"] == 60 - 30 - 3
        whole = {name: trial["figures"][name] for name in names}
        assert trial["figures"]["by_stretch"] == [{"end": 30, **whole}], "a short text is one stretch"
    assert [row.method for row in rows(trials)] == ["plain", "streaming", "memory"]
    (picture,) = picture_along(tmp_path, trials, "tiny")
    assert picture.read_bytes().startswith(b"\x89PNG")
    del trials[0]["figures"]["by_stretch"]  # as in results of earlier releases
    assert picture_along(tmp_path, trials[:1], "tiny") == []


class Stopping:
    """A bar at which a run is interrupted."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def update(self, tokens: int) -> None:
        self.seen += tokens
        if self.seen >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["plain", "streaming", "memory"])
def test_an_interrupted_text_goes_on(
    model: object, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As if nothing had been, since what was written is read, and the draws go on."""
    monkeypatch.setattr(tasks, "KEPT", 5)
    monkeypatch.setattr("fot.compare.run.judge", lambda plain, material, ids: {"ids": list(ids)})
    planned, setting = plan(find_methods(method), ["fluency"], [60], 1, 1000), Setting(60, window=20)
    (whole,) = run(model, planned, setting, material, tmp_path, [])["trials"]
    for after in (43, 48):  # 30 tokens are the beginning; the second time 10 of its own are read again
        assert run(model, planned, setting, material, tmp_path, [], progress=Stopping(after))["interrupted"]
    written, seconds, drawn = Draft(tmp_path, (method, "fluency", 60, 0)).read()
    assert (len(written), drawn is None) == (15, False)
    assert seconds > 0
    (parts,) = run(model, planned, setting, material, tmp_path, [])["trials"]
    assert parts["figures"]["ids"][:15] == written
    assert len(parts["figures"]["ids"]) == 30
    # What a memory has read lies in other windows than what it wrote.
    assert parts["figures"] == whole["figures"] or method == "memory"
    assert parts["seconds"] > seconds
    assert not (tmp_path / "unfinished.json").exists()


def test_a_text_of_another_trial_is_no_beginning(tmp_path: Path) -> None:
    draft = Draft(tmp_path, ("plain", "fluency", 60, 0))
    assert draft.read() == ([], 0.0, None)
    draft.write([1, 2], 3.0, b"state")
    assert draft.read() == ([1, 2], 3.0, b"state")
    assert Draft(tmp_path, ("plain", "fluency", 60, 1)).read() == ([], 0.0, None)
    for damage in ("{", "[1]", draft.folder.joinpath("unfinished.json").read_text().replace("ids", "id")):
        (tmp_path / "unfinished.json").write_text(damage)
        with pytest.raises(ValueError, match=r"unfinished.json is damaged: delete it"):
            draft.read()
    # Without --resume, and with other settings, it is none, either.
    draft.write([1, 2], 3.0, b"state")
    before = {"seed": 0, "machine": {"cores": 2, "threads": 1}}
    (tmp_path / "settings.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match="has seed 0, and now it is 1: make"):
        open_folder(tmp_path, before | {"seed": 1}, resume=True)
    with pytest.raises(ValueError, match=r"json has machine\.threads 1, and now it is 2: make it as it was, or choose"):
        open_folder(tmp_path, before | {"machine": {"cores": 2, "threads": 2}}, resume=True)
    open_folder(tmp_path, before, resume=True)
    assert draft.read()[0] == [1, 2]
    open_folder(tmp_path, before, resume=False)
    assert draft.read()[0] == []


def test_all_methods_get_the_same_texts(material: Material) -> None:
    from fot.evaluation.passkey import make_prompt

    keys = [make_prompt(material.tokenizer, 400, material.rng("passkey", 400, trial)).key for trial in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_scores() -> None:
    trials = [{"figures": {"right": 3, "asked": 4}}, {"figures": {"right": 1, "asked": 4}}]
    assert share_score(trials) == (0.5, *wilson(4, 8))
    # losses 1, 3 and 2: mean 2, variance 2/3; 1.96 sqrt(2/9) = 0.92393
    parts = [{"loss_sum": 4.0, "loss_squares": 10.0, "scored": 2}, {"loss_sum": 2.0, "loss_squares": 4.0, "scored": 1}]
    found = perplexity_score([{"figures": part} for part in parts])
    assert torch.tensor(found).log().tolist() == pytest.approx([2, 2 - 0.92393, 2 + 0.92393], abs=1e-4)


def test_peak_memory_counts_anew() -> None:
    """In a process of its own: here other tests may have told the allocator to keep what is freed."""
    code = (
        "import torch; from fot.machine import peak_rss_bytes; from fot.compare.run import reset_peak_rss\n"
        "block = torch.ones(50_000_000); high = peak_rss_bytes(); del block; reset_peak_rss()\n"
        "print(high - peak_rss_bytes())"
    )
    done = forks.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100_000_000


def test_longrope_factors_are_searched_on_the_text(model: object, material: Material) -> None:
    seen: list[int] = []

    class Bar:
        def update(self, tokens: int) -> None:
            seen.append(tokens)

    found = searched(model, Setting(150), material, 1, Bar())
    assert found.lambdas is not None
    assert len(found.lambdas) == 4
    assert sum(seen) % 150 == 0
    assert sum(seen) // 150 > 3


def test_costs_by_hand(model: object) -> None:
    """Kept bytes are those that readers hold, FLOPs those of each pair of a query and a key."""
    shape, setting = Shape.of(model), Setting(100, window=20)
    for name in ("plain", "window", "streaming", "memory", "cache-fp8"):
        size = 1024 + 8 if name == "memory" else 100  # it makes room for 1024 at once; 8 stay local
        with torch.no_grad(), opened(name, model, setting) as reader:
            held = reader.held_bytes(reader.read([3 + place % 200 for place in range(size)], lambda tokens: None))
        found = cost(find_methods(name)[0], shape, size, setting)
        slack = 400 if name == "cache-fp8" else 0  # scales
        assert found.kept_bytes is not None
        assert held - slack <= found.kept_bytes <= held, name
    pair = 4 * 4 * 8  # heads, size
    plain, window, memory = (cost(one, shape, 100, setting) for one in find_methods("plain,window,memory"))
    assert plain.read_flops == 4 * pair * 100 * 101 / 2
    assert plain.token_flops == 4 * pair * 101
    assert window.read_flops == 4 * pair * sum(min(place + 1, 20) for place in range(100))
    assert window.token_flops == 4 * pair * 20
    local = shape.memory.local_length(100)
    assert local > 0
    assert memory.token_flops == 2 * pair * 100 + 2 * pair * local  # layers without memory see the window
    assert cost(find_methods("memory-ivf")[0], shape, 100, setting).token_flops is None


def test_extrapolation() -> None:
    sizes = [256, 512, 1024]
    assert extrapolate(sizes, [1e-3 * n + 1e-6 * n**2 for n in sizes], 10_000, (1, 2)) == pytest.approx(110)
    assert extrapolate(sizes, [1e-3 * n for n in sizes], 10_000, (1, 2)) == pytest.approx(10, rel=1e-6)
    # Measured times that bend down must not come out below 0.
    assert extrapolate(sizes, [1.0, 1.9, 3.5], 100_000, (1, 2)) > 300
    assert extrapolate(sizes, [0.5, 0.5, 0.5], 10_000, (0,)) == pytest.approx(0.5)


def test_cost(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["cost", str(checkpoint), "--length", "1000", "--window", "20",
           "--methods", "plain,streaming,memory,bm25,cache-offloaded",
           "--sizes", "32,64", "--local-context", "32", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    assert main(few) == 0
    shown = capsys.readouterr().out
    assert "a text of 1,000 tokens" in shown
    assert "cache-offloaded: left out" in shown
    assert main([*few, "--no-time"]) == 0
    assert main([*few, "--sizes", "64"]) == 2
    assert "at least two sizes" in capsys.readouterr().err


def test_appended_trials_are_whole_lines(tmp_path: Path, ids: Callable[..., torch.Tensor]) -> None:
    for number in range(3):
        append(tmp_path, {"trial": number})
    assert read_trials(tmp_path / "results.jsonl") == [{"trial": number} for number in range(3)]
