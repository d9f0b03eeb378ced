"""What training on a CPU asks of the memory allocator."""

import ctypes

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_INT = 2**31 - 1
_TOP_PAD = 256 * 2**20  # bytes that the heap grows by at least
# Blocks from this size on go back to the kernel: what is computed with so many numbers takes far longer than their
# pages. Kept, they leave holes that others do not fit into: a third of a gigabyte for each layer of OpenLLaMA 3B.
_LARGE = 16 * 2**20


def keep_freed_memory(device_type: str) -> bool:
    """Let the allocator keep freed blocks below 16 MiB, for the next step, instead of giving them back to the kernel.

    A step on a CPU frees and allocates the same activations, hundreds of megabytes, again and again, and each time the
    kernel must find and clear their pages. With this, the process keeps its peak of memory to its end, and more where
    sizes vary: for training, not for memories that come and go. Only glibc's allocator has these settings.
    ``benchmarks/training_step.py`` measures it.

    Args:
        device_type: what is trained on, ``cpu`` or ``cuda``.

    Returns:
        whether anything was changed: on a CPU, with glibc.
    """
    if device_type != "cpu":
        return False
    try:
        libc = ctypes.CDLL(None)
    except TypeError:  # Windows
        return False
    if not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
