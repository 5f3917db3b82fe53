#!/usr/bin/env bash
# torch 2.14, Linux: a process with two threads takes two whole cores although one of its threads
# has nothing to do for nine tenths of the time.
#
# torch's wheels bring libgomp, whose threads wait for the next operation by spinning for
# milliseconds before they sleep (libgomp's manual, "GOMP_SPINCOUNT"). A training loop that spends 2
# ms in Python after each operation therefore keeps its second core at work with nothing, and what
# decodes images there has to share it. OMP_WAIT_POLICY=passive, set before torch is imported,
# halves the CPU time of this program, with the same results.
#
# Seen 2026-11-30, CPU seconds of the process for each second of its main thread, two threads:
#   as it comes: more than 1.6
#   passive:     less than 1.4
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
fi

cat >case.py <<'PY'
import sys
import time

import torch

torch.set_num_threads(2)
values = torch.ones(200_000)
values.add_(1)  # the threads start
process, main = time.process_time(), time.thread_time()
for _ in range(300):
    values.add_(1)  # a fraction of a millisecond, on both threads
    end = time.thread_time() + 0.002
    while time.thread_time() < end:  # Python's share of a step
        pass
share = (time.process_time() - process) / (time.thread_time() - main)
assert values[0] == 302
if sys.argv[1] == "passive":
    print("passive:     less than 1.4")
    assert share < 1.4, share
else:
    print("as it comes: more than 1.6")
    assert share > 1.6, share
PY
env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT "$python" case.py default
env -u GOMP_SPINCOUNT OMP_WAIT_POLICY=passive "$python" case.py passive
