"""The shipped recipes for OpenLLaMA in their documented shape: processes, lanes, windows, layers; at a tiny width."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_helpers import losses, train
from transformers import LlamaConfig, LlamaForCausalLM

import fot
from training.recipe import SHIPPED

TESTS = Path(__file__).parent
WINDOW = 32
REDPAJAMA = "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/"
# Columns of the files differ, as those of RedPajama's do.
FILES = {"cc_2019-30": {"source": "cc"}, "cc_2023-06": {"source": "cc"}, "github": {"content_hash": "0", "size": 3},
         "arxiv": {"timestamp": "2020"}, "book": {"short_book_title": "A", "publication_date": 1900}}  # fmt: skip
LAYERS = {"3b": 26, "7b": 32}
ONE_GPU = ["open-llama-3b-qlora", "open-llama-7b-lora"]
EIGHT_GPUS = ["open-llama-3b", "open-llama-7b"]


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the real depth, a stand-in for RedPajama's files, and the recipes over them."""
    folder = tmp_path_factory.mktemp("shipped")
    for name, layers in LAYERS.items():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
                             num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for number, (name, meta) in enumerate(FILES.items()):
        rows = [{"text": f"{name} {row} {chr(97 + number) * 7} " * 30, "meta": meta} for row in range(40)]
        (folder / "data" / f"{name}_sample.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name in (*ONE_GPU, *EIGHT_GPUS):
        recipe = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
        assert all(source["path"].startswith(REDPAJAMA) for source in recipe["sources"])
        recipe["sources"] = [source | {"path": source["path"].replace(REDPAJAMA, f"{folder}/data/"), "min_tokens": 99}
                             for source in recipe["sources"]]  # fmt: skip
        recipe["memory"] |= {"local_context": WINDOW, "last_context_length": WINDOW // 2}
        recipe |= {"model": str(folder / ("3b" if "3b" in name else "7b"))}
        recipe |= {
            "steps": 2,
            "save_every": 1,
            "warmup_steps": 1,
            "accumulation": 1 if name in ONE_GPU else min(recipe.get("accumulation", 1), 2),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("name", ONE_GPU)
def test_on_one_gpu(name: str, folder: Path, tmp_path: Path) -> None:
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    recipe = yaml.safe_load((folder / f"{name}.yaml").read_text())
    assert train(folder / f"{name}.yaml", tmp_path / "out") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    tokens = recipe["lanes"] * recipe["windows"] * recipe["accumulation"] * WINDOW
    assert {line["tokens"] for line in lines} == {tokens}
    assert fot.FoTForCausalLM.from_pretrained(tmp_path / "out" / "adapter").memory_config.layers


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("name", EIGHT_GPUS)
def test_sharded_by_fsdp(name: str, processes: int, folder: Path, tmp_path: Path) -> None:
    """4 lanes a process, as on 8 GPUs; then the second step once more, from the first one's checkpoint."""

    def run(out: str, *arguments: str) -> None:
        command = ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_machines", "1",
                   "--num_processes", str(processes), "--mixed_precision", "bf16", "--dynamo_backend", "no",
                   str(TESTS / "sharded_run.py"), "train", str(folder / f"{name}.yaml"), "--out",
                   str(tmp_path / out), *arguments]  # fmt: skip
        done = subprocess.run([sys.executable, "-m", *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                              capture_output=True, check=False, timeout=1200)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]

    run("out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(n, 16 * WINDOW * processes) for n in (1, 2)]
    assert load_file(tmp_path / "out/model/model.safetensors").keys() >= {"model.embed_tokens.weight"}
    shutil.copytree(tmp_path / "out", tmp_path / "parts")
    for later in ("checkpoints/step-0000002", "model"):
        shutil.rmtree(tmp_path / "parts" / later)
    run("parts", "--resume")
    assert losses(tmp_path / "parts") == losses(tmp_path / "out")
