#!/usr/bin/env bash
# wandb 0.31.0, offline: rows that were logged 10 s ago are not in the run's file, and a kill of
# the process tree loses them.
#
# The separate wandb-core process holds back what does not fill a block of 32 KiB, for as long as
# the run is open. 20 rows, and 10 s later the file still has 7 bytes (its header); when the
# kernel or a scheduler then kills the job with its children, that is what stays. The last row that
# log() accepted is no place to resume from. (Where wandb-core survives its client, it sometimes
# writes the rest and sometimes does not.)
#
# Seen 2026-11-28:
#   10 s after 20 rows: file of 7 bytes
#   killed: file of 7 bytes
#   finished instead: file of 5904 bytes
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

cat >case.py <<'PY'
import os
import signal
import sys
import time
from pathlib import Path

import wandb

run = wandb.init(project="case", id=sys.argv[1], settings=wandb.Settings(console="off"))
for row in range(20):
    run.log({"loss": float(row)})
if sys.argv[1] == "killed":
    time.sleep(10)
    (file,) = Path("wandb").glob("offline-run-*/run-killed.wandb")
    print(f"10 s after 20 rows: file of {file.stat().st_size} bytes", flush=True)
    for thread in Path("/proc/self/task").iterdir():
        for child in (thread / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
run.finish()
PY
export WANDB_MODE=offline WANDB_SILENT=true WANDB_ERROR_REPORTING=false
export WANDB_X_DISABLE_STATS=true
"$python" case.py killed || test $? -eq 137
"$python" case.py finished
killed=$(stat -c %s wandb/offline-run-*-killed/run-killed.wandb)
finished=$(stat -c %s wandb/offline-run-*-finished/run-finished.wandb)
echo "killed: file of $killed bytes"
echo "finished instead: file of $finished bytes"
test "$killed" -eq 7
test "$finished" -gt 3000
