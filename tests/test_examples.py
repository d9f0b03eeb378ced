"""Each example runs, as its first lines say, on something tiny."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent / "examples"
LONGLLAMA = Path(__file__).parent / "data" / "longllama"


def run(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_longllama() -> None:
    shown = run(EXAMPLES / "load_longllama.py", LONGLLAMA)
    assert "memory layers (1, 2), windows of 32 tokens" in shown
    assert "160 tokens read" in shown


def test_passkey(make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make_plain().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = run(EXAMPLES / "passkey.py", tmp_path, "400")
    assert "368 tokens" in shown
    assert "answered:" in shown


def test_finetune_openllama(tmp_path: Path) -> None:
    shown = run(EXAMPLES / "finetune_openllama.py", tmp_path, "steps=8", "--tiny").splitlines()
    first, last = re.findall(r"[\d.]+(?= at step)", shown[0])
    assert "at step 8" in shown[0]
    assert float(last) < float(first)
    assert "layer 1: exact, dense, layer 2: exact, dense" in shown[1]
