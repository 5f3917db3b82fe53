"""`bigbatch samples --clean`: training samples on clean views, by weights that their run kept."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from bigbatch.configs.rundir import RunDir
from bigbatch.data.index import Index
from bigbatch.trainers.dynamics.clean import look_clean, step_of_weights
from bigbatch.trainers.dynamics.record import pack
from bigbatch.trainers.dynamics.rows import Rows, to_bytes
from bigbatch.trainers.dynamics.tell import Wanted, tell
from bigbatch.trainers.evaluation.evaluate import gather_in_order, labels_of
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.progress import Progress


def samples(options: argparse.Namespace, forward: Forward, index: Index) -> int:
    """Rank 0 says and writes what all ranks have found. Collective."""
    rows = clean_rows(forward, index)
    if rows is not None:
        run = RunDir(options.model[0])
        steps = [step_of_weights(member.weights.parent) for member in forward.members]
        wanted = Wanted(
            options.top,
            out=options.out,
            weights=options.weights,
            weigh=options.weigh,
            drop=options.drop,
            as_json=options.json,
        )
        tell(look_clean(run, rows, steps), wanted)
    return 0


def clean_rows(forward: Forward, index: Index) -> Rows | None:
    """Rows [M * N, 3] as samples.f16 has them, of all samples by a member after the other; on rank
    0, None elsewhere. Collective.

    Views are those of evaluations: a crop in the middle, unmixed. The loss is the cross-entropy. A
    sample that cannot be read has zeros.
    """
    engine, members, batch = forward.engine, len(forward.members), forward.batch
    found = [torch.zeros((0, members), dtype=torch.float64)]
    with Progress("looking at clean views", len(index), engine) as progress:
        for outputs in forward.outputs(index, leave_out_bad=True):
            first = outputs.number * batch
            packed = torch.zeros((min(batch, len(index) - first), members), dtype=torch.float64)
            labels = torch.from_numpy(labels_of(index, outputs.samples))
            for member, rows in enumerate(outputs.logits):
                logits = torch.from_numpy(rows)
                losses = F.cross_entropy(logits, labels, reduction="none")
                packed[outputs.samples - first, member] = pack(logits, labels, losses)
            found.append(packed)
            progress.advance(len(packed))
    packed = torch.cat(found).to(engine.device)
    ordered = gather_in_order(engine, packed, len(index), batch)
    if ordered is None:
        return None
    content = b"".join(to_bytes(column, updated=True) for column in ordered.T)
    return np.frombuffer(content, "<f2").reshape(-1, 3)
