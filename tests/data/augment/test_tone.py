"""Operations on values, filters and noise, against Pillow and torchvision on steps of 1/255."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment as timm

from bigbatch.data.augment import filters, noise, tone
from bigbatch.data.augment.colour import hsv, shift_channels

SHAPE = (6, 3, 20, 17)


@pytest.fixture
def bytes_():
    """uint8 images: noise, few shades, one shade, a ramp."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8))
    images[1] = images[1] % 7 * 20 + 40
    images[2] = 93
    images[3] = torch.arange(17, dtype=torch.uint8) * 3 + 100
    images[4, 0] = 0
    images[5] //= 3
    return images


def floats(images):
    return images.float() / 255


def pictures(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)


def assert_steps(found, expected, most=0.0):
    """Off by `most` steps of 1/255 at the most; float32 has 2e-4 of a step."""
    difference = (found * 255 - expected.float()).abs().max().item()
    assert difference <= most + 1e-3


@pytest.mark.parametrize(
    ("ours", "theirs", "pillow"),
    [
        (tone.equalize, tv.equalize, ImageOps.equalize),
        (tone.invert, tv.invert, ImageOps.invert),
    ],
)
def test_steps_are_exactly_those_of_pillow_and_torchvision(bytes_, ours, theirs, pillow):
    found = ours(floats(bytes_))
    assert_steps(found, theirs(bytes_))
    for image, picture in zip(found, pictures(bytes_), strict=True):
        assert_steps(image, tensor(pillow(picture)))


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_posterize_is_exact(bytes_, bits):
    found = tone.posterize(floats(bytes_), values(*[bits] * 6))
    assert_steps(found, tv.posterize(bytes_, bits))
    picture = pictures(bytes_)[0]
    assert_steps(found[0], tensor(ImageOps.posterize(picture, bits)))


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255, 256])
def test_solarize_is_exact(bytes_, threshold):
    found = tone.solarize(floats(bytes_), values(*[threshold] * 6))
    if threshold < 256:  # torchvision takes none that nothing reaches
        assert_steps(found, tv.solarize(bytes_, threshold))
    assert_steps(found[0], tensor(ImageOps.solarize(pictures(bytes_)[0], threshold)))


def test_each_image_has_values_of_its_own(bytes_):
    bits, thresholds = values(1, 2, 3, 4, 5, 6), values(10, 50, 90, 130, 170, 256)
    for change, given in ((tone.posterize, bits), (tone.solarize, thresholds)):
        together = change(floats(bytes_), given)
        alone = [change(floats(bytes_[i : i + 1]), given[i : i + 1]) for i in range(6)]
        assert torch.equal(together, torch.cat(alone))


def test_solarize_add_is_timms(bytes_):
    found = tone.solarize_add(floats(bytes_), values(*[90] * 6))
    for image, picture in zip(found, pictures(bytes_), strict=True):
        assert_steps(image, tensor(timm.solarize_add(picture, 90)))


def test_autocontrast_is_theirs_to_a_step(bytes_):
    """They cut fractions of a step off."""
    found = tone.autocontrast(floats(bytes_))
    assert_steps(found, tv.autocontrast(bytes_), most=1)
    for image, picture in zip(found, pictures(bytes_), strict=True):
        assert_steps(image, tensor(ImageOps.autocontrast(picture)), most=1)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.9])
@pytest.mark.parametrize(
    ("ours", "theirs", "pillow", "most"),
    [
        (tone.brightness, tv.adjust_brightness, ImageEnhance.Brightness, 1),
        # Both round the mean, and one cuts it off, before the factor multiplies it.
        (tone.contrast, tv.adjust_contrast, ImageEnhance.Contrast, 2),
        (tone.color, tv.adjust_saturation, ImageEnhance.Color, 2),
        (filters.sharpness, tv.adjust_sharpness, ImageEnhance.Sharpness, 2),
    ],
)
def test_blends_are_theirs_to_a_step_or_two(bytes_, ours, theirs, pillow, most, factor):
    found = ours(floats(bytes_), values(*[factor] * 6))
    assert_steps(found, theirs(bytes_, factor), most)
    for image, picture in zip(found, pictures(bytes_), strict=True):
        assert_steps(image, tensor(pillow(picture).enhance(factor)), most)
    if factor == 1:
        torch.testing.assert_close(found, floats(bytes_))


