"""That a step's parts add up to it, and that the guilty one is found."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.rng import key64
from bigbatch.launcher.batches import batches
from bigbatch.trainers.replay.__main__ import main
from bigbatch.trainers.replay.activations import Activations
from bigbatch.trainers.replay.files import picture
from bigbatch.trainers.replay.look import Looked, look
from bigbatch.trainers.replay.past import find_past
from bigbatch.trainers.replay.replay import Replay, Replayed, open_replay
from bigbatch.trainers.replay.summary import summarise
from tests.trainers.replay.conftest import copied, small, untouched

SLOW = pytest.mark.slow
CLASSES = [str(n) for n in range(10)]


@pytest.fixture(scope="module")
def taken(preempted: RunDir) -> tuple[Replay, Replayed, Looked]:
    """Step 5 looked into. The replay stays open in memory, whatever its scratch folder does."""
    with open_replay(find_past(preempted, 5)) as replay:
        replay.advance(4)
        replayed = replay.take()
        looked = look(replay, replayed, layers=True)
        return replay, replayed, looked


def test_parts_and_terms_add_up_to_the_step(taken: tuple[Replay, Replayed, Looked]) -> None:
    _, replayed, looked = taken
    count = len(looked.parts)
    assert [part.micro for part in looked.parts] == list(range(count)) == [0, 1, 2, 3]
    assert math.fsum(part.share for part in looked.parts) == pytest.approx(1, abs=1e-6)
    losses = [part.loss for part in looked.parts]
    assert math.fsum(losses) / count == replayed.record["loss"]  # the bits of the record
    squares = math.fsum(part.norm**2 for part in looked.parts) / count
    assert squares == pytest.approx(replayed.record["grad_sq_micro"], rel=1e-6)
    assert looked.chosen == max(looked.parts, key=lambda part: part.share).micro
    for part in looked.parts:
        own = [s for s in looked.samples if s.micro == part.micro]
        assert len(own) == 4
        assert math.fsum(s.loss or 0.0 for s in own) / 4 == pytest.approx(part.loss, rel=1e-5)
        shares = [s.share for s in own]
        if part.micro == looked.chosen:
            assert math.fsum(s or 0.0 for s in shares) == pytest.approx(part.share, abs=1e-5)
        else:
            assert shares == [None] * 4


def test_what_the_norm_would_be_without_a_micro_batch(
    taken: tuple[Replay, Replayed, Looked],
) -> None:
    """Against the mean of the others' gradients, taken alone."""
    replay, replayed, looked = taken
    job, engine = replay.job, replay.engine
    replay.restore(replayed.before)
    replay.statistics.begin()
    gradients = []

    for batch in job.batches(4, 5):
        images, targets = job.views(batch)
        torch.manual_seed(key64(job.recipe.seed, 4, batch.index, "model"))
        engine.module.zero_grad()
        job.objective(engine.module, images, targets).backward()
        gradients.append(torch.cat([p.grad.double().flatten() for p in engine.module.parameters()]))
    replay.statistics.discard()
    replay.restore(replayed.after)
    mean = torch.stack(gradients).mean(0)
    assert float(mean.norm()) == pytest.approx(replayed.record["grad_norm"], rel=1e-6)
    for part, own in zip(looked.parts, gradients, strict=True):
        rest = torch.stack([g for g in gradients if g is not own]).mean(0)
        assert part.without == pytest.approx(float(rest.norm()), rel=1e-5)
        assert part.norm == pytest.approx(float(own.norm()), rel=1e-6)
        assert part.share == pytest.approx(float(own @ mean / (4 * mean @ mean)), abs=1e-6)


def test_samples_are_those_of_the_order_with_their_partners(
    taken: tuple[Replay, Replayed, Looked], preempted: RunDir
) -> None:

    _, _, looked = taken
    expected = list(batches(preempted.recipe(), range(4, 5)))
    for batch in expected:
        own = [s for s in looked.samples if s.micro == batch.micro]
        assert [s.key for s in own] == batch.keys
        assert [s.label for s in own] == batch.labels
        assert [s.sample for s in own] == batch.samples
        for sample in own:  # mixup: at most one other, of the same micro-batch
            assert len(sample.mixed) <= 1
            assert all(key in batch.keys and 0 < share <= 1 for key, share in sample.mixed)
    # With alpha 0.1 some are mixed well, so that the images show it too.
    assert any(share > 1e-3 for s in looked.samples for _, share in s.mixed)


def test_the_model_is_as_after_the_step(taken: tuple[Replay, Replayed, Looked]) -> None:
    replay, replayed, _ = taken
    for name, tensor in replay.copied().items():
        assert torch.equal(tensor, replayed.after[name])


def test_layers_say_what_is_dead_saturated_or_not_finite() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([1.0, -1.0, -1.0, 2.0]))  # two of four are dead
        net[2].weight.zero_()
        net[2].bias.copy_(torch.tensor([10.0, 0.0]))  # one of two at its end
    seen = Activations(net)
    with seen.watched():
        net(torch.zeros(3, 2))
    assert seen.first_bad is None
    table = {a.layer: a for a in seen.table()}
    assert list(table) == ["0", "1", "2", "3"]
    assert table["1"].dead == 0.5
    assert table["1"].mean == pytest.approx(0.75)
    assert table["3"].saturated == 0.5
    assert (table["0"].dead, table["0"].saturated) == (None, None)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    images = torch.zeros(3, 2)
    images[1, 0] = math.inf
    with seen.watched():
        net(images)
    assert seen.first_bad == ("0", [1])
    assert {a.layer: a for a in seen.table()}["0"].non_finite == pytest.approx(4 / 24)


