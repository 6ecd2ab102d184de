"""The C library's allocator, set for training on a CPU."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed (mallopt(3)), and take blocks of up to 32 MB from what it keeps.

    Every step frees its activations and allocates them again. By default glibc gives the memory back in between, and
    the kernel clears it page by page anew: about a tenth of a ResNet-50 step on two CPU cores. Does nothing elsewhere.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
