"""How this process keeps its memory."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES = 1 << 30
_HEAP_BYTES = 32 << 20  # the most that every glibc takes


def keep_freed_memory() -> None:
    """Makes the C library reuse freed blocks of up to 32 MiB instead of handing them back to the system.

    A training step on a CPU allocates the same megabytes again and again, and the system would zero every page of them
    anew each time. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _HEAP_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
