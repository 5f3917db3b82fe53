#!/usr/bin/env bash
# torch 2.14: building the first optimizer of a process, even plain SGD, imports the compiler:
# torch._dynamo, with torch.distributed.tensor and sympy, and triton where it is installed. Some
# 900 modules, two CPU seconds and 150 MB, in a program that compiles nothing.
#
# `Optimizer.add_param_group` stands behind `torch._disable_dynamo`, whose first call imports it.
# Every rank of a job pays, and none of it shows in the time of `import torch`.
#
# Seen 2026-11-29:
#   import torch: torch._dynamo False, sympy False
#   torch.optim.SGD([weight]): torch._dynamo True, sympy True, more than 500 modules more
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

"$python" - <<'PY'
import sys

import torch


def loaded() -> tuple[bool, bool]:
    found = ("torch._dynamo" in sys.modules, "sympy" in sys.modules)
    print("torch._dynamo {}, sympy {}".format(*found), end="")
    return found


print("import torch: ", end="")
assert loaded() == (False, False)
before = len(sys.modules)
weight = torch.nn.Parameter(torch.zeros(2))
torch.optim.SGD([weight], lr=0.1)
print("\ntorch.optim.SGD([weight]): ", end="")
assert loaded() == (True, True)
more = len(sys.modules) - before
assert more > 500, more
print(", more than 500 modules more")
PY
