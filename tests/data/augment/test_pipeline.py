"""Device-side augmentation: what it must keep, and what it must not depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigbatch.configs.augment import Affine, Augment, Crop, Jitter
from bigbatch.data.augment import pipeline
from bigbatch.data.augment.pipeline import Augmenter, contact_sheet
from bigbatch.data.batch import MicroBatch
from bigbatch.data.geometry import whole_frames

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
ALL = Augment(
    crop=Crop(),
    affine=Affine(degrees=10, translate=0.1, scale=0.1, shear=5),
    flip=0.5,
    jitter=Jitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
    mixup=0.4,
)


def augmenter(augment, out=16, crop_fraction=1.0, seed=0, **options):
    return Augmenter(
        augment,
        image_size=out,
        crop_fraction=crop_fraction,
        classes=4,
        seed=seed,
        device=torch.device("cpu"),
        **options,
    )


def batch_of(shapes, step=0, index=0, seed=0, channels=3):
    """Random images of the given (height, width), none of whose pixels are dark."""
    generator = np.random.default_rng(seed)
    images = [generator.integers(50, 256, (h, w, channels), np.uint8) for h, w in shapes]
    return MicroBatch(
        step=step,
        index=index,
        samples=np.arange(len(shapes)),
        labels=torch.arange(len(shapes)) % 4,
        pixels=torch.from_numpy(np.concatenate([image.ravel() for image in images])),
        sizes=torch.tensor(shapes, dtype=torch.int32),
        channels=channels,
    )


@pytest.mark.parametrize(
    "change", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}, {}]
)
def test_shares_say_whose_targets_were_mixed(change):
    """Targets by them are those of training, by the same draws."""
    batch = batch_of([(20, 24)] * 6, step=3, index=1)
    own = augmenter(Augment(**PLAIN, **change))
    shares = own.shares(batch)
    assert shares.shape == (6, 6)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    _, targets = own.train(batch)
    torch.testing.assert_close(shares @ F.one_hot(batch.labels, 4).float(), targets)
    assert bool((shares == torch.eye(6)).all()) is (not change)


def test_three_views_share_all_but_the_last_operation():
    """Bit for bit: the first is without it, the second is as ever, the third has own draws."""
    batch = batch_of([(20, 24)] * 5)
    shared = {**PLAIN, "crop": Crop(), "flip": 0.5, "jitter": Jitter(brightness=0.3)}
    own = Augment(**shared, ops=["augmix"])
    images, targets = augmenter(own, views=True).train(batch)
    assert targets.shape == (5, 4)
    plain, second, third = images.split(5)
    assert torch.equal(plain, augmenter(Augment(**shared)).train(batch)[0])
    assert torch.equal(second, augmenter(own).train(batch)[0])
    assert (third - plain).abs().amax((1, 2, 3)).min() > 0
    assert not torch.equal(third, second)
    part = augmenter(own, views=True).train(batch_of([(20, 24)] * 5))[0]
    assert torch.equal(part, images)
    assert augmenter(own, views=True).images(batch).shape == (5, 3, 16, 16)


def test_without_augmentation_an_image_of_the_right_size_passes_unchanged():
    batch = batch_of([(16, 16)] * 3)
    images, targets = augmenter(Augment(**PLAIN)).train(batch)
    expected = batch.canvas()[:, :16, :16].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert torch.equal(targets, F.one_hot(batch.labels, 4).float())


def test_padding_never_shows():
    # The canvas is 0 outside the images, whose pixels are 50 or more.
    batch = batch_of([(9, 30), (40, 11), (1, 1), (40, 40)])
    geometry = Augment(crop=ALL.crop, affine=ALL.affine, flip=ALL.flip)
    images = augmenter(geometry).images(batch)
    assert images.min() > 49 / 255


def test_resizing_matches_torch_interpolate():
    batch = batch_of([(10, 10)] * 2)
    images = augmenter(Augment(**PLAIN), out=25).evaluate(batch)
    source = batch.canvas().permute(0, 3, 1, 2) / 255
    expected = F.interpolate(source, size=25, mode="bilinear", align_corners=False)
    torch.testing.assert_close(images, expected, atol=1.01 / 255, rtol=0)  # torch's own, on uint8


def test_shrinking_averages_rather_than_skips_pixels():
    batch = batch_of([(32, 32)] * 2)
    source = batch.canvas().permute(0, 3, 1, 2) / 255
    warped = augmenter(Augment(affine=Affine(), **PLAIN), out=16).images(batch)
    torch.testing.assert_close(warped, F.avg_pool2d(source, 2), atol=1e-5, rtol=0)
    images = augmenter(Augment(**PLAIN), out=16).evaluate(batch)
    expected = F.interpolate(source, size=16, mode="bilinear", antialias=True)
    torch.testing.assert_close(images, expected, atol=1.01 / 255, rtol=0)


def test_evaluation_keeps_fractions_of_pixels_where_they_count():
    # 90 % of 8 pixels is 7.2; widened to whole pixels it would be all of them.
    batch = batch_of([(8, 8)] * 2)
    images = augmenter(Augment(**PLAIN), out=8, crop_fraction=0.9).evaluate(batch)
    whole = augmenter(Augment(**PLAIN), out=8).evaluate(batch)
    assert not torch.allclose(images, whole, atol=0.01)


MIXED = [(400, 300), (33, 40), (48, 48), (16, 16), (9, 80), (33, 40)]


@pytest.mark.parametrize("device_path", [False, True])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_an_image_is_evaluated_as_it_would_be_alone(monkeypatch, device_path, flip):
    """Beside one whose crop lies between pixels, and beside one that shrinks more or less."""
    if device_path:  # as on a GPU, which warps all of them
        monkeypatch.setattr(pipeline, "nearly_whole", lambda boxes: np.zeros(len(boxes), bool))
    one = augmenter(Augment(**PLAIN))
    view = replace(one.eval_view, flip=flip)
    batch = batch_of(MIXED)
    together = one.crop_and_warp(batch, view).clone()
    for place in range(len(MIXED)):
        alone = one.crop_and_warp(batch.part(np.array([place])), view)
        torch.testing.assert_close(together[place : place + 1], alone, rtol=0, atol=2e-5)


def test_a_part_of_a_batch_has_the_samples_asked_for():
    frames = whole_frames(np.array(MIXED))
    batch = replace(batch_of(MIXED), stored=frames)
    part = batch.part(np.array([4, 1]))
    assert part.samples.tolist() == [4, 1]
    assert part.labels.tolist() == [batch.labels[4], batch.labels[1]]
    assert part.sizes.tolist() == [[9, 80], [33, 40]]
    assert part.frames.tolist() == frames[[4, 1]].tolist()
    images = batch.images()
    assert all(torch.equal(a, images[b]) for a, b in zip(part.images(), (4, 1), strict=True))


def test_a_micro_batch_of_training_is_resampled_in_one_way(monkeypatch):
    """As it always was: what has been trained can be trained again."""
    calls = []
    monkeypatch.setattr(pipeline, "warp", lambda b, *rest: calls.append(len(b.sizes)))
    one = augmenter(Augment(flip=0.5, **PLAIN))
    one.crop_and_warp(batch_of(MIXED), one.view)
    assert calls == [len(MIXED)]


def test_centre_crop():
    batch = batch_of([(20, 32)])
    images = augmenter(Augment(**PLAIN), out=10, crop_fraction=0.5).evaluate(batch)
    expected = batch.canvas()[:, 5:15, 11:21].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_the_result_depends_on_seed_step_and_micro_batch_alone():
    def result(seed=0, **place):
        return augmenter(ALL, seed=seed).train(batch_of([(20, 20)] * 6, **place))

    first = result(step=5, index=2)
    torch.rand(7)  # no global generator is involved
    again = result(step=5, index=2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for other in (result(step=6, index=2), result(step=5, index=3), result(1, step=5, index=2)):
        assert not torch.equal(first[0], other[0])


def test_mixup_targets_are_the_weights_of_the_images():
    # Constant images whose value is their label, so a pixel shows its own mixture.
    count = 8
    batch = batch_of([(4, 4)] * count)
    batch.canvas()[:] = (batch.labels * 60).to(torch.uint8)[:, None, None, None]
    images, targets = augmenter(Augment(mixup=0.5, **PLAIN), out=4).train(batch)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    expected = (targets * torch.arange(4)).sum(1) * 60 / 255
    torch.testing.assert_close(images[:, 0, 0, 0], expected, atol=1e-5, rtol=0)
    assert (targets.max(1).values < 0.999).any()


def test_flips_happen_as_often_as_asked():
    batch = batch_of([(4, 4)] * 400)
    images = augmenter(Augment(flip=0.3, **PLAIN), out=4).images(batch)
    source = batch.canvas().permute(0, 3, 1, 2) / 255
    flipped = (images - source.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    kept = (images - source).abs().amax((1, 2, 3)) < 1e-5
    assert (flipped ^ kept).all()
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.07)


def test_jitter_stays_in_range_and_grayscale_works():
    augment = Augment(jitter=Jitter(brightness=0.9, contrast=0.9), mean=[0.5], std=[0.2])
    batch = batch_of([(8, 8)] * 4, channels=1)
    images = augmenter(augment, out=8).images(batch)
    assert images.shape == (4, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


def test_contact_sheet_is_one_picture():
    sheet = contact_sheet(torch.rand(20, 3, 5, 6), columns=8)
    assert (sheet.shape, sheet.dtype) == ((10, 48, 3), np.uint8)


def test_the_memory_order_of_images_changes_none():
    batch = batch_of([(20, 24), (30, 18)])
    plain = augmenter(ALL)
    ordered = augmenter(ALL, memory_format=torch.channels_last)
    for a, b in ((plain.train(batch)[0], ordered.train(batch)[0]),
                 (plain.evaluate(batch), ordered.evaluate(batch))):  # fmt: skip
        assert a.is_contiguous()
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a, b)


def test_each_step_trains_on_images_of_its_size_and_evaluation_has_its_own():
    """Of the same draws: a step is what it would be if all were of its size."""
    grows = augmenter(ALL, 16, eval_size=24, growth=((0, 8), (3, 12), (5, 16)))
    for step, out in ((0, 8), (2, 8), (3, 12), (4, 12), (5, 16), (900, 16)):
        batch = batch_of([(40, 30), (20, 50)] * 2, step=step)
        images, targets = grows.train(batch)
        wanted, same = augmenter(ALL, out).train(batch)
        assert images.shape == (4, 3, out, out)
        assert torch.equal(images, wanted)
        assert torch.equal(targets, same)
        seen = grows.evaluate(batch)
        assert torch.equal(seen, augmenter(ALL, 24).evaluate(batch))


INVERT = [{"name": "invert", "p": 1.0}]


def strong(strengths=None, **augment):
    return augmenter(Augment(**PLAIN, **augment), strengths=strengths)


def test_a_class_takes_part_as_often_as_its_strength_says():
    """An image that does is changed as without strengths, whatever the others' classes are."""
    batch = batch_of([(16, 16)] * 400)  # of four classes in turn
    plain, every = strong().images(batch).clone(), strong(ops=INVERT).images(batch)
    changed = [1.0, 0.75, 0.25, 0.0]
    found = strong(changed, ops=INVERT).images(batch)
    took = [torch.equal(image, full) for image, full in zip(found, every, strict=True)]
    left = [torch.equal(image, whole) for image, whole in zip(found, plain, strict=True)]
    assert all(one != other for one, other in zip(took, left, strict=True))
    shares = np.array(took).reshape(100, 4).mean(0)
    np.testing.assert_allclose(shares, changed, atol=0.12)
    assert (shares[0], shares[3]) == (1, 0)
    others = strong([0.3, 0.75, 0.25, 1.0], ops=INVERT).images(batch)
    middle = torch.tensor([1, 2]).repeat(100) + torch.arange(0, 400, 4).repeat_interleave(2)
    assert torch.equal(found[middle], others[middle])


def test_full_strength_changes_nothing():
    ops = ["invert", "randaugment", "noise", "erasing"]
    jitter = Jitter(brightness=0.4, contrast=0.2)
    batch = batch_of([(20, 30)] * 8, step=3, index=2)
    one = strong(ops=ops, jitter=jitter, mixup=0.2).train(batch)
    other = strong([1.0] * 4, ops=ops, jitter=jitter, mixup=0.2).train(batch)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    none = strong([0.0] * 4, ops=ops, jitter=jitter, crop=Crop()).images(batch)
    assert torch.equal(none, strong(crop=Crop()).images(batch))
    # Each operation of a name draws for itself who takes part.
    twice = strong([0.5] * 4, ops=INVERT * 2).images(batch_of([(16, 16)] * 40))
    assert not torch.equal(twice, strong().images(batch_of([(16, 16)] * 40)))
