"""The training loop through the command: resume, kill, several processes, results that load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from train_helpers import SMALL, losses, on_processes, write_recipe
from transformers import LlamaForCausalLM

import fot
from fot.cli import main
from training.recipe import SHIPPED, Recipe, load_recipe
from training.setup import describe_data
from training.train import learning_rate_at

TESTS = Path(__file__).parent


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml")


def test_resumed_run_has_the_losses_of_an_undisturbed_one(recipe: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", str(recipe), "--out", str(whole)]) == 0
    assert main(["train", str(recipe), "steps=3", "--out", str(parts)]) == 0
    assert main(["train", str(recipe), "steps=5", "--out", str(parts), "--resume"]) == 0
    assert main(["train", str(recipe), "--out", str(parts), "--resume"]) == 0
    assert losses(parts) == losses(whole)
    assert [step for step, _ in losses(whole)] == list(range(1, 9))
    saved = [torch.load(out / "checkpoints/step-0000008/optimizer.pt", weights_only=True) for out in (whole, parts)]
    assert saved[0]["state"].keys() == saved[1]["state"].keys()


def test_killed_run_resumes_from_its_last_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", str(recipe), "steps=24", "--out", str(whole)]) == 0
    command = ["train", str(recipe), "steps=24", "--out", str(killed)]
    process = forks.Fork("-m", "fot", *command)
    deadline = time.monotonic() + 300
    while not list((killed / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "resuming at step" in capsys.readouterr().err
    assert losses(killed) == losses(whole)


def test_result_loads_in_plain_transformers_and_with_memory(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["train", str(recipe), "steps=2", "--out", str(out)]) == 0
    LlamaForCausalLM.from_pretrained(out / "model")
    model = fot.FoTForCausalLM.from_pretrained(out / "model")
    assert model.memory_config.layers == (1,)
    assert model.memory_config.mem_positionals is False
    assert json.loads((out / "model" / "recipe.json").read_text())["seed"] == 0
    lines = [json.loads(line) for line in (out / "model" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "answer_accuracy", "token_accuracy", "tokens_per_second", "run_tokens_per_second", "d"} <= set(
        lines[0]
    )
    assert 1e7 < lines[0]["memory_bytes"] <= lines[1]["memory_bytes"]


def test_result_says_what_it_was_trained_on(tmp_path: Path, recipe: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for number, name in enumerate(["a.txt", "b.txt", "c.md"], start=1):
        (texts / name).write_text("x" * number)
    entry = {"path": str(texts), "pattern": "*.txt"}
    recipe.write_text(yaml.safe_dump(SMALL | {"steps": 1, "eval_every": 0}))
    described = describe_data(replace(load_recipe(recipe), sources=[entry], held_out=[{"path": str(texts / "c.md")}]))
    assert described["sources"][0]["files"] == {"a.txt": 1, "b.txt": 2}
    assert described["sources"][0]["bytes"] == 3
    assert described["held_out"][0]["files"] == {str(texts / "c.md"): 3}
    assert described["tasks"] == SMALL["tasks"]
    assert main(["train", str(recipe), "--out", str(out)]) == 0
    assert json.loads((out / "model" / "data.json").read_text())["tasks"] == SMALL["tasks"]


def test_memory_adapter_holds_what_was_trained_and_loads_over_its_base(tmp_path: Path, recipe: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    assert main(["train", str(recipe), "steps=1", "--out", str(base)]) == 0
    settings = SMALL | {"model": str(base / "model"), "trainable": "memory", "steps": 2}
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["train", str(recipe), "--out", str(out)]) == 0
    plain = fot.FoTForCausalLM.from_pretrained(base / "model")
    tuned = fot.FoTForCausalLM.from_pretrained(out / "adapter")
    changed = {
        name
        for (name, one), two in zip(plain.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert changed == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert tuned.memory_config == plain.memory_config
    assert tuned.fingerprint() != plain.fingerprint()


def test_best_weights_are_kept_and_may_be_the_result(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    """Trained until it breaks: the best evaluation is an early one."""
    out = tmp_path / "out"
    settings = ["train", str(recipe), "learning_rate=0.01", "eval_every=2", "save_every=3", "--out", str(out)]
    assert main([*settings, "steps=4"]) == 0
    assert main([*settings, "steps=8", "learning_rate=3", "result=best", "--resume"]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval_answer_accuracy"] for line in log if "eval_answer_accuracy" in line}
    assert list(evaluated) == [2, 4, 6, 8]
    kept = json.loads((out / "checkpoints/best/evaluation.json").read_text())
    assert kept["eval_answer_accuracy"] == max(evaluated.values())
    assert kept["step"] == min(step for step, accuracy in evaluated.items() if accuracy == max(evaluated.values()))
    assert kept["step"] < 8
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best"] == kept
    best = load_file(out / "checkpoints/best/trained.safetensors")
    result = LlamaForCausalLM.from_pretrained(out / "model").state_dict()
    final = load_file(out / "checkpoints/step-0000008/trained.safetensors")
    for name, tensor in best.items():
        assert torch.equal(result[name], tensor)
    assert any(not torch.equal(final[name], tensor) for name, tensor in best.items())


def test_best_of_steps_that_will_be_done_again_is_forgotten(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    settings = ["train", str(recipe), "eval_every=1", "save_every=4", "--out", str(out)]
    assert main([*settings, "steps=6"]) == 0
    whole = json.loads((out / "checkpoints/best/evaluation.json").read_text())
    shutil.rmtree(out / "checkpoints/step-0000006")
    (out / "checkpoints/best/evaluation.json").write_text(json.dumps({"eval_answer_accuracy": 2.0, "step": 5}))
    (out / "checkpoints/.step-0000006.123").mkdir()
    assert main([*settings, "steps=6", "--resume"]) == 0
    again = json.loads((out / "checkpoints/best/evaluation.json").read_text())
    assert again["eval_answer_accuracy"] <= whole["eval_answer_accuracy"]
    assert not (out / "checkpoints/.step-0000006.123").exists()


def test_a_finished_run_resumes_to_the_same_result(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture) -> None:
    """As after a kill between the last checkpoint and the result."""
    out = tmp_path / "out"
    assert main(["train", str(recipe), "steps=2", "--out", str(out)]) == 0
    line = json.loads(capsys.readouterr().out)
    before = load_file(out / "model" / "model.safetensors")
    assert (out / "model" / "model.safetensors").stat().st_mode == (out / "model" / "config.json").stat().st_mode
    shutil.rmtree(out / "model")
    assert main(["train", str(recipe), "steps=2", "--out", str(out), "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {key: again[key] for key in line} == line
    after = load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_strength_leaves_the_result_between_start_and_trained(tmp_path: Path, recipe: Path) -> None:
    base, whole, part = tmp_path / "base", tmp_path / "whole", tmp_path / "part"
    assert main(["train", str(recipe), "steps=1", "--out", str(base)]) == 0
    settings = [str(recipe), f"model={base / 'model'}", "trainable=memory", "steps=4"]
    assert main(["train", *settings, "--out", str(whole)]) == 0
    assert main(["train", *settings, "strength=0.75", "steps=2", "--out", str(part)]) == 0
    assert main(["train", *settings, "strength=0.75", "--out", str(part), "--resume"]) == 0
    start = load_file(base / "model" / "model.safetensors")
    full, found = (load_file(out / "adapter" / "adapter.safetensors") for out in (whole, part))
    assert losses(part) == losses(whole)
    for name, tensor in found.items():
        expected = start[name] + 0.75 * (full[name].float() - start[name])
        torch.testing.assert_close(tensor.float(), expected, atol=2e-3, rtol=1e-2)  # stored in bfloat16
    assert any((found[name] != full[name]).any() for name in found)
    assert json.loads((part / "adapter" / "recipe.json").read_text())["strength"] == 0.75


def test_lora_adapter_loads_with_peft(tmp_path: Path, recipe: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    assert main(["train", str(recipe), "steps=1", "--out", str(base)]) == 0
    recipe.write_text(yaml.safe_dump(SMALL | {"model": str(base / "model"), "trainable": "lora", "lora": {"r": 4}}))
    assert main(["train", str(recipe), "steps=2", "--out", str(out)]) == 0
    assert main(["train", str(recipe), "steps=3", "--out", str(out), "--resume"]) == 0
    plain = LlamaForCausalLM.from_pretrained(base / "model")
    before = plain(torch.tensor([[5, 6, 7]])).logits
    tuned = PeftModel.from_pretrained(plain, out / "adapter")
    assert tuned.peft_config["default"].r == 4
    assert (tuned(torch.tensor([[5, 6, 7]])).logits - before).abs().max() > 1e-6
    merged = fot.attach_memory(tuned.merge_and_unload(), fot.MemoryConfig(mem_layers=(1,), local_context=40))
    assert list(merged.state_dict()) == list(LlamaForCausalLM.from_pretrained(base / "model").state_dict())


def test_saving_a_lora_asks_no_hub_for_a_name_of_ours(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda name, file: asked.append(name))
    recipe.write_text(yaml.safe_dump(SMALL | {"model": "dictionary-fot", "trainable": "lora", "lora": {"r": 2}}))
    assert main(["train", str(recipe), "steps=1", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert asked == []


def test_adafactor_and_accumulation(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["optimizer=adafactor", "accumulation=2", "lr_schedule=cosine", "warmup_steps=2", "checkpointing=true",
                "steps=20", "lanes=8", "learning_rate=0.3"]  # fmt: skip
    assert main(["train", str(recipe), *settings, "--out", str(out)]) == 0
    found = [loss for _, loss in losses(out)]
    # to ln(60): which symbols are values is learnt, which value goes with a key is not, so soon
    assert sum(found[-4:]) / 4 < found[0] - 0.02


def test_max_hours_ends_with_a_checkpoint_and_a_result(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    settings = ["steps=100000", "lr_schedule=cosine", "--max-hours", "0.0001"]
    assert main(["train", str(recipe), *settings, "--out", str(out)]) == 0
    assert "of 100,000, with the learning rate still at 100% of its highest" in capsys.readouterr().err
    assert len(losses(out)) < 1000
    assert (out / "model" / "model.safetensors").exists()
    assert list((out / "checkpoints").glob("step-*"))


def test_loss_that_is_not_finite_names_the_batch(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from training import step

    real = step.token_losses
    monkeypatch.setattr(step, "token_losses", lambda *args: (real(*args)[0] * float("nan"), real(*args)[1]))
    assert main(["train", str(recipe), "eval_every=0", "--out", str(tmp_path / "out")]) == 2
    assert "the loss is nan at step 1, batch 1, documents [" in capsys.readouterr().err


def launch(processes: int, *arguments: str | Path) -> None:
    """accelerate launch, on the CPU."""
    command = ["accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    # accelerate starts several processes under this name alone; without a GPU they talk through gloo.
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command, *arguments], env=environment, capture_output=True,
                          text=True, check=False, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_several_processes_end_after_their_result(recipe: Path, tmp_path: Path) -> None:
    """Twenty times, as a gloo group's end hung now and then."""
    outs = [tmp_path / str(number) for number in range(20)]
    on_processes(2, recipe, tmp_path / "started", "steps=2")
    for out in outs:
        forks.run_ranks(2, "-m", "fot", "train", recipe, "steps=2", "--out", out)
    assert all((out / "model/model.safetensors").exists() for out in (*outs, tmp_path / "started"))


