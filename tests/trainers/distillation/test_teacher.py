"""A teacher sees what its student sees, with its own eyes, and is refused where it cannot."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.augment import Augment
from bigbatch.configs.data import Data
from bigbatch.configs.errors import UserError
from bigbatch.configs.evaluation import Evaluate
from bigbatch.configs.load import load_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import BatchPlan, Decoding, MicroBatch
from bigbatch.data.index import open_index
from bigbatch.data.loader import train_batches
from bigbatch.trainers.distillation.build import _NO_VIEW, check_teacher, open_teacher
from bigbatch.trainers.distillation.teacher import Teacher, teacher_hash
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.losses.hint import attention
from bigbatch.trainers.models.build import build_augmenter
from bigbatch.trainers.planning.inputs import open_inputs
from tests.helpers.runs import SMALL, untrained_run

MICRO = 6
BRIEF = ("duration=3 steps", "schedule={name: constant}")


@pytest.fixture(scope="module")
def classes(digits: Path) -> tuple[str, ...]:
    return open_index(digits / "val").classes


@pytest.fixture(scope="module")
def ensemble(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, classes: tuple[str, ...]
) -> Ensemble:
    path = tmp_path_factory.mktemp("runs") / "teacher"
    changes = ["augment.mean=[0.1]", "augment.std=[0.7]"]
    return open_ensemble([untrained_run(path, digits, classes, changes).path])


def student(digits: Path, *changes: str) -> Recipe:
    keys = (*SMALL, f"global_batch={2 * MICRO}", f"micro_batch={MICRO}", "augment.mixup=1")
    return load_recipe("digits", [f"data.path={digits}", *keys, *changes])


def batches(recipe: Recipe, size: int | None = None, steps: int = 1) -> list[MicroBatch]:
    """The first micro-batches of a recipe, decoded for models of `size`."""
    inputs = open_inputs(recipe)
    assert inputs.order is not None
    view = augmenter_of(recipe, size or recipe.data.image_size).view
    decoding = Decoding(view.out, recipe.data.channels, workers=0, threads=1, view=view)
    plan = BatchPlan(recipe.global_batch, recipe.micro_batch, 0, 1, 0, steps)
    return list(train_batches(inputs.splits["train"], inputs.order, plan, decoding))


def augmenter_of(recipe: Recipe, size: int, **augment: Any) -> Augmenter:
    return Augmenter(
        recipe.augment.model_copy(update=augment),
        image_size=size,
        crop_fraction=recipe.evaluate.crop_fraction,
        classes=10,
        seed=recipe.seed,
        device=torch.device("cpu"),
    )


class Eye(nn.Module):
    """Keeps what it is shown."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return images.flatten(1)[:, :10] * 1.0


def watched(
    ensemble: Ensemble, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, batch: MicroBatch
) -> list[Tensor]:
    seen: list[Tensor] = []
    monkeypatch.setattr(Member, "build", lambda member, device: Eye(seen))
    Teacher(ensemble, recipe, DdpEngine("fp32", "exact")).outputs(batch)
    return seen


