"""Checkpoints: exact round trips, and nothing half-written or damaged is ever used."""

import json

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.optimizers import LARS
from bigbatch.trainers.ensemble.members import save_snapshot
from bigbatch.trainers.models.batch_stats import running_statistics
from bigbatch.trainers.models.weights_file import WeightsInfo, read_header, read_info
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.optim.averaging import WeightAverage
from bigbatch.trainers.recovery import stored, tensor_files
from bigbatch.trainers.recovery.checkpoint import TrainState, capture, load_checkpoint, write
from bigbatch.trainers.recovery.stored import MODEL, Retention, list_checkpoints, newest_valid


def fingerprint_of(*overrides, order="abc"):
    tree = load_recipe("digits", overrides).model_dump(mode="json")
    return {"recipe": tree, "order_hash": order}


def make_state(seed=0, steps=0, fingerprint=None):
    fingerprint = fingerprint_of() if fingerprint is None else fingerprint
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    optimizer = build_optimizer(model, LARS(name="lars", lr=1.0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    return TrainState(steps, model, optimizer, None, fingerprint)


def save_checkpoint(folder, state, keep):
    return write(folder, capture(state), Retention(keep))


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


def test_what_lies_beyond_the_step_that_is_saved_counts_for_nothing(tmp_path):
    # A damaged checkpoint, before which the run had to go back, must not displace new ones.
    state = make_state(steps=1)
    for state.step in (4, 8):
        save_checkpoint(tmp_path, state, keep=2)
    (tmp_path / "step-00000008" / stored.MODEL).unlink()
    for state.step in (5, 6):
        save_checkpoint(tmp_path, state, keep=1)
        assert newest_valid(tmp_path)[0] == tmp_path / f"step-{state.step:08d}"
    state.step = 8
    save_checkpoint(tmp_path, state, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000008"]
    assert newest_valid(tmp_path)[1] == []


@pytest.mark.parametrize("name", [stored.MODEL, stored.OPTIMIZER, stored.STATE])
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


@pytest.mark.parametrize("name", [stored.MODEL, stored.MANIFEST])
def test_a_missing_file_is_found(tmp_path, name):
    save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    (tmp_path / "step-00000001" / name).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* verifies"):
        newest_valid(tmp_path)


def test_what_meets_an_objection_is_used_last(tmp_path):
    state = make_state(steps=1)
    for state.step in (1, 2, 3):
        save_checkpoint(tmp_path, state, keep=3)
    late = lambda step: "too late" if step > 1 else None  # noqa: E731
    path, problems = newest_valid(tmp_path, late)
    assert path == tmp_path / "step-00000001"
    assert [p.endswith("too late") for p in problems] == [True, True]
    path, _ = newest_valid(tmp_path, lambda step: "no")
    assert path == tmp_path / "step-00000003"


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_valid(tmp_path / "none") == (None, [])


def test_another_recipe_is_refused(tmp_path):
    save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    path = tmp_path / "step-00000001"
    other = make_state(fingerprint=fingerprint_of("optimizer.lr=1", "clip={name: value, limit: 1}"))
    with pytest.raises(UserError, match=r"recipe: clip = null there, .*optimizer\.lr = 2\.0 there"):
        load_checkpoint(path, other)
    with pytest.raises(UserError, match=r"other data: its order_hash is abc, that .* here xyz"):
        load_checkpoint(path, make_state(fingerprint=fingerprint_of(order="xyz")))
    load_checkpoint(path, make_state(fingerprint=fingerprint_of("log.every=7", "name=other")))


def test_another_teacher_is_refused_wherever_it_lies(tmp_path):
    def taught(path, teacher):
        return fingerprint_of(f"distill.teacher={path}") | {"teacher_hash": teacher}

    path = save_checkpoint(tmp_path, make_state(steps=1, fingerprint=taught("a", "abc")), keep=1)
    load_checkpoint(path, make_state(fingerprint=taught("b", "abc")))
    with pytest.raises(UserError, match=r"teacher: its teacher_hash is abc, that .* here xyz; put"):
        load_checkpoint(path, make_state(fingerprint=taught("a", "xyz")))
    with pytest.raises(UserError, match=r"distill = .* there, null here"):
        load_checkpoint(path, make_state())


def test_keys_that_a_version_adds_are_no_other_recipe(tmp_path):
    old = fingerprint_of()
    del old["recipe"]["evaluate"]["crop_fraction"], old["recipe"]["recovery"]
    path = save_checkpoint(tmp_path, make_state(steps=1, fingerprint=old), keep=1)
    load_checkpoint(path, make_state())
    with pytest.raises(UserError, match=r"evaluate\.crop_fraction = 1\.0 there, 0\.9 here"):
        load_checkpoint(path, make_state(fingerprint=fingerprint_of("evaluate.crop_fraction=0.9")))


def test_a_checkpoint_with_a_mere_hash_of_the_recipe_still_loads(tmp_path):
    early = {"recipe_hash": "0123456789abcdef", "order_hash": "abc"}
    path = save_checkpoint(tmp_path, make_state(steps=1, fingerprint=early), keep=1)
    load_checkpoint(path, make_state())
    with pytest.raises(UserError, match="other data"):
        load_checkpoint(path, make_state(fingerprint=fingerprint_of(order="xyz")))


def without(path, *keys):
    """The checkpoint as a version would have written it that did not know these keys."""
    content = json.loads((path / stored.STATE).read_text())
    kept = {k: v for k, v in content.items() if k not in keys}
    (path / stored.STATE).write_text(json.dumps(kept))
    return path


def test_what_an_older_version_did_not_keep_starts_empty(tmp_path):
    state, other = make_state(steps=2), make_state(seed=1)
    state.losses, other.losses, other.skipped_steps = [1.0, 2.0], [3.0], [[4, 5]]
    other.noise[:] = [5.0, 6.0]
    path = save_checkpoint(tmp_path, state, keep=1)
    load_checkpoint(without(path, "losses", "noise", "over", "scaler", "accuracy"), other)
    assert (other.step, other.losses, other.skipped_steps) == (2, [], [])
    assert other.noise == [0.0, 0.0]
    step(state)
    step(other)
    assert torch.equal(other.model[0].weight, state.model[0].weight)


@pytest.mark.parametrize("key", ["step", "optimizer", "fingerprint"])
def test_what_no_version_can_do_without_is_named(tmp_path, key):
    path = save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    with pytest.raises(UserError, match=f"state.json holds no {key}: another version wrote it"):
        load_checkpoint(without(path, key), make_state())


@pytest.mark.parametrize("name", [stored.MODEL, stored.OPTIMIZER])
def test_names_of_another_version_are_named(tmp_path, name):
    path = save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    tensors = {n: value.clone() for n, value in load_file(path / name).items()}
    old = next(n for n in tensors if n.endswith("0.weight"))
    tensors[old.replace("0.weight", "stem.weight")] = tensors.pop(old)
    tensor_files.write_tensors(path / name, tensors)
    with pytest.raises(UserError, match=r"stem.weight.*: another version wrote it"):
        load_checkpoint(path, make_state())


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, make_state(seed=0, steps=1), keep=1)
    newer = make_state(seed=5, steps=1)
    path = save_checkpoint(tmp_path, newer, keep=1)
    other = make_state(seed=2)
    load_checkpoint(path, other)
    assert torch.equal(other.model[0].weight, newer.model[0].weight)


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    manifest = json.loads((path / stored.MANIFEST).read_text())
    assert set(manifest["files"]) == {stored.MODEL, stored.OPTIMIZER, stored.STATE}
    for file in path.iterdir():
        assert file.suffix in (".safetensors", ".json")


def test_a_capture_does_not_change_while_training_goes_on(tmp_path):
    state, other = make_state(steps=1), make_state(seed=1)
    captured = capture(state)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    step(state)
    load_checkpoint(write(tmp_path, captured, Retention(1)), other)
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, before[name])
    again = capture(state, captured)
    assert again.model["0.weight"].data_ptr() == captured.model["0.weight"].data_ptr()
    assert torch.equal(again.model["0.weight"], state.model[0].weight)


def test_what_must_be_on_disk_first_is_asked_for_before_the_checkpoint_appears(tmp_path):
    seen = []
    write(
        tmp_path,
        capture(make_state()),
        Retention(1),
        lambda: seen.append(list_checkpoints(tmp_path)),
    )
    assert seen == [[]]


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path):
    state = make_state(steps=1)
    save_checkpoint(tmp_path, state, keep=1)
    state.step = 2

    def fail():
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write(tmp_path, capture(state), Retention(1), fail)
    # Half a checkpoint may be what the disk lacks for the next one.
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    save_checkpoint(tmp_path, state, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("dtype", tensor_files.DTYPES)
def test_our_files_are_safetensors(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "odd": torch.ones(3, dtype=torch.uint8),
        "none": torch.empty(0, 4, dtype=dtype),
        'naïve "name"': torch.zeros(1),
    }
    measured = tensor_files.write_tensors(tmp_path / "a", tensors)
    assert measured == stored.measure(tmp_path / "a")
    read = load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, value in read.items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])


