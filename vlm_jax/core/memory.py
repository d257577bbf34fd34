"""The process's own memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_LARGEST, _LARGEST_BEFORE_2_35, _PAD = 1 << 30, 1 << 25, 1 << 26  # bytes


def reuse_freed_memory() -> None:
    """Lets glibc's malloc keep freed blocks of up to 1 GiB instead of returning them to the system.

    XLA on CPUs allocates the temporary buffer of a program at every execution. Mapped anew each time, its first use is
    a page fault for every 4 KiB, which took a third of the time of a small training step. Does nothing elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    if not mallopt(_MMAP_THRESHOLD, _LARGEST):
        mallopt(_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)
    mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1)
    mallopt(_TOP_PAD, _PAD)