def test_members_see_the_students_mixture_by_their_own_mean_and_std(
    digits: Path, ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = student(digits)
    batch = batches(recipe)[1]
    images, targets = augmenter_of(recipe, 32, mean=[0.0], std=[1.0]).train(batch)
    assert ((targets > 0) & (targets < 1)).any()  # some are mixtures
    seen = watched(ensemble, recipe, monkeypatch, batch)
    assert len(seen) == len(ensemble.members)
    for shown in seen:
        torch.testing.assert_close(shown, (images - 0.1) / 0.7)


@pytest.mark.parametrize("crop", ["null", "{scale: [0.2, 0.6]}"])
@pytest.mark.parametrize("affine", ["null", "{degrees: 20, translate: 0.2}"])
def test_a_member_of_another_size_sees_the_same_part_of_each_image(
    digits: Path, ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch, crop: str, affine: str
) -> None:
    """Its view, averaged to the student's size, is the student's but for interpolation; that of
    the step's other micro-batch is not."""
    member = ensemble.members[0]
    data = member.recipe.data.model_copy(update={"image_size": 96})
    large = replace(member, recipe=member.recipe.model_copy(update={"data": data}))
    recipe = student(digits, f"augment.crop={crop}", f"augment.affine={affine}", "augment.flip=0.5")
    first, second = batches(recipe, 96)
    augmenter = augmenter_of(recipe, 32, mean=[0.1], std=[0.7])
    mine, others = (augmenter.train(batch)[0] for batch in (first, second))
    (shown,) = watched(replace(ensemble, members=(large,)), recipe, monkeypatch, first)
    assert shown.shape[-1] == 96
    smaller = F.avg_pool2d(shown, 3)
    assert (smaller - mine).abs().mean() < 0.1 * (smaller - others).abs().mean()


def test_outputs_are_the_logarithm_of_the_combined_probabilities(
    digits: Path, ensemble: Ensemble
) -> None:
    recipe = student(digits)
    batch = batches(recipe)[0]
    teacher = Teacher(ensemble, recipe, DdpEngine("fp32", "exact"))
    found = teacher.outputs(batch)
    images, _ = augmenter_of(recipe, 32, mean=[0.1], std=[0.7]).train(batch)
    with torch.no_grad():
        each = [member.build()(images).double().softmax(1) for member in ensemble.members]
    expected = torch.stack(each).mean(0).log().float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(teacher.outputs(batch), found)
    assert teacher.computed == 2  # nothing is kept unless it is asked for
    half = Teacher(ensemble, recipe, DdpEngine("fp32", "exact"), "float16")
    assert torch.equal(half.outputs(batch), found.half().float())


def test_a_hint_is_the_mean_of_where_members_look(digits: Path, ensemble: Ensemble) -> None:
    recipe = student(digits)
    batch = batches(recipe)[0]
    teacher = Teacher(ensemble, recipe, DdpEngine("fp32", "exact"), hint=("layer2", 4))
    found = teacher.outputs(batch)
    images, _ = augmenter_of(recipe, 32, mean=[0.1], std=[0.7]).train(batch)
    looks = []
    for member in ensemble.members:
        network = member.build()
        stem = nn.Sequential(*list(network.children())[: list(network._modules).index("layer3")])
        with torch.no_grad():
            looks.append(attention(stem(images), 4))
    assert found.shape == (MICRO, 10 + 16)
    torch.testing.assert_close(found[:, 10:], torch.stack(looks).mean(0))
    plain = Teacher(ensemble, recipe, DdpEngine("fp32", "exact")).outputs(batch)
    assert torch.equal(found[:, :10], plain)
    lost = Teacher(ensemble, recipe, DdpEngine("fp32", "exact"), hint=("layer9", 4))
    with pytest.raises(UserError, match="teacher teacher/cycle-01 has no layer 'layer9'"):
        lost.outputs(batch)


def test_weights_that_give_nan_are_named(
    digits: Path, ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = student(digits)
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    network(torch.zeros(1, 1, 32, 32))
    nn.init.constant_(network[1].weight, float("nan"))
    monkeypatch.setattr(Member, "build", lambda member, device: network)
    teacher = Teacher(ensemble, recipe, DdpEngine("fp32", "exact"))
    with pytest.raises(UserError, match="teacher teacher/cycle-01 gives logits that are not fin"):
        teacher.outputs(batches(recipe)[0])


def test_the_hash_is_of_what_a_teacher_says_not_of_where_it_lies(
    digits: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    first, second = ensemble.members
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(first.weights.read_bytes())
    same = replace(ensemble, members=(replace(first, weights=moved, name="x"), second))
    assert teacher_hash(same) == teacher_hash(ensemble)
    recipe = first.recipe
    augment = recipe.augment.model_copy(update={"mean": [0.2]})
    other = recipe.model_copy(update={"augment": augment})
    bits = bytearray(moved.read_bytes())
    bits[-1] ^= 1
    moved.write_bytes(bits)
    others: Sequence[Ensemble] = [
        replace(ensemble, members=(first,)),
        same,
        replace(ensemble, members=(replace(first, recipe=other), second)),
        replace(ensemble, combination=replace(ensemble.combination, temperature=2.0)),
    ]
    assert len({teacher_hash(e) for e in (ensemble, *others)}) == 1 + len(others)


def test_other_classes_or_channels_are_refused_by_name(
    digits: Path, ensemble: Ensemble, classes: tuple[str, ...]
) -> None:
    recipe = student(digits)
    check_teacher(ensemble, recipe, classes)
    swapped = (classes[1], classes[0], *classes[2:])
    with pytest.raises(UserError, match=r"in another order: number 0 is '0' there, '1' here"):
        check_teacher(ensemble, recipe, swapped)
    with pytest.raises(UserError, match=r"teacher/cycle-01 has other classes .*\(10 and 9\)"):
        check_teacher(ensemble, recipe, classes[1:])
    colour = load_recipe("cifar10-resnet18", [f"data.path={digits}"])
    with pytest.raises(UserError, match=r"sees 1 channels, the student 3; set data\.channels=1"):
        check_teacher(ensemble, colour, classes)


def test_a_teacher_that_is_not_there_or_differs_between_ranks_is_refused(
    digits: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    teacher = ensemble.members[0].weights.parents[2]
    with pytest.raises(UserError, match=r"distill\.teacher = .*nobody is neither a run"):
        open_inputs(student(digits, f"distill.teacher={tmp_path / 'nobody'}"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "ensemble.json").write_text("{}")
    taught = f"distill={{teacher: {tmp_path / 'folder'}, members: all}}"
    with pytest.raises(UserError, match=r"members = all, but .*folder is an ensemble, and its"):
        open_inputs(student(digits, taught))
    recipe = student(digits, f"distill.teacher={teacher}", "distill.cache_gb=0")
    inputs = open_inputs(recipe)
    engine: Any = SimpleNamespace(from_main=lambda value: "0" * 32, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"has other weights here \(\w{32}\) than on rank 0 \(000"):
        open_teacher(recipe, inputs, engine, tmp_path)
    engine.from_main = lambda value: value
    assert open_teacher(student(digits), inputs, engine, tmp_path) is None
    opened = open_teacher(recipe, inputs, engine, tmp_path)
    assert opened is not None
    assert opened.hash == teacher_hash(ensemble)
    assert not (tmp_path / ".teacher-outputs").exists()
    with pytest.raises(UserError, match="has no member 'cycle-09'"):
        open_teacher(
            student(digits, f"distill.teacher={teacher}", "distill.members=cycle-09"),
            inputs, engine, tmp_path,
        )  # fmt: skip


@pytest.fixture
def open_kept(digits: Path, ensemble: Ensemble, tmp_path: Path) -> Callable[..., Teacher]:
    """The teacher of a recipe with these changes, of one rank, as a run in tmp_path opens it."""

    def opened(*changes: str) -> Teacher:
        teacher = ensemble.members[0].weights.parents[2]
        recipe = student(digits, f"distill.teacher={teacher}", *BRIEF, *changes)
        engine = DdpEngine("fp32", "exact")
        found = open_teacher(recipe, open_inputs(recipe), engine, tmp_path)
        assert found is not None
        return found

    return opened


def said_of(teacher: Teacher, shown: list[MicroBatch]) -> tuple[list[bytes], int]:
    """What a teacher says of micro-batches, and how many went through its members for it."""
    before = teacher.computed
    said = [teacher.outputs(batch).numpy().tobytes() for batch in shown]
    return said, teacher.computed - before


def test_outputs_are_read_where_the_view_is_the_same_and_computed_elsewhere(
    digits: Path, open_kept: Callable[..., Teacher]
) -> None:
    shown = batches(student(digits), steps=2)
    first = said_of(open_kept(), shown)
    assert first[1] == len(shown)
    for same in ("model.name=test_vit", "optimizer.lr=1", "augment.mean=[0.5]", "duration=2 steps",
                 "distill.weight=0.2", "distill.name=logits", "data.image_size=28"):  # fmt: skip
        assert said_of(open_kept(same), shown) == (first[0], 0), same
    for other in ("seed=4", "augment.flip=0.5", "data.sampling=uniform", "augment.mixup=0.5",
                  "global_batch=24", "distill.members=cycle-01", "distill.outputs=float16",
        "distill.hint={layer: layer2}",
                  "data.image_size=64", "precision=bf16"):  # fmt: skip
        assert said_of(open_kept(other), shown[:1])[1] == 1, other
    assert said_of(open_kept("distill.cache_gb=0"), shown) == first


def test_members_see_whom_the_students_strength_by_class_leaves_out(
    digits: Path, open_kept: Callable[..., Teacher]
) -> None:
    keys = ("augment.ops=[{name: invert, p: 1}]", "augment.class_strength={least: 0.1, alpha: 9}")
    recipe = student(digits, *keys)
    (batch, *_) = batches(recipe)
    inputs = open_inputs(recipe)
    mine = build_augmenter(recipe, 10, torch.device("cpu"), inputs).images(batch).clone()
    every = build_augmenter(recipe, 10, torch.device("cpu")).images(batch).clone()
    (alike,) = open_kept(*keys)._alike
    theirs = alike.augmenter.images(batch)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, every)


def test_each_key_of_a_recipe_counts_in_a_view_or_is_known_not_to() -> None:
    """A new key counts until somebody has seen that it changes no view: none is stale for it."""
    whole = {key for key, keys in _NO_VIEW.items() if keys is True}
    assert whole <= Recipe.model_fields.keys()
    counted = {"seed", "global_batch", "micro_batch", "precision", "determinism"}
    counted |= {"data", "augment", "evaluate"}
    assert Recipe.model_fields.keys() - whole == counted
    inner = {"data": {"stream", "sampling", "repeats", "lanes", "window", "channels"},
             "augment": {"crop", "affine", "flip", "jitter", "mixup", "cutmix", "mix_switch",
                         "ops", "border", "class_strength"},
             "evaluate": {"crop_fraction", "crop_mode"}}  # fmt: skip
    for part, keys in inner.items():
        model = {"data": Data, "augment": Augment, "evaluate": Evaluate}[part]
        assert model.model_fields.keys() - _NO_VIEW[part] == keys


def test_what_has_no_room_is_computed_and_said(
    digits: Path, open_kept: Callable[..., Teacher], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step_bytes = 2 * (16 + MICRO * 10 * 4)
    limit = f"distill.cache_gb={1.5 * step_bytes / 1e9}"
    shown = batches(student(digits), steps=2)
    notice.cache_clear()
    first, second = (said_of(open_kept(limit), shown) for _ in range(2))
    assert first == (second[0], 4)
    assert second[1] == 2
    (file,) = tmp_path.glob(".teacher-outputs/*/outputs")
    assert file.stat().st_size == step_bytes
    said = capfd.readouterr().err
    assert said.count("leaves room for the teacher's outputs of 1 of 3 steps") == 1


def test_a_folder_that_cannot_be_written_costs_time_alone(
    digits: Path, open_kept: Callable[..., Teacher], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shown = batches(student(digits))
    (tmp_path / "file").write_text("")
    notice.cache_clear()
    teacher = open_kept(f"distill.cache={tmp_path / 'file' / 'kept'}")
    expected = said_of(teacher, shown)
    assert "the teacher's outputs are not kept: [Errno 20]" in capfd.readouterr().err

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    teacher = open_kept()
    monkeypatch.setattr("os.pwrite", full)
    assert said_of(teacher, shown) == expected
    assert "kept no longer, but computed: [Errno 28] No space" in capfd.readouterr().err


def test_a_stream_keeps_nothing_and_says_so(
    digits: Path, open_kept: Callable[..., Teacher], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    notice.cache_clear()
    steps = [f"{part}.every=1 steps" for part in ("evaluate", "checkpoint")]
    stream = f"data.stream=[{digits}/train/000000.tar]"
    open_kept(stream, "reduction=overlapped", "data.sampling=uniform", *steps)
    assert "data.stream draws other samples each time" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