def test_the_micro_batch_of_a_sample(preempted: RunDir) -> None:
    with open_replay(find_past(preempted, 4)) as replay:
        replay.advance(3)
        replayed = replay.take()
        found = look(replay, replayed, micro=2)
        assert found.chosen == 2
        assert {s.micro for s in found.samples} == {2} == set(found.images)
        key = found.samples[1].key
        again = look(replay, replayed, key=key)
        assert again.samples == found.samples
        assert again.parts == found.parts
        with pytest.raises(UserError, match="--micro 4: that step of preempted has"):
            look(replay, replayed, micro=4)
        with pytest.raises(UserError, match="--sample nothing: step 4 holds no such sample"):
            look(replay, replayed, key="nothing")
        with pytest.raises(UserError, match=f"--sample {key} is in micro-batch 2 of step 4, not"):
            look(replay, replayed, micro=1, key=key)


def test_the_guilty_sample_has_a_frame(taken: tuple[Replay, Replayed, Looked]) -> None:
    _, replayed, looked = taken
    result = summarise(replayed, looked, CLASSES, [])
    guilty = result["guilty"]
    own = [s for s in looked.samples if s.micro == looked.chosen]
    assert guilty["sample"] == max(own, key=lambda s: s.share or 0.0).key
    sheet = np.asarray(Image.open(io.BytesIO(
        picture(result, looked.chosen, looked.images[looked.chosen])
    )))  # fmt: skip
    red = (sheet == (0xD6, 0x27, 0x28)).all(2)
    assert red.any()
    place = next(s.place for s in own if s.key == guilty["sample"])
    columns = np.flatnonzero(red.any(0))
    assert columns[0] // 162 == place == (columns[-1] - 12) // 162
    other = (looked.chosen + 1) % 4
    plain = np.asarray(Image.open(io.BytesIO(picture(result, other, looked.images[other]))))
    assert not (plain == (0xD6, 0x27, 0x28)).all(2).any()


def test_the_command_writes_a_folder_and_prints_json(
    preempted: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "why"
    with untouched(preempted):
        status = main(
            ["step", str(preempted.path), "--step", "4", "--layers", "--out", str(out), "--json"]
        )
    assert status == 0
    result = json.loads(capsys.readouterr().out)
    assert result["same"] is True
    assert result["weights_as_saved"] is True
    assert result["environment"] == []
    assert result["recorded"] == result["recomputed"]
    assert len(result["samples"]) == 16
    assert json.loads((out / "replay.json").read_text()) == {
        k: v for k, v in result.items() if k != "out"
    }
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [f"micro-{n:05d}.png" for n in range(4)]
    page = (out / "replay.html").read_text()
    assert "Step 4 of preempted" in page
    assert "same as recorded, bit for bit" in page
    assert all(f'src="{name}"' in page for name in pictures)
    tensors = load_file(out / "step.safetensors")
    for row in result["layers"]:
        gradient, update = (tensors[f"{kind}/{row['layer']}"] for kind in ("gradient", "update"))
        assert float(gradient.norm()) == pytest.approx(row["gradient_norm"], rel=1e-5)
        assert float(update.norm()) == pytest.approx(row["update_norm"], rel=1e-4)
    one = load_file(out / "micro-batch.safetensors")
    assert one["images"].shape == (4, 1, 16, 16)
    losses = [s["loss"] for s in result["samples"] if s["micro"] == result["micro"]]
    assert one["losses"].tolist() == losses


def test_a_difference_ends_with_status_1_and_words(
    preempted: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    run = copied(preempted, tmp_path)
    lines = run.metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["kind"] == "train" and record["step"] == 4:
            record["grad_norm"] = 0.125
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["step", str(run.path), "--step", "4", "--micro", "1"]) == 1
    said = capsys.readouterr().out
    assert "differs: step 4, grad_norm recorded 0.125, recomputed " in said
    assert "step 4 of preempted, recomputed from the checkpoint after step 3" in said
    assert main(["step", str(run.path), "--step", "40"]) == 2
    assert "has no step 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        ["loss=center", "augment.mixup=0"],
        ["loss={name: large_margin, margin: 4}", "augment.mixup=0"],
        pytest.param(["loss=jsd", "augment.mixup=0", "augment.ops=[augmix]"], marks=SLOW),
        pytest.param(["loss={name: bce}", "augment.cutmix=1.0"], marks=SLOW),
        ["regularise.l1=1e-4", "clip={name: norm, limit: 0.1}"],
        ["regularise.sharpness={name: sam}"],
        ["model.name=test_vit", "model.options={img_size: 16, patch_size: 8}"],
    ],
    ids=lambda change: change[0].partition("=")[2][:16],
)
def test_terms_of_every_kind_of_loss(change: list[str], digits: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path / "one", load_recipe("digits", small(digits, *change)))
    run.metrics.write_text('{"kind": "train", "step": 1}\n')  # made, and says nothing more
    with open_replay(find_past(run, 1)) as replay:
        replayed = replay.take()
        looked = look(replay, replayed)
    assert replayed.same is None
    assert math.fsum(part.share for part in looked.parts) == pytest.approx(1, abs=1e-3)
    known = [s for s in looked.samples if s.micro == looked.chosen]
    assert all(s.loss is not None for s in looked.samples)
    share = looked.parts[looked.chosen].share
    assert math.fsum(s.share or 0.0 for s in known) == pytest.approx(share, abs=1e-3)
    mean = math.fsum(s.loss or 0.0 for s in looked.samples) / len(looked.samples)
    assert mean == pytest.approx(replayed.record["loss"], rel=1e-4)
    assert ("BatchNorm" in looked.terms) is not any("vit" in key for key in change)
