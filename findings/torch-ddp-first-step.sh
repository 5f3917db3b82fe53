#!/usr/bin/env bash
# torch 2.14.1, gloo: on three ranks, DistributedDataParallel's first step sums the same
# gradients to other bits than every later step does.
#
# The first backward pass uses buckets in the order of the parameters; after it they are built
# anew in the order in which gradients became ready. A gradient then lies elsewhere in its
# bucket, another rank begins its sum, and float32 sums of three terms depend on the order (two
# terms do not). The same samples, weights and seeds give step 1 other gradients than step 2: a
# run that is resumed starts with a "first" step, and is no longer bit for bit the same.
#
# Seen 2026-11-28:
#   2 ranks: step 2 as step 1: True,  step 3 as step 2: True, step 4 as step 2: True
#   3 ranks: step 2 as step 1: False, step 3 as step 2: True, step 4 as step 2: True
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
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(index, world, meeting):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=world)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 512), torch.nn.Linear(512, 512), torch.nn.Linear(512, 10)]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    torch.manual_seed(index + 1)
    samples, steps = torch.randn(32, 64), []
    for _ in range(4):  # no optimizer: the weights stay the same
        model.zero_grad()
        model(samples).square().mean().backward()
        steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    same = [torch.equal(steps[a], steps[b]) for a, b in ((0, 1), (1, 2), (1, 3))]
    if index == 0:
        print(f"{world} ranks: step 2 as step 1, 3 as 2, 4 as 2: {same}")
    assert same == [world == 2, True, True], same
    assert torch.allclose(steps[0], steps[1], rtol=1e-4, atol=1e-6)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # destroy_process_group sometimes ends a gloo rank with SIGABRT


if __name__ == "__main__":
    for world in (2, 3):
        mp.spawn(rank, (world, f"file://{sys.argv[1]}/meeting{world}"), world)
PY
"$python" case.py "$work"
