"""What this machine has, and what the process has used of it."""

import platform
from pathlib import Path
from typing import Any

import psutil
import torch


def peak_rss_bytes() -> int:
    """Most memory that this process has held at once, in bytes."""
    try:  # Linux: getrusage would count what held this process's place before it, and never less
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # other systems count in KiB


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held at once, in bytes: of the GPU by tensors, or else of the machine by this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def default_dtype(device: torch.device) -> torch.dtype:
    """The faster of float32 and a 16-bit type on this device.

    On CPUs it depends on the maker, too. With AVX-512 BF16 and no AMX, a linear layer on two cores was measured at 147
    GFLOP/s in bfloat16 and 250 in float32 on an Intel Xeon, at 390 and 90 on an AMD EPYC. That AMX turns Intel's round
    is expected, and not measured here.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        amd = _processor().startswith("AMD") and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if amd or torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.float32


def find_device(name: str | None) -> torch.device:
    """The device of this name; without one, the first GPU if there is one, else the CPU.

    Raises:
        ValueError: a device that torch does not know or this machine does not have.
    """
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is not a device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"{name} is not available: torch {torch.__version__} finds {gpus} CUDA devices; use cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # this torch is built without it; meta
        raise ValueError(f"torch {torch.__version__} cannot compute on {name} on this machine: use cpu") from error
    return device


def describe_machine() -> dict[str, Any]:
    """Hardware and versions, to stand beside measurements."""
    import faiss
    import transformers

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "faiss": faiss.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
