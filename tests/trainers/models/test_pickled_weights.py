"""Weights from elsewhere are data: a pickle that would run something runs nothing."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.trainers.models.build import build_model


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
def test_a_pickle_that_runs_something_is_refused(tmp_path: Path, suffix: str) -> None:
    canary, weights = tmp_path / "canary", tmp_path / f"weights.{suffix}"
    weights.write_bytes(pickle.dumps({"state_dict": Payload(canary)}))
    model = Model(name="resnet10t", pretrained=True, checkpoint=str(weights))
    with pytest.raises(UserError, match=r"cannot build resnet10t|is damaged"):
        build_model(model, classes=10, channels=3, seed=0)
    assert not canary.exists()
    pickle.loads(weights.read_bytes())  # what the refusal kept from happening
    assert canary.exists()
