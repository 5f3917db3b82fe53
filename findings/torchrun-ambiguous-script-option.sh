#!/usr/bin/env bash
# torch 2.14.1: torchrun refuses an option of the training script that begins like two of its
# own, though it stands behind the script's name.
#
# `torchrun train.py --run x` and `torchrun train.py --log x` end with status 2 and "ambiguous
# option", since argparse looks at every argument for abbreviations before it gives the rest of
# the line to the script (so do Python 3.11.7, 3.12.1 and 3.13.0). `--name x` arrives, and so does
# `--run x` behind a `--`.
#
# Seen 2026-11-28:
#   run.py: error: ambiguous option: --run could match --run-path, --run_path
#   run.py: error: ambiguous option: --log could match --log-dir, --log_dir, ...
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

echo 'import sys; print("script got", sys.argv[1:])' >train.py
for option in --run --log; do
  status=0
  "$python" -m torch.distributed.run --standalone train.py $option x >said 2>&1 || status=$?
  tail -n 1 said
  test $status -eq 2
  grep -q "ambiguous option: $option could match $option" said
done
"$python" -m torch.distributed.run --standalone train.py --name x 2>&1 | tee said
grep -q "script got \['--name', 'x'\]" said
"$python" -m torch.distributed.run --standalone train.py -- --run x 2>&1 | tee said
grep -q "script got \['--run', 'x'\]" said
