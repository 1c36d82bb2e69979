"""Memory of the host that a step frees and the next one asks for again."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
_KEPT_BYTES = 512 * 2**20
_MAPPED_BYTES = 32 * 2**20  # the most that glibc accepts, and what it comes to by itself
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let the C library keep up to 512 MiB that is free at the end of its heap.

    By itself glibc gives back what exceeds twice the largest block so far, in each backward pass,
    and the next forward pass gets it again page by page, which the system fills with zeros. Whoever
    has set its variables knows better, and other C libraries are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None or any(name in os.environ for name in _OWN):
        return
    set_option(_MMAP_THRESHOLD, _MAPPED_BYTES)
    set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
