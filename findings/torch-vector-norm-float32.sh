#!/usr/bin/env bash
# torch 2.14.1, CPU: vector_norm of a float32 tensor is as far off as eight running sums in
# float32 are, where sum() of the same squares is right to the last digit.
#
# Of 2.4 million values the norm is off by 3e-5 of itself, 500 times the rounding of float32,
# while square().sum().sqrt() and a norm of norms by rows are off by less than 1e-7. The same
# with the kernels for AVX2, AVX-512 and neither (ATEN_CPU_CAPABILITY), with 1 and 2 threads.
# clip_grad_norm_ and whatever else compares norms of large tensors has this error.
#
# Seen 2026-11-28, relative errors against float64:
#   vector_norm 3.0e-05, square().sum().sqrt() 1.3e-08, by rows 5.5e-08
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
import numpy
import torch

values = torch.from_numpy(numpy.random.default_rng(0).random(2_400_000, dtype=numpy.float32))
right = values.double().square().sum().sqrt().item()
off = {
    "vector_norm": torch.linalg.vector_norm(values),
    "square().sum().sqrt()": values.square().sum().sqrt(),
    "by rows": torch.linalg.vector_norm(torch.linalg.vector_norm(values.view(1200, 2000), dim=1)),
}
off = {name: abs(norm.item() - right) / right for name, norm in off.items()}
print(", ".join(f"{name} {error:.1e}" for name, error in off.items()))
assert off["vector_norm"] > 1e-5
assert off["square().sum().sqrt()"] < 2e-7
assert off["by rows"] < 2e-7
PY
