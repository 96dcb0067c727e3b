"""Measure the two example models against the held-out images, and draw a grid of samples of each.

    python evaluate.py

Writes quality.json, fashion-sd.png and fashion-dit.png beside this file. For every set of images:

- `kid`, `kid_std`: kernel distance to the 10,000 held-out images (see diffopt/metrics.py).
  The floor is that of as many real training images; no model gets below it.
- `class_rate`: how often a linear probe, fitted on half of the held-out images, finds the class
  that was asked for. Its rate on the other half, real images, is the ceiling.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from fashion import CLASSES, DEBIAN, HERE, WORK, images, labels
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot

from diffopt import metrics

STEPS = 50
GUIDANCE = {"fashion-sd": 2.0, "fashion-dit": 2.0}
SIZE = 128  # a 32-pixel image enlarged to the network's usual 224 only costs more time


def draw(name: str, classes: list[int], seed: int) -> Tensor:
    """Sample one image of each class number, as a tensor [n, 1, 32, 32] from 0 to 1."""
    pipe = DiffusionPipeline.from_pretrained(HERE / name)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE[name], "output_type": "pt"}
    found = []
    generator = torch.manual_seed(seed)
    for part in torch.tensor(classes).split(100):
        what = [CLASSES[c] for c in part] if name == "fashion-sd" else part.tolist()
        found.append(pipe(what, generator=generator, **how)[0])
    return torch.cat(found)


def grid(samples: Tensor, path: Path) -> None:
    """Write samples as a PNG of 10 columns, enlarged three times."""
    rows = torch.cat([torch.cat(list(row[:, 0]), 1) for row in samples.split(10)])
    image = Image.fromarray((rows * 255).round().byte().numpy())
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def probe(x: Tensor, classes: Tensor) -> Tensor:
    """Fit a linear classifier to features by ridge regression."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    target = one_hot(classes, len(CLASSES)).double()
    return torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ target)


def class_rate(weight: Tensor, x: Tensor, classes: Tensor) -> float:
    """Say how often the probe finds the wanted class."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    return round(((x @ weight).argmax(1) == classes).double().mean().item(), 4)


def held_out(args: argparse.Namespace) -> Tensor:
    """Compute the features of the held-out images, or read those of an earlier run."""
    cache = args.work / f"held-out-{SIZE}.pt"
    if not cache.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save(metrics.features(images(args.data, "t10k") / 2 + 0.5, size=SIZE), cache)
    return torch.load(cache)


@torch.no_grad()
def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files")
    parser.add_argument("--work", type=Path, default=WORK, help="scratch folder")
    parser.add_argument("--samples", type=int, default=1000, help="images per set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grids", action="store_true", help="draw the grids only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    for name in GUIDANCE:
        grid(draw(name, list(range(10)) * 6, seed=0), HERE / f"{name}.png")
    if args.grids:
        return

    wanted = torch.arange(args.samples) % len(CLASSES)
    real, real_classes = held_out(args), labels(args.data, "t10k")
    weight = probe(real[::2], real_classes[::2])
    result: dict[str, object] = {
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "samples": args.samples,
        "class_rate of real held-out images": class_rate(weight, real[1::2], real_classes[1::2]),
    }

    def measure(what: str, samples: Tensor, classes: Tensor) -> None:
        x = metrics.features(samples, size=SIZE)
        mean, std = metrics.kid(x, real)
        rate = class_rate(weight, x, classes)
        result[what] = {"kid": round(mean, 5), "kid_std": round(std, 5), "class_rate": rate}
        (HERE / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
        print(what, result[what])

    x, x_classes = images(args.data, "train")[: args.samples], labels(args.data, "train")
    measure("real training images (floor)", x / 2 + 0.5, x_classes[: args.samples])
    vae = AutoencoderKL.from_pretrained(HERE / "fashion-sd" / "vae")
    decoded = vae.decode(vae.encode(x).latent_dist.mean).sample / 2 + 0.5
    measure("the same through the autoencoder", decoded.clamp(0, 1), x_classes[: args.samples])
    for name in GUIDANCE:
        measure(name, draw(name, wanted.tolist(), seed=1), wanted)


if __name__ == "__main__":
    main()
