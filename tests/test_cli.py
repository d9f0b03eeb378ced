"""The command, as a user runs it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker

from fot.cli import main, program

Run = Callable[..., int]


def test_installed_command_is_quick_to_help() -> None:
    code = "import sys, fot.cli\nprint('torch' in sys.modules or 'transformers' in sys.modules)"
    program = Path(sys.executable).with_name("fot")
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert "passkey" in shown
    assert "info" in shown
    imported = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['fot']\n{code}"], capture_output=True, text=True, check=True
    )
    assert imported.stdout.strip() == "False"


def test_installed_command_reports_errors_in_one_line() -> None:
    """A name that stands for nothing before torch is loaded, which takes seconds."""
    program = Path(sys.executable).with_name("fot")
    done = subprocess.run([program, "passkey", "smollm"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fot: ")
    assert "smollm2-135m" in done.stderr
    code = "import sys; sys.argv = ['fot', 'passkey', 'smollm']\nfrom fot.cli import main\n"
    code += "assert main() == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_one_of_several_processes_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The end of a gloo group may wait for ever; so it never comes."""
    left: list[int] = []

    def leave(status: int) -> None:
        left.append(status)
        raise SystemExit(status)

    def fail() -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("fot.cli.os._exit", leave)
    for joined in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda joined=joined: joined)
        for status in (0, 2, 143):
            monkeypatch.setattr("fot.cli.main", lambda status=status: status)
            with pytest.raises(SystemExit, match=f"^{status}$"):
                program()
        monkeypatch.setattr("fot.cli.main", fail)
        with pytest.raises(SystemExit if joined else RuntimeError):
            program()
    assert left == [0, 2, 143, 1], "those in a group alone"
    assert "RuntimeError: a defect" in capsys.readouterr().err


def test_passkey(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["passkey", str(checkpoint), "--lengths", "350,420", "--trials", "2", "--seed", "5",
                 "--mem-layers", "1,3", "--local-context", "32", "--index", "exact", "--top-k", "4",
                 "--dtype", "float32", "--device", "cpu", "--json", str(out), "--plot", str(plot)]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "without memory" in shown
    assert "350" in shown
    result = json.loads(out.read_text())
    assert result["model"] == str(checkpoint)
    assert result["memory"]["mem_layers"] == [1, 3]
    assert result["memory"]["top_k"] == 4
    for part in ("results", "baseline"):
        assert [entry["length"] for entry in result[part]] == [350, 420]
        assert all(len(entry["trials"]) == 2 for entry in result[part])
    ours, plain = (result[part][0]["trials"] for part in ("results", "baseline"))
    assert [trial["key"] for trial in ours] == [trial["key"] for trial in plain]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_passkey_without_memory(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    assert (
        main(["passkey", str(checkpoint), "--lengths", "350", "--trials", "1", "--no-memory", "--json", str(out)]) == 0
    )
    result = json.loads(out.read_text())
    assert result["results"] == []
    assert len(result["baseline"]) == 1


def test_passkey_says_what_it_picks(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["passkey", str(checkpoint), "--lengths", "350", "--trials", "1", "--no-baseline", "-v"]) == 0
    assert "memory backend exact" in caplog.text
    assert "fewer than" in caplog.text


def test_info(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(checkpoint), "--mem-layers", "1,3", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    # 2 layers x 2 KV heads x (key + value) x 8 numbers x 2 bytes, and 16 for the token's id and source
    assert f"{2 * 2 * 2 * 8 * 2 + 16} bytes" in shown
    assert "1, 3" in shown
    assert "fits here" in shown


def test_info_says_what_weights_and_memories_take(
    checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    from fot import FoTForCausalLM

    model = FoTForCausalLM.from_pretrained(checkpoint)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("fot.evaluation.costs._gigabytes", lambda number: f"{number} bytes")

    def info(*options: str) -> dict[str, str]:
        assert main(["info", str(checkpoint), "--mem-layers", "1,3", "--dtype", "bfloat16", *options]) == 0
        rows = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if line.strip()]
        return {row[0]: row[1].strip() for row in rows if len(row) == 2}

    shown, process = info(), 1 << 30
    assert shown["weights"] == f"{2 * numbers} bytes in bfloat16"
    assert f"{4 * numbers} bytes in float32, {2 * numbers} bytes in float16" in shown["weights otherwise"]
    token = 2 * 2 * 2 * 8 * 2 + 16
    for label, tokens in (("8k", 8192), ("100k", 102400), ("256k", 262144)):
        whole = tokens * token + 2 * numbers + process
        assert shown[f"memory of {label} tokens"] == f"{tokens * token} bytes, with the weights {whole} bytes"
    packed = info("--quantization", "nf4")["weights"]
    assert packed.endswith("in nf4")
    assert 0.5 * numbers < int(packed.split()[0]) < 2 * numbers
    free = psutil.virtual_memory()._replace(available=process + 3 * numbers)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert f"about {numbers // token:,} tokens" in info()["fits here"]
    assert info("--dtype", "float32")["fits here"] == (
        "no memory, since the weights do not fit in float32; they would with --dtype bfloat16"
    )


def test_info_counts_bytes_as_the_store_does(checkpoint: Path, make_model: ModelMaker) -> None:
    import torch

    from fot.evaluation.costs import memory_bytes_per_token

    for dtype in ("float32", "int8"):
        model = make_model(key_dtype=dtype, value_dtype=dtype)
        memory = model.new_memory()
        model.ingest(torch.randint(3, 300, (1024,)), memory)
        assert sum(memory.nbytes().values()) == 1024 * memory_bytes_per_token(model.memory_config, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mem-layers", "1,9"], "memory layer 9 is out of range: the model has layers 0..3"),
        (["--top-k", "0"], "top_k is 0; it must be at least 1"),
        (["--index", "IVFx,Nope"], "IVFx,Nope"),
        (["--lengths", "12"], "a passkey prompt of 12 tokens is too short"),
        (["--local-context", "4096"], "local_context is 4096"),
        (["--no-memory", "--no-baseline"], "leave nothing to test"),
        (["--json", "/nowhere/out.json"], "/nowhere is not a folder"),
        (["--json", "/"], "/ is a folder"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_bad_input(arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["passkey", str(checkpoint), "--trials", "1", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown


@pytest.mark.parametrize(
    "arguments", [["--lengths", "0"], ["--trials", "x"], ["--mem-layers", "a"], ["--dtype", "int3"]]
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["passkey", *arguments])
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_folder_without_tokenizer(make_plain: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_plain().save_pretrained(tmp_path)
    assert main(["passkey", str(tmp_path)]) == 2
    assert "has no tokenizer beside its weights" in capsys.readouterr().err


def test_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["info", "long-llama-3b"]) == 2
    shown = capsys.readouterr().err
    assert "syzymon/long_llama_3b" in shown
    assert "smollm2-135m, which needs no hub" in shown
