"""What a step frees is kept for the next one."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory; no other C library is touched.

    By itself it gives large blocks, such as a batch's activations, back to the system as soon as they are free, and
    every step gets them anew, page by page and zeroed: 3 to 16 % of a training step on the CPU, and up to 40 % of a
    forecast (docs/performance.md). The process then stays as large as it was at its largest.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def mallopt(parameter: int, value: int) -> None:
    ctypes.CDLL(None).mallopt(parameter, value)
