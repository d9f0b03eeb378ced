"""Importing FAISS: one build of it, or a message that says how to get there; with torch, in both orders."""

import os
import re
import subprocess
import sys
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


SEARCHES = """
from memory import VectorBlocks
from memory.faiss_index import FaissIndex
keys = torch.randn(1, 900, 8)
blocks = VectorBlocks(1, 8, torch.float32)
blocks.append(keys)
for factory in ("IVF16,Flat", "HNSW8"):
    index = FaissIndex(factory, blocks, blocks)
    index.add(keys)
    for _ in range(5):
        keys @ keys.mT
        index.search(keys, 4)
print("survived")
"""


def run_anew(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # two runtimes of threads are what may quarrel
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("first", ["faiss", "torch"])
def test_both_import_orders_work(first: str) -> None:
    """Each with threads of its own."""
    if first == "faiss":
        done = run_anew(f"import faiss, torch, numpy{SEARCHES}")
    else:  # in a process that has torch already, with one thread
        loaded = "import sys, torch; assert not {'memory', 'faiss'} & set(sys.modules); torch.set_num_threads(2)\n"
        done = run("-c", f"{FORGET}{loaded}import faiss; faiss.omp_set_num_threads(2){SEARCHES}", cwd=ROOT)
    assert done.stdout == "survived\n", done.stderr


def test_memory_imports_without_faiss_and_names_it_when_needed() -> None:
    code = f"""{FORGET}
sys.modules["faiss"] = None
from memory import Memory
Memory([0], 1, 8, index="exact")
try:
    Memory([0], 1, 8, index="Flat")
except ImportError as error:
    print(error)
"""
    done = run("-c", code)
    assert "pip install faiss-cpu" in done.stdout, done.stderr
