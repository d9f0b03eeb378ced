"""The packages as installed: arrows between them, names that a user's own folder may hide."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"memory": {"fot", "training", "transformers", "datasets", "accelerate"}, "fot": {"training"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        if path != ROOT / "fot" / "commands" / "train.py":
            assert not imports(path) & FORBIDDEN[package], path


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
