"""What the kernel says of this process in /proc: its command line and its environment.

`ps`, `bigbatch runs` and `bigbatch cancel` find the processes of a run by them, so a fork must have
those of what it runs (PR_SET_MM_MAP, prctl(2); Linux with CONFIG_CHECKPOINT_RESTORE, as
distributions have it; no privilege).
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Mapping, Sequence

_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_shown: list[mmap.mmap] = []  # the kernel reads it as long as this process lives


def show(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Put these in the place of what this process was started with. Raises OSError."""
    words = b"".join(os.fsencode(word) + b"\0" for word in command)
    pairs = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    block = mmap.mmap(-1, len(words) + len(pairs), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(words + pairs)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    middle = start + len(words)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    code, data, heap, stack = (
        [int(fields[number - 3]) for number in numbers]  # proc_pid_stat(5) counts from 1
        for numbers in ((26, 27), (45, 46), (47,), (28,))
    )
    places = (*code, *data, *heap, libc.sbrk(0), *stack, start, middle, middle, middle + len(pairs))
    layout = struct.pack("=12QIi", *places, 0, 0, -1)  # no auxiliary vector, no other program
    if libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, _address(layout), len(layout), 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _shown[:] = [block]


def _address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
