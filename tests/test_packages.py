"""The packages as installed: names that a user's own folder may hide."""

import subprocess
import sys
from pathlib import Path

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
