"""The centres of a loss: their gradients, and that they are in checkpoints and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.load import load_recipe
from bigbatch.configs.losses import Loss
from bigbatch.configs.rundir import create_run
from bigbatch.trainers import worker
from bigbatch.trainers.losses.build import build_objective
from bigbatch.trainers.losses.centres import remove_centres
from bigbatch.trainers.losses.priors import ClassCounts
from bigbatch.trainers.optim.groups import named_parameters
from bigbatch.trainers.recovery.tensor_files import load_weights

CENTRES = "fc.loss_centres.weight"
CONFIG: Any = TypeAdapter(Loss).validate_python({"name": "center", "weight": 0.1})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(64, 6), nn.Linear(6, 10)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        out: Tensor = self.fc(torch.tanh(self.body(x)))
        return out


def test_value_and_gradients_are_those_of_the_equation() -> None:
    net = Net().double()
    objective = build_objective(CONFIG, net, ClassCounts("abcdefghij", [1] * 10))
    centres = dict(net.named_parameters())[CENTRES]
    assert [n for n, _, plain in named_parameters(net) if plain] == [
        "body.bias",
        "fc.bias",
        CENTRES,
    ]
    with torch.no_grad():
        centres.normal_()
    x, labels = torch.randn(12, 1, 8, 8).double(), torch.arange(12) % 10
    features = torch.tanh(net.body(x.flatten(1)))
    own = 0.1 / 2 * ((features - centres.detach()[labels]) ** 2).sum(1).mean()
    expected = F.cross_entropy(net.fc(features), labels) + own
    weights = [net.body.weight, net.fc.weight]
    slopes = torch.autograd.grad(expected, weights)
    loss = objective(net, x, torch.eye(10).double()[labels])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    *found, moved = torch.autograd.grad(loss, [*weights, centres])
    torch.testing.assert_close(found, list(slopes))
    by_hand = torch.zeros_like(centres)
    for feature, label in zip(features.detach(), labels.tolist(), strict=True):
        by_hand[label] += 0.5 * (centres.detach()[label] - feature) / 12
    torch.testing.assert_close(moved, by_hand)
    remove_centres(net)
    assert CENTRES not in dict(net.named_parameters())
    assert net(x).shape == (12, 10)


@pytest.mark.usefixtures("no_plots")
def test_a_run_keeps_them_in_checkpoints_alone(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbatch.trainers.job.build_model", lambda *_, **__: Net())
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])
    settings = [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", "duration=4 steps"),
        *("global_batch=32", "micro_batch=32", "schedule={name: constant}", "data.test=null"),
        *("optimizer={name: sgd, lr: 0.1}", "clip=null", "evaluate.every=4 steps"),
        *("checkpoint={every: 2 steps, keep: 9}", "augment.mixup=0", "loss={name: center}"),
        "average={name: swa, start: 1 steps, every: 1 steps}",
    ]
    ends = []
    for name, parts in (("whole", [()]), ("parts", [("--stop-at", "2"), ()])):
        run = create_run(tmp_path / name, load_recipe("digits", settings))
        for options in parts:
            assert worker.main([str(run.path), *options]) == 0
        ends.append(load_file(run.checkpoints / "step-00000004" / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys() == {*Net().state_dict(), CENTRES}
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert ends[0][CENTRES].abs().sum() > 0
    kept = [*run.snapshots.glob("*/*.safetensors"), *run.ensemble.glob("*.safetensors")]
    assert len(kept) >= 2
    for path in kept:
        assert load_file(path).keys() == Net().state_dict().keys()
    net = Net()  # as who uses the checkpoint builds it
    load_weights(net, run.checkpoints / "step-00000004" / "model.safetensors")
    assert torch.equal(net.fc.weight, ends[0]["fc.weight"])