def forge(path, name, content):
    """Change a file of a checkpoint and make the manifest right again."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / stored.MANIFEST).read_text())
    manifest["files"][name] = stored.measure(path / name)
    (path / stored.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def two_checkpoints(tmp_path):
    """An older one, and a newer one to be damaged."""
    state = make_state(steps=1)
    for state.step in (1, 2):
        save_checkpoint(tmp_path, state, keep=2)
    return tmp_path / "step-00000001", tmp_path / "step-00000002"


@pytest.mark.parametrize(
    "files",
    [
        {"../outside": {"bytes": 1, "sha256": "0"}},
        {"/outside": {"bytes": 1, "sha256": "0"}},
        {"metrics.json": {"bytes": 1, "sha256": "0"}},
        {stored.STATE: None},
        [],
        None,
    ],
)
def test_a_manifest_names_a_checkpoint_s_files_and_no_other_ones(
    two_checkpoints, monkeypatch, files
):
    older, newer = two_checkpoints
    manifest = json.loads((newer / stored.MANIFEST).read_text())
    manifest["files"] = {**manifest["files"], **files} if isinstance(files, dict) else files
    if isinstance(files, dict) and stored.STATE in files:
        del manifest["files"][stored.STATE]
    (newer / stored.MANIFEST).write_text(json.dumps(manifest))
    read, measure = [], stored.measure
    monkeypatch.setattr(stored, "measure", lambda path: (read.append(path), measure(path))[1])
    chosen, problems = newest_valid(older.parent)
    assert chosen == older
    assert len(problems) == 1
    assert {path.parent for path in read} == {older}


def make_averaged(seed=0, steps=0, averaged=0):
    """A state with an average of the weights, which has taken in those of some steps."""
    state = make_state(seed, steps)
    state.average = WeightAverage(dict(state.model.named_parameters()), range(1, 99), 0.1)
    for _ in range(averaged):
        step(state)
        state.step += 1
        state.average.update(state.step)
    return state


@pytest.mark.parametrize("averaged", [0, 1, 3])
def test_an_average_goes_on_bit_for_bit(tmp_path, averaged):
    state, other = make_averaged(averaged=averaged), make_averaged(seed=1, averaged=2)
    path = save_checkpoint(tmp_path, state, keep=1)
    assert newest_valid(tmp_path) == (path, [])
    assert (path / stored.AVERAGE).exists() == (averaged > 0)
    load_checkpoint(path, other)
    assert other.average.count == averaged
    for one in (state, other):
        step(one)
        one.average.update(averaged + 1)
    for name, mean in state.average.tensors.items():
        assert mean.dtype == torch.float64
        assert torch.equal(other.average.tensors[name], mean)
    info = WeightsInfo("none", ("a", "b", "c"), (0.5,), (0.25,), 4, 1)
    state.info, state.step = info, 9
    path = save_checkpoint(tmp_path, state, keep=1)
    assert read_info(read_header(path / stored.AVERAGE)) == info


def test_a_captured_average_does_not_change_while_training_goes_on(tmp_path):
    state, other = make_averaged(averaged=2), make_averaged(seed=1)
    captured = capture(state)
    before = {name: mean.clone() for name, mean in state.average.tensors.items()}
    step(state)
    state.average.update(3)
    load_checkpoint(write(tmp_path, captured, Retention(1)), other)
    assert other.average.count == 2
    assert all(torch.equal(other.average.tensors[name], mean) for name, mean in before.items())


@pytest.mark.parametrize("averaged", [0, 2])
def test_an_average_is_there_exactly_where_the_state_counts_it(tmp_path, averaged):
    state = make_averaged(averaged=1)
    older = save_checkpoint(tmp_path, state, keep=2)
    state = make_averaged(averaged=averaged)
    state.step = 7
    newer = save_checkpoint(tmp_path, state, keep=2)
    content = json.loads((newer / stored.STATE).read_text()) | {"averaged": 2 - averaged}
    forge(newer, stored.STATE, json.dumps(content).encode())
    chosen, (problem,) = newest_valid(tmp_path)
    assert chosen == older
    assert f"{newer / stored.STATE} is damaged: averaged does not go with the files" in problem


@pytest.mark.parametrize("how", ["a bit", "gone", "no tensors"])
def test_a_damaged_average_is_found(tmp_path, how):
    state = make_averaged(averaged=1)
    older = save_checkpoint(tmp_path, state, keep=2)
    state.step += 1
    path = save_checkpoint(tmp_path, state, keep=2) / stored.AVERAGE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "a bit":
        path.write_bytes(content)
    elif how == "gone":
        path.unlink()
    else:
        forge(path.parent, stored.AVERAGE, b"{}")
    chosen, (problem,) = newest_valid(tmp_path)
    assert chosen == older
    assert str(path) in problem


def test_an_average_of_other_weights_is_named(tmp_path):
    state = make_averaged(averaged=1)
    path = save_checkpoint(tmp_path, state, keep=1)
    tensors = {n: value.clone() for n, value in load_file(path / stored.AVERAGE).items()}
    tensors["stem.weight"] = tensors.pop("0.weight")
    tensor_files.write_tensors(path / stored.AVERAGE, tensors)
    with pytest.raises(UserError, match=r"average does not fit: .*stem.weight.*: another version"):
        load_checkpoint(path, make_averaged())


STATES = {
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "another step": b'{"step": 3}',
    "half a step": b'{"step": 2.5}',
    "losses": b'{"losses": ["x"]}',
    "noise": b'{"noise": ["x", 1]}',
    "noise without signal": b'{"noise": [1]}',
    "an average": b'{"averaged": 1.5}',
    "less than no average": b'{"averaged": -1}',
    "ranges": b'{"over": [[1, 2, 3]]}',
    "a range of texts": b'{"over": [["1", "2"]]}',
    "an optimizer": b'{"optimizer": 7}',
    "a fingerprint": b'{"fingerprint": null}',
    "a scaler": b'{"scaler": []}',
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_cannot_be_is_damage(two_checkpoints, what):
    older, newer = two_checkpoints
    forge(newer, stored.STATE, STATES[what])
    chosen, (problem,) = newest_valid(older.parent)
    assert chosen == older
    assert problem.startswith(f"{newer / stored.STATE} is damaged: ")


@pytest.mark.parametrize("name", [stored.MODEL, stored.OPTIMIZER])
@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}more"])
def test_tensors_that_cannot_be_are_damage(two_checkpoints, name, content):
    older, newer = two_checkpoints
    forge(newer, name, content)
    chosen, (problem,) = newest_valid(older.parent)
    assert chosen == older
    assert problem.startswith(f"{newer / name} is damaged: ")


def test_deep_json_of_a_score_is_none(two_checkpoints):
    (two_checkpoints[0] / stored.STATE).write_bytes(b"[" * 100_000)
    assert stored._score(two_checkpoints[0], "accuracy") is None


@pytest.mark.parametrize("change", [lambda t: t[:2], lambda t: t.half()])
def test_weights_of_another_shape_or_dtype_are_named(tmp_path, change):
    path = save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    # Copies: load_file maps the file, which is then written anew.
    tensors = {n: value.clone() for n, value in load_file(path / stored.MODEL).items()}
    tensors["0.weight"] = change(tensors["0.weight"]).contiguous()
    tensor_files.write_tensors(path / stored.MODEL, tensors)
    with pytest.raises(UserError, match=r"0\.weight is torch\.float.*, the model's torch\.float32"):
        load_checkpoint(path, make_state())
    model = make_state(seed=1).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"cannot be loaded: .*restore it from a backup"):
        tensor_files.load_weights(model, path / stored.MODEL)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_a_snapshot_that_is_damaged_is_a_user_s_error(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be loaded: .*restore it"):
        tensor_files.load_weights(make_state().model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("key", ["step/group.9", "step/group.x", "a[1]/0.weight"])
def test_optimizer_state_that_cannot_be_is_named(tmp_path, key):
    path = save_checkpoint(tmp_path, make_state(steps=1), keep=1)
    content = json.loads((path / stored.STATE).read_text())
    content["optimizer"][key] = 1
    (path / stored.STATE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"step-00000001: .*another version wrote it"):
        load_checkpoint(path, make_state())


def test_what_weights_are_for_is_in_a_checkpoint_and_older_ones_without_it_load(tmp_path):
    info = WeightsInfo("none", ("a", "b", "c"), (0.5,), (0.25,), 4, 1)
    state = make_state(steps=1)
    plain = save_checkpoint(tmp_path / "old", state, keep=1)
    state.info = info
    path = save_checkpoint(tmp_path / "new", state, keep=1)
    assert read_info(read_header(path / stored.MODEL)) == info
    assert read_info(read_header(plain / stored.MODEL)) is None
    for folder in (plain, path):
        other = make_state(seed=1)
        assert newest_valid(folder.parent) == (folder, [])
        load_checkpoint(folder, other)
        for name, value in other.model.state_dict().items():
            assert torch.equal(value, state.model.state_dict()[name])
    old, new = (load_file(folder / stored.MODEL) for folder in (plain, path))
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert (plain / stored.OPTIMIZER).read_bytes() == (path / stored.OPTIMIZER).read_bytes()


def test_a_snapshot_says_what_its_weights_are_for(tmp_path):
    info = WeightsInfo("none", ("a", "b", "c"), (0.5,), (0.25,), 4, 1)
    path = save_snapshot(tmp_path, 1, 7, make_state().model, {"accuracy": 0.5}, info)
    assert read_info(read_header(path / stored.MODEL)) == info


def evaluated_state(seed=0):
    """After two steps, evaluated with statistics that are not training's."""
    state = make_state(seed, steps=2)
    made = {name: 2 * value + 1 for name, value in running_statistics(state.model).items()}
    state.evaluated = (2, made)
    return state, made


