"""How a run was started: accelerate starts one process, and says nothing, where several were meant."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil


def lone_process() -> str | None:
    """Words for a lone process that ``accelerate launch`` was to make one of several; None if all is as meant."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return None
    wanted = asked_processes(_launching_command())
    if wanted is None or wanted < 2:
        return None
    return (
        f"accelerate was asked for {wanted} processes but started only one, because there is no GPU. To run {wanted} "
        f"processes on CPUs, use: torchrun --nproc_per_node {wanted} -m fot train ..."
    )


def asked_processes(command: Sequence[str]) -> int | None:
    """The number of processes in an ``accelerate launch`` command, or in the configuration that it reads."""
    settings: dict[str, str] = {}
    for number, part in enumerate(command):
        name, separator, value = part.partition("=")
        name = name.lstrip("-").replace("_", "-") if part.startswith("--") else ""
        if name in ("num-processes", "config-file"):
            settings[name] = value if separator else "".join(command[number + 1 : number + 2])
    count = settings.get("num-processes") or _configured(settings.get("config-file"))
    return int(count) if count and str(count).isdigit() else None


def _configured(file: str | None) -> str | None:
    from accelerate.commands.config.config_args import default_config_file

    path = Path(file or default_config_file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("num_processes:")), None)


def _launching_command() -> list[str]:
    """The command line of the process that started this one."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []
