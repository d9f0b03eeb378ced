"""What a type checker knows of a model with memory, in a user's own script."""

import os
import subprocess
import sys
from pathlib import Path

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
# What the script asks of others' packages. mypy would read all of torch and transformers for minutes.
STUBS = {
    "torch": """
from typing import Any
from . import nn as nn
class device: ...
class Tensor:
    def to(self, *args: Any) -> Tensor: ...
float32: Any
def tensor(data: Any) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
""",
    "torch/nn": """
from typing import Any
from typing_extensions import Self
class Module:
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def eval(self) -> Self: ...
def __getattr__(name: str) -> Any: ...
""",
    "transformers": """
from typing import Any
import torch
class PreTrainedModel(torch.nn.Module):
    @property
    def device(self) -> torch.device: ...
    def save_pretrained(self, save_directory: str) -> None: ...
class GenerationMixin:
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...
def __getattr__(name: str) -> Any: ...
""",
}
SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-fot.*,memory.*]
follow_imports = silent
"""


def test_a_model_with_memory_is_a_model_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    for name, content in STUBS.items():
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.pyi").write_text(content)
    environment = {"MYPYPATH": f"{tmp_path / 'stubs'}{os.pathsep}{ROOT}", "PATH": ""}
    command = [sys.executable, "-m", "mypy", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert 'expression has type "FoTForCausalLM", variable has type "int"' in errors[0]
