"""What a type checker knows of a model with memory, in a user's own script."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch
from transformers import PreTrainedModel

import fot

model = fot.FoTForCausalLM.from_pretrained("smollm2-135m", dtype=torch.float32)
plain: PreTrainedModel = model
model.to("cpu").eval()
device: torch.device = model.device
ids = torch.tensor([[1, 2, 3]]).to(device)
memory: fot.Memory = model.new_memory()
count: int = model.ingest(ids, memory)
logits = model(ids, memory=memory).logits
answer = model.generate(ids, memory=memory, max_new_tokens=3)
model.save_pretrained("folder")
again: fot.FoTForCausalLM = fot.attach_memory(plain, fot.MemoryConfig(mem_layers=(1,)))
back: PreTrainedModel = fot.detach_memory(again)
wrong: int = model
"""


@pytest.mark.slow  # a minute: mypy reads torch and transformers
def test_a_model_with_memory_is_a_model_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", "user.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert 'expression has type "FoTForCausalLM", variable has type "int"' in errors[0]
