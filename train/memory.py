"""How the C library deals with the memory of tensors on CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # numbers of malloc.h


def keep_freed_memory() -> bool:
    """
    Lets the GNU C library hand freed memory to the next tensor. It would give large pieces back to the kernel, which
    clears every page of them anew: a tenth of a training step on CPU, for which `docs/performance.md` has the figures.

    Returns:
        Whether this C library could be told to.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # mallopt(3): "0 disables the use of mmap(2)", "-1 disables trimming completely"
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
