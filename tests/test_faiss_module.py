"""One build of FAISS, or a message that says how to get there."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from forks import FORGET, run

from memory import faiss_module

ROOT = Path(__file__).parent.parent


def test_two_builds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ["faiss-cpu"]

    def version(name: str) -> str:
        if name not in here:
            raise PackageNotFoundError(name)
        return "1.14"

    monkeypatch.setattr(faiss_module, "version", version)
    faiss_module.check_one_build()
    here.append("faiss-gpu-cu12")
    words = "pip uninstall -y faiss-cpu faiss-gpu-cu12, and then pip install faiss-gpu-cu12"
    with pytest.raises(ImportError, match=re.escape(words)):
        faiss_module.check_one_build()


@pytest.mark.parametrize("module", ["faiss_heads", "faiss_factory", "clustering"])
def test_every_module_that_imports_faiss_looks_first(module: str) -> None:
    code = (
        f"{FORGET}import importlib.metadata as m; plain = m.version\n"
        "m.version = lambda name: '1' if name in ('faiss-cpu', 'faiss-gpu-cu12') else plain(name)\n"
        f"try:\n    import memory.{module}\nexcept ImportError as error:\n    print(error)"
    )
    done = run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "pip uninstall -y faiss-cpu faiss-gpu-cu12" in done.stdout