def test_a_checkpoint_holds_the_statistics_of_the_evaluation_and_those_of_training(tmp_path):
    state, made = evaluated_state()
    own = {name: value.clone() for name, value in state.model.state_dict().items()}
    path = save_checkpoint(tmp_path, state, keep=1)
    model = load_file(path / MODEL)
    assert all(torch.equal(value, made.get(name, own[name])) for name, value in model.items())
    other = make_state(seed=1)
    load_checkpoint(path, other)
    assert all(torch.equal(value, own[name]) for name, value in other.model.state_dict().items())
    assert other.evaluated is None
    state.step = 3  # whose weights nobody has evaluated
    path = save_checkpoint(tmp_path, state, keep=2)
    assert not (path / stored.STATISTICS).exists()
    assert torch.equal(load_file(path / MODEL)["1.running_mean"], own["1.running_mean"])


@pytest.mark.parametrize("how", ["not said", "of another model"])
def test_statistics_that_do_not_fit_are_found(tmp_path, how):
    path = save_checkpoint(tmp_path, evaluated_state()[0], keep=1)
    if how == "not said":
        content = json.loads((path / stored.STATE).read_text()) | {"precise_bn": False}
        forge(path, stored.STATE, json.dumps(content).encode())
        with pytest.raises(UserError, match="precise_bn does not go with the files"):
            newest_valid(tmp_path)
    else:
        forge(path, stored.STATISTICS, save({"1.running_mean": torch.zeros(2)}))
        with pytest.raises(UserError, match=r"running statistics do not fit: 1\.running_mean"):
            load_checkpoint(path, make_state())