@pytest.mark.slow
@pytest.mark.parametrize("begun", [1, 2])
def test_sharded_run_equals_one_with_whole_parameters(begun: int, tmp_path: Path) -> None:
    """FSDP over two processes, going on from a checkpoint of one or of DDP over two: losses, checkpoints, result."""
    recipe, sharded, whole = tmp_path / "recipe.yaml", tmp_path / "sharded", tmp_path / "whole"
    model = SMALL["model"] | {"tie_word_embeddings": True}
    changes = {"model": model, "lanes": 4 // begun, "steps": 4, "clip": 0.5, "focus": 0.5}
    recipe.write_text(yaml.safe_dump(SMALL | changes))
    launch(begun, "-m", "fot", "train", recipe, "--out", whole)
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4], "one process writes the log"
    shutil.copytree(whole, sharded)
    for past in ("checkpoints/step-0000004", "model"):
        shutil.rmtree(sharded / past)
    launch(2, TESTS / "sharded_run.py", "train", recipe, "--out", sharded, "--resume")
    assert [loss for _, loss in losses(sharded)] == pytest.approx([loss for _, loss in losses(whole)], abs=1e-5)
    for file in ("checkpoints/step-0000004/trained.safetensors", "model/model.safetensors"):
        one, two = (load_file(out / file) for out in (sharded, whole))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
    LlamaForCausalLM.from_pretrained(sharded / "model")