def test_grayscale_is_torchvisions(bytes_):
    found = tone.grayscale(floats(bytes_))
    assert_steps(found, tv.rgb_to_grayscale(bytes_, 3), most=1.1)  # it cuts off


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_torchvisions(bytes_, sigma):
    found = filters.blur(floats(bytes_), values(*[sigma] * 6), 2.0)
    expected = tv.gaussian_blur(floats(bytes_), [13, 13], [sigma, sigma])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_kernel_wider_than_its_image_reaches_its_edge():
    images = torch.rand(2, 1, 4, 4)
    found = filters.blur(images.clone(), values(2, 0.01), 20.0)
    assert found.shape == images.shape
    torch.testing.assert_close(found[1], images[1])


def test_hsv_against_python():
    import colorsys

    images = torch.rand(3, 3, 5, 4, dtype=torch.float32)
    turns, saturations, lights = values(0.2, -0.4, 0), values(0.5, 1.5, 1), values(0.7, 1.3, 1)
    found = hsv(images.clone(), turns, saturations, lights)
    for b in range(3):
        for y in range(5):
            for x in range(4):
                h, s, v = colorsys.rgb_to_hsv(*images[b, :, y, x].tolist())
                h = (h + turns[b].item()) % 1
                s, v = min(1, s * saturations[b].item()), min(1, v * lights[b].item())
                expected = torch.tensor(colorsys.hsv_to_rgb(h, s, v))
                torch.testing.assert_close(found[b, :, y, x], expected, atol=2e-5, rtol=0)


def test_channels_are_shifted_and_kept_in_range():
    found = shift_channels(
        torch.full((2, 3, 2, 2), 0.5), torch.tensor([[0.1, 0, -0.2], [0.6, 0, -1]])
    )
    expected = torch.tensor([[0.6, 0.5, 0.3], [1, 0.5, 0]])
    torch.testing.assert_close(found[:, :, 1, 0], expected)


def test_one_channel_passes_through_all_of_them():
    images = torch.rand(2, 1, 8, 8)
    for change in (tone.brightness, tone.contrast, tone.color, filters.sharpness):
        found = change(images.clone(), values(0.5, 1.5))
        assert found.shape == images.shape
    assert torch.equal(tone.color(images.clone(), values(0.5, 1.5)), images)


class TestNoise:
    def keys(self, count=4, seed=0):
        generator = np.random.default_rng(seed)
        return torch.from_numpy(generator.integers(-(2**31), 2**31, (count, 2)).astype(np.int32))

    def test_is_normal(self):
        found = noise.normals(self.keys(), torch.Size((4, 3, 100, 101))).double()
        assert found.mean((1, 2, 3)).abs().max() < 0.02
        assert (found.std((1, 2, 3)) - 1).abs().max() < 0.02
        assert (found.pow(4).mean((1, 2, 3)) - 3).abs().max() < 0.25
        share = (found.abs() < 0.6745).double().mean((1, 2, 3))
        assert (share - 0.5).abs().max() < 0.015

    def test_pixels_images_and_keys_are_independent(self):
        found = noise.normals(self.keys(), torch.Size((4, 3, 64, 64))).double().flatten(1)
        for lag in (1, 2, 63, 64, 4096):
            together = (found[:, lag:] * found[:, :-lag]).mean(1)
            assert together.abs().max() < 0.04
        assert (torch.corrcoef(found) - torch.eye(4)).abs().max() < 0.04
        near = self.keys()[:1].repeat(3, 1)  # keys one bit apart
        near[1, 0] ^= 1
        near[2, 1] ^= 1
        other = noise.normals(near, torch.Size((3, 1, 64, 64))).double().flatten(1)
        assert (torch.corrcoef(other) - torch.eye(3)).abs().max() < 0.06

    def test_the_hash_is_wellonss(self):
        """In Python's own integers."""
        x = torch.tensor([0, 1, -1, 123456789, -(2**31)], dtype=torch.int32)
        for number, found in zip(x.tolist(), noise._hash(x.clone()).tolist(), strict=True):
            h = number % 2**32
            h = ((h ^ h >> 16) * 0x21F0AAAD) % 2**32
            h = ((h ^ h >> 15) * 0xD35A2D97) % 2**32
            assert found % 2**32 == h ^ h >> 15

    def test_odd_numbers_of_pixels(self):
        odd = noise.normals(self.keys(), torch.Size((4, 1, 3, 3)))
        even = noise.normals(self.keys(), torch.Size((4, 1, 2, 5)))
        assert torch.equal(odd.flatten(1), even.flatten(1)[:, :9])
