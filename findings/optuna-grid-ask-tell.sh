#!/usr/bin/env bash
# optuna 5.0.0: with GridSampler, telling the result of the last grid point raises, and the result
# is stored all the same.
#
# The sampler calls study.stop() after the last point, which only optimize() may do. So a loop of
# ask() and tell() that covers the grid exactly ends in a RuntimeError, though the trial is
# COMPLETE with its value.
#
# Seen 2026-11-28:
#   point 2 of 2: RuntimeError: `Study.stop` is supposed to be invoked inside an objective
#   function or a callback.
#   state of the trial: COMPLETE, value 1.0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet optuna==5.0.0 numpy==2.4.6
fi

"$python" - <<'PY'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1, 2]}, seed=0))
raised = []
for point in (1, 2):
    trial = study.ask()
    value = float(trial.suggest_int("x", 1, 2))
    try:
        study.tell(trial, value)
    except RuntimeError as error:
        raised.append(point)
        print(f"point {point} of 2: RuntimeError: {error}")
        assert "Study.stop" in str(error)
last = study.trials[-1]
print(f"state of the trial: {last.state.name}, value {last.value}")
assert raised == [2]
assert last.state.name == "COMPLETE"
assert last.value == value
assert sorted(t.value for t in study.trials) == [1.0, 2.0]
PY
