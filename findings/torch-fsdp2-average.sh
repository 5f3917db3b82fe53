#!/usr/bin/env bash
# torch 2.14.1, timm 1.0.31: neither torch's AveragedModel nor timm's ModelEmaV3 can average the
# weights of a model under FSDP2 (`fully_shard`).
#
# Both copy the model with copy.deepcopy, which an FSDP2 module refuses. Copied before it is
# sharded, the average is whole on every rank, and its update meets sharded weights.
#
# Seen 2026-11-29:
#   AveragedModel: AssertionError: FSDP does not support deepcopy. Please use state dict for serialization.
#   ModelEmaV3: AssertionError: FSDP does not support deepcopy. Please use state dict for serialization.
#   AveragedModel, copied before: RuntimeError: aten.copy_.default got mixed torch.Tensor and DTensor, ...
#   ModelEmaV3, copied before: RuntimeError: aten._foreach_lerp_.Scalar got mixed torch.Tensor and DTensor, ...
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 timm==1.0.31 numpy==2.4.6
fi

cat >case.py <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def rank(index, world, meeting):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    kinds = (("AveragedModel", AveragedModel, "update_parameters"), ("ModelEmaV3", ModelEmaV3, "update"))
    found = []
    for before in (False, True):
        for name, kind, update in kinds:
            model = make()
            try:
                average = kind(model) if before else None
                fully_shard(model, mesh=mesh)
                average = average or kind(model)
                for _ in range(2):  # the first one of AveragedModel copies
                    getattr(average, update)(model)
                said = "works"
            except (AssertionError, RuntimeError, NotImplementedError, ValueError) as error:
                said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            found.append(said)
            if index == 0:
                print(f"{name}{', copied before' if before else ''}: {said}")
    assert "works" not in found, found
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # destroy_process_group sometimes ends a gloo rank with SIGABRT


if __name__ == "__main__":
    mp.spawn(rank, (2, f"file://{sys.argv[1]}/meeting"), 2)
PY
"$python" case.py "$work"
