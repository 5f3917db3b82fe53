"""Checkpoints: exact round trips, and nothing half-written or damaged is ever used."""

import json

import pytest
import torch
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.optimizers import LARS
from bigbatch.trainers import checkpoint
from bigbatch.trainers.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
)
from bigbatch.trainers.optim import build_optimizer


def make_state(seed=0, steps=0, fingerprint="abc"):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    optimizer = build_optimizer(model, LARS(name="lars", lr=1.0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    return TrainState(steps, model, optimizer, None, {"recipe_hash": fingerprint})


def step(state):
    torch.manual_seed(9)
    state.optimizer.zero_grad()
    state.model(torch.randn(6, 1, 4, 4)).square().mean().backward()
    state.optimizer.step()


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path):
    state, other = make_state(steps=3), make_state(seed=1)
    save_checkpoint(tmp_path, state, keep=2)
    load_checkpoint(list_checkpoints(tmp_path)[0], other)
    assert other.step == 3
    step(state)
    step(other)
    for a, b in zip(
        state.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept_and_killed_attempts_are_cleared(tmp_path):
    (tmp_path / "step-00000001.tmp-123").mkdir()
    state = make_state(steps=1)
    for state.step in (1, 2, 10):
        save_checkpoint(tmp_path, state, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_one_flipped_bit_is_found_and_the_older_checkpoint_is_used(tmp_path, name):
    state = make_state(steps=1)
    for state.step in (1, 2):
        save_checkpoint(tmp_path, state, keep=2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    chosen, problems = newest_valid(tmp_path)
    assert chosen == tmp_path / "step-00000001"
    assert len(problems) == 1
    assert str(path) in problems[0]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.MANIFEST])
def test_a_missing_file_is_found(tmp_path, name):
    save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    (tmp_path / "step-00000001" / name).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* verifies"):
        newest_valid(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_valid(tmp_path / "none") == (None, [])


def test_another_recipe_is_refused(tmp_path):
    save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    with pytest.raises(UserError, match="recipe_hash abc, this run has recipe_hash xyz"):
        load_checkpoint(tmp_path / "step-00000001", make_state(fingerprint="xyz"))


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, make_state(seed=0, steps=1), keep=1)
    newer = make_state(seed=5, steps=1)
    path = save_checkpoint(tmp_path, newer, keep=1)
    other = make_state(seed=2)
    load_checkpoint(path, other)
    assert torch.equal(other.model[0].weight, newer.model[0].weight)


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert set(manifest["files"]) == {checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE}
    for file in path.iterdir():
        assert file.suffix in (".safetensors", ".json")
