"""Saving beside training: what is told, what stays, and what is fatal."""

import errno
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.judged import MAE
from bigbatch.trainers.recovery import saving, stored
from bigbatch.trainers.recovery.checkpoint import TrainState, write
from bigbatch.trainers.recovery.saving import Saver
from bigbatch.trainers.recovery.stored import Retention, list_checkpoints, verify


class Alone:
    """An engine of one rank, as far as saving sees it."""

    rank = 0

    def on_main(self, compute):
        return compute()


class Told:
    """The log's part in saving."""

    def __init__(self):
        self.events = []
        self.synced = 0

    def event(self, kind, **fields):
        self.events.append((kind, fields["saved"]))

    def error(self, kind, message, **fields):
        self.events.append((kind, fields["saved"]))

    def sync(self):
        self.synced += 1


@pytest.fixture
def state():
    model = nn.Linear(3, 2)
    return TrainState(1, model, torch.optim.SGD(model.parameters(), 0.1), None, {})


def names(folder):
    return [p.name for p in list_checkpoints(folder)]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, state, monkeypatch):
    go = threading.Event()

    def slow(*arguments):
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saving, "write", slow)
    log = Told()
    with Saver(tmp_path, Alone(), log, Retention()) as saver:
        saver.save(state)
        saver.report()
        assert (names(tmp_path), log.events) == ([], [])
        with torch.no_grad():
            state.model.weight.add_(1)
        go.set()
    assert log.events == [("checkpoint", 1)]
    assert log.synced == 1
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_stops_nothing_but_the_last_save(tmp_path, state, monkeypatch):
    full = True

    def write_or_not(*arguments):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(saving, "write", write_or_not)
    log = Told()
    with Saver(tmp_path, Alone(), log, Retention()) as saver:
        saver.save(state)
        state.step = 2
        saver.save(state)
        full = False
        state.step = 3
        saver.save(state)
        state.step = 4
        saver.save(state, last=True)
        assert names(tmp_path) == ["step-00000004", "step-00000003"]
        full = True
        state.step = 5
        with pytest.raises(UserError, match=r"cannot save step 5 in .* No space left"):
            saver.save(state, last=True)
    assert log.events == [
        ("save_failed", 1), ("save_failed", 2), ("checkpoint", 3), ("checkpoint", 4),
        ("save_failed", 5),
    ]  # fmt: skip


def test_a_defect_in_the_background_surfaces_in_the_loop(tmp_path, state, monkeypatch):
    def broken(*arguments):
        raise KeyError("defect")

    monkeypatch.setattr(saving, "write", broken)
    saver = Saver(tmp_path, Alone(), Told(), Retention())
    saver.save(state)
    with pytest.raises(KeyError, match="defect"):
        saver.save(state)


def test_the_best_and_every_nth_stay(tmp_path, state):
    with Saver(tmp_path, Alone(), Told(), Retention(newest=1, best=1, every=4)) as saver:
        for state.step, accuracy in enumerate([0.1, 0.9, None, 0.3, 0.9, 0.2, 0.4], start=1):
            saver.save(state, score=accuracy)
    assert names(tmp_path) == ["step-00000007", "step-00000004", "step-00000002"]


def test_of_an_error_the_least_is_the_best(tmp_path, state):
    retention = Retention(newest=1, best=1, every=4, judge=MAE)
    with Saver(tmp_path, Alone(), Told(), retention) as saver:
        for state.step, error in enumerate([3.1, 0.1, None, 0.7, 0.1, 0.8, 0.6], start=1):
            saver.save(state, score=error)
    assert names(tmp_path) == ["step-00000007", "step-00000004", "step-00000002"]
    verify(tmp_path / "step-00000002")


def test_there_is_always_one_to_go_back_to():
    kept = Retention(newest=2, back=5)
    assert kept.kept(dict.fromkeys([0, 4, 7, 8])) == {0, 7, 8}
    assert kept.kept(dict.fromkeys([0, 2, 4, 9, 10])) == {4, 9, 10}


@given(
    st.dictionaries(st.integers(1, 99), st.none() | st.floats(0, 1), min_size=1),
    st.integers(1, 5),
    st.integers(0, 3),
    st.none() | st.integers(1, 10),
)
def test_retention(accuracies, newest, best, every):
    kept = Retention(newest, best, every).kept(accuracies)
    assert kept <= accuracies.keys()
    assert max(accuracies) in kept
    assert len(kept) >= min(newest, len(accuracies))
    if every is None:
        assert len(kept) <= newest + best
    for step in accuracies.keys() - kept:
        assert every is None or step % every
        assert sum(s > step for s in accuracies) >= newest
        mine = accuracies[step]
        if mine is not None:
            assert (
                sum(a is not None and a >= mine for s, a in accuracies.items() if s != step) >= best
            )


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(tmp_path, state, monkeypatch):
    """It ended the run, although the save that it made room for stood."""
    log = Told()
    kept = tmp_path / "step-00000001"
    remove = stored.remove

    def refuse(path):
        if path == kept:
            raise PermissionError(errno.EACCES, "Permission denied")
        remove(path)

    monkeypatch.setattr(stored, "remove", refuse)
    with Saver(tmp_path, Alone(), log, Retention(newest=1)) as saver:
        for state.step in (1, 2, 3):
            saver.save(state, last=True)
    assert names(tmp_path) == ["step-00000003", "step-00000001"]
    assert [e for e in log.events if e[0] != "checkpoint"] == [("not_removed", 2)]  # said once


def test_of_a_checkpoint_that_lies_elsewhere_the_link_goes(tmp_path, state):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    log = Told()
    with Saver(folder, Alone(), log, Retention(newest=1)) as saver:
        saver.save(state, last=True)
        (folder / "step-00000001").rename(elsewhere)
        (folder / "step-00000001").symlink_to(elsewhere)
        saver.save(state, last=True)  # the same step again, as after a rollback
        assert (elsewhere / "manifest.json").exists()
        (folder / "step-00000000").symlink_to(elsewhere)
        state.step = 2
        saver.save(state, last=True)
    assert names(folder) == ["step-00000002"]
    assert (elsewhere / "manifest.json").exists()
    assert {kind for kind, _ in log.events} == {"checkpoint"}


def test_what_a_check_finds_wrong_is_not_written_and_what_it_finds_right_was_so(tmp_path, state):
    with Saver(tmp_path, Alone(), Told(), Retention()) as saver:

        def changes():
            with torch.no_grad():
                state.model.weight.add_(1)

        before = state.model.weight.detach().clone()
        saver.save(state, check=changes)  # after the copy: that has nothing of it

        def wrong():
            raise UserError("a rank holds other bits")

        state.step = 2
        with pytest.raises(UserError, match="other bits"):
            saver.save(state, check=wrong)
    assert names(tmp_path) == ["step-00000001"]
    saved = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert torch.equal(saved["weight"], before)
