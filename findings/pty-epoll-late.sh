#!/usr/bin/env bash
# Linux 6.18, Python 3.11: epoll says that a pseudo-terminal has nothing to read, poll at the same
# moment that it has.
#
# What is written to a terminal's end goes through a buffer that a thread of the kernel empties
# (tty_buffer.c). poll(2) asks the terminal anew at each call, which empties that buffer first
# (n_tty_poll). epoll asks once, when a descriptor is added, and then waits for the terminal to call
# it, which that thread does later. Python's DefaultSelector and asyncio are epoll. A program that
# copies a child's terminal, is told by another channel that the child has ended, and takes what
# epoll calls ready then for all there is, loses the child's last words, and only on a busy machine.
# A pipe has no such buffer: both see it at once.
#
# Seen 2026-11-30, of 4,000 writes each looked for at once:
#   terminal: epoll missed some (300 to 1,500 on two cores), poll none
#   pipe:     epoll missed none, poll none
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-python3}

cat >case.py <<'PY'
import os
import pty
import select
import tty


def missed(open_pair):
    """How many of 4,000 bytes epoll and poll do not see right after they were written."""
    by_epoll = by_poll = 0
    for _ in range(4000):
        reader, writer = open_pair()
        epoll, poll = select.epoll(), select.poll()
        epoll.register(reader, select.EPOLLIN)
        poll.register(reader, select.POLLIN)
        os.write(writer, b"x")
        by_epoll += not epoll.poll(0)
        by_poll += not poll.poll(0)
        assert os.read(reader, 1) == b"x"
        epoll.close()
        os.close(reader)
        os.close(writer)
    return by_epoll, by_poll


def terminal():
    pair = pty.openpty()
    tty.setraw(pair[1])
    return pair


by_epoll, by_poll = missed(terminal)
assert by_epoll > 0 and by_poll == 0, (by_epoll, by_poll)
print(f"terminal: epoll missed some ({by_epoll:,} of 4,000), poll none")
assert missed(os.pipe) == (0, 0)
print("pipe:     epoll missed none, poll none")
PY
"$python" case.py
