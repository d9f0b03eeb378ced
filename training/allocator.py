"""What training on a CPU asks of the memory allocator."""

import ctypes

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGEST_INT = 2**31 - 1
_TOP_PAD = 256 * 2**20  # bytes that the heap grows by at least
# Kept, blocks from this size on leave holes that others do not fit into: a third of a gigabyte for each layer of
# OpenLLaMA 3B.
_LARGE = 16 * 2**20


def keep_freed_memory(device_type: str, *, large: bool = True) -> bool:
    """Let the allocator keep what is freed, for the next step, instead of giving it back to the kernel.

    A step on a CPU frees and allocates the same activations, hundreds of megabytes, again and again, and each time the
    kernel must find and clear their pages. With this, the process keeps its peak of memory to its end, and more where
    sizes vary: for training, not for memories that come and go. Only glibc's allocator has these settings.
    ``benchmarks/training_step.py`` measures it.

    Args:
        device_type: what is trained on, ``cpu`` or ``cuda``.
        large: whether to keep blocks of 16 MiB and more, too. That saves time and costs memory.

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
    own_mapping = (_M_MMAP_MAX, 0) if large else (_M_MMAP_THRESHOLD, _LARGE)
    settings = (own_mapping, (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
