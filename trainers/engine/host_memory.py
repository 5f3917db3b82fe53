"""Memory of a process that computes on the CPU: what it frees is there for the next step."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 32 << 20  # bytes: glibc takes no more for the second
_THEIRS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let this process keep what it frees, in huge pages where the kernel has them.

    A step frees its activations. glibc gives the large ones back to the kernel, and the next step
    waits while as many pages are faulted in and zeroed: a tenth of its time and more, some of it
    for pages of 4 KiB instead of 2 MiB (benchmarks/host_memory.py). What is computed is the same.
    Blocks above 32 MiB still come and go, in huge pages. To be called before the first tensor is
    made. Where the environment says how to allocate, that stands; other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    # torch reads it at its first allocation (c10/core/impl/alloc_cpu.cpp). Not in os.environ, which
    # says what this process was started with.
    libc.setenv(b"THP_MEM_ALLOC_ENABLE", b"1", 0)
    if hasattr(libc, "mallopt") and not any(name in os.environ for name in _THEIRS):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
