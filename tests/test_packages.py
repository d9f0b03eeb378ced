"""The packages as installed: names that a user's own folder may hide."""

import subprocess
import sys
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["memory", "training"])
def test_a_folder_in_the_way_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import fot"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"fot needs its own package '{name}'" in done.stderr
    assert str(tmp_path) in done.stderr


def test_public_names() -> None:
    import fot

    for name in fot.__all__:
        assert getattr(fot, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = fot.nothing_here


def test_modules_of_fot_are_there_when_named() -> None:
    """``fot.ask.ask`` and ``fot.trace.trace``, after ``import fot`` alone; nothing is loaded before."""
    code = (
        f"{forks.FORGET}import sys; sys.argv = ['fot']; import fot\n"
        "assert not {'fot.ask', 'fot.trace', 'fot.longllama'} & set(sys.modules); fot.ask.ask; fot.trace.trace"
    )
    done = forks.run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.argv = ['fot']; import fot; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_of_the_module_is_quick() -> None:
    """``python -m fot --help`` loads no torch, as ``fot --help`` does not."""
    command = [sys.executable, "-X", "importtime", "-m", "fot", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fot.cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy"}