def test_sharding_that_would_not_be_done_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "accelerate does not shard on cpu" in capsys.readouterr().err
    example = yaml.safe_load((TESTS.parent / "examples" / "fsdp.yaml").read_text())
    assert example["distributed_type"] == "FSDP"
    assert example["fsdp_config"]["fsdp_version"] == 2, "the only one that is supported"


@pytest.mark.parametrize("engine", ["DeepSpeed", "Megatron-LM"])
def test_engines_that_are_not_supported_are_refused_by_name(
    engine: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Before accelerate says that they are not installed."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper().replace('-', '_')}", "true")
    assert main(["train", str(recipe), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"told to use {engine}, which fot train does not support: shard with FSDP instead" in said[0]
    assert not (tmp_path / "out").exists()


def test_tensorboard_shows_the_logs_numbers(recipe: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    assert main(["train", str(recipe), "steps=3", "tensorboard=true", "--out", str(out)]) == 0
    assert main(["train", str(recipe), "tensorboard=true", "--out", str(out), "--resume"]) == 0
    found = events.EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"loss", "answer_accuracy", "d", "tokens_per_second", "eval_answer_accuracy"} <= set(found.Tags()["scalars"])
    shown = [(event.step, event.value) for event in found.Scalars("loss")]
    assert [step for step, _ in shown] == list(range(1, 9))
    assert [value for _, value in shown] == pytest.approx([loss for _, loss in losses(out)])


def test_tensorboard_that_is_missing_is_named_before_the_work(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", str(recipe), "tensorboard=true", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'fot[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["train", str(recipe), "steps=1", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_learning_rates() -> None:
    def at(step: int, **settings: Any) -> float:
        return learning_rate_at(Recipe(tasks=[{"kind": "dictionary"}], learning_rate=1.0, steps=100, **settings), step)

    assert [at(step, warmup_steps=4) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert at(0, lr_schedule="cosine") == 1.0
    assert at(50, lr_schedule="cosine") == pytest.approx(0.505)
    assert at(99, lr_schedule="cosine") < 0.02
    assert at(15, lr_schedule="inverse_sqrt", warmup_steps=4) == 0.5


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.memory_config().mem_layers or recipe.length
    assert recipe.schedule()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps is 0"),
        ("steps=many", "steps is 'many'; it must be a whole number"),
        ("clip=much", "clip is 'much'; it must be a number"),
        ("nonsense=1", "unknown entry 'nonsense'"),
        ("contexts.kind=maybe", "kind is 'maybe'"),
        ("result=some", "result is 'some'"),
        ("trainable=some", "trainable is 'some'"),
        ("memory.mem_layers=[9]", "memory layer 9 is out of range"),
        ("tasks=[]", "nothing to train on"),
        ("strength=1.5", "strength is 1.5"),
        ("strength=0.5", "needs a model with initial weights"),
        ("noequals", "not of the form key=value"),
    ],
)
def test_bad_recipes(override: str, message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(recipe), override, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_hold_another_run_or_none(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["train", str(recipe), "steps=2", "--out", str(out), "--resume"]) == 0
    assert "holds no checkpoint to resume from: starting from the beginning" in capsys.readouterr().err
    assert main(["train", str(recipe), "steps=2", "--out", str(out)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "nosuch", "--out", str(out)]) == 2
    assert "no recipe 'nosuch'" in capsys.readouterr().err
