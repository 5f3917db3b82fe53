#!/usr/bin/env bash
# wandb 0.31.0, offline: a run that is started by a program that uses wandb as well, in another
# folder, loses all that it logs if `dir` is relative.
#
# The first process leaves WANDB_SERVICE in its environment, and children join that one's
# wandb-core. Paths of a run go to it as they are, relative ones included, and it looks for them
# in its own folder. The child makes the run's folder, init, log and finish succeed, sync_dir
# names the folder, and no .wandb file is written anywhere. With an absolute `dir` it is.
#
# Seen 2026-11-30:
#   relative dir: 0 files of the run
#   absolute dir: 1 file of the run
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet wandb==0.31.0
fi

mkdir parent child
cat >child/child.py <<'PY'
import os
import sys

import wandb

folder = "." if sys.argv[1] == "relative" else os.getcwd()
run = wandb.init(project="findings", dir=folder, id=sys.argv[1])
run.log({"loss": 1.0})
run.finish()
PY
cat >parent/parent.py <<'PY'
import subprocess
import sys
from pathlib import Path

import wandb

wandb.setup()
root = Path(sys.argv[1])
for kind, expected in (("relative", 0), ("absolute", 1)):
    command = [sys.executable, "child.py", kind]
    subprocess.run(command, cwd=root / "child", check=True, capture_output=True)
    found = len(list(root.rglob(f"run-{kind}.wandb")))
    print(f"{kind} dir: {found} {'file' if found == 1 else 'files'} of the run")
    assert found == expected, found
PY
cd parent
WANDB_MODE=offline WANDB_SILENT=true "$python" parent.py "$work"
