"""Measure the two example models against the held-out images, and draw a grid of samples of each.

    python evaluate.py                                             # one after the other, or
    python evaluate.py real & python evaluate.py fashion-dit & …   # at the same time

Writes quality.json, fashion-sd.png and fashion-dit.png beside this file. For every set of images:

- `kid`, `kid_std`: kernel distance to the 10,000 held-out images (see
  diffopt/cli/image_metrics.py).
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

from diffopt.cli import image_metrics

STEPS = 50
GUIDANCE = {"fashion-sd": 2.0, "fashion-dit": 2.0}
SIZE = 128  # a 32-pixel image enlarged to the network's usual 224 only costs more time


def draw(name: str, classes: list[int], seed: int) -> Tensor:
    """Sample one image of each class number, as a tensor [n, 1, 32, 32] from 0 to 1."""
    pipe = DiffusionPipeline.from_pretrained(HERE / name)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE[name], "output_type": "pt"}
    images = []
    generator = torch.manual_seed(seed)
    for part in torch.tensor(classes).split(100):
        what = [CLASSES[c] for c in part] if name == "fashion-sd" else part.tolist()
        images.append(pipe(what, generator=generator, **how)[0])
    return torch.cat(images)


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
        torch.save(image_metrics.features(images(args.data, "t10k") / 2 + 0.5, size=SIZE), cache)
    return torch.load(cache)


def real_sets(args: argparse.Namespace) -> dict[str, Tensor]:
    """Give real training images, and the same through the autoencoder."""
    x = images(args.data, "train")[: args.samples]
    vae = AutoencoderKL.from_pretrained(HERE / "fashion-sd" / "vae")
    decoded = [vae.decode(vae.encode(b).latent_dist.mean).sample for b in x.split(100)]
    return {
        "real training images": x / 2 + 0.5,
        "the same through the autoencoder": (torch.cat(decoded) / 2 + 0.5).clamp(0, 1),
    }


@torch.no_grad()
def main() -> None:
    """Measure everything that is asked for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ("real", *GUIDANCE)
    parser.add_argument("sets", nargs="*", help=f"which of {', '.join(choices)}; default all")
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files")
    parser.add_argument("--work", type=Path, default=WORK, help="scratch folder")
    parser.add_argument("--samples", type=int, default=1000, help="images per set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grids", action="store_true", help="draw the grids only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sets = args.sets or choices

    for name in [n for n in GUIDANCE if n in sets]:
        grid(draw(name, list(range(10)) * 6, seed=0), HERE / f"{name}.png")
    if args.grids:
        return

    real, classes = held_out(args), labels(args.data, "t10k")
    weight = probe(real[::2], classes[::2])

    def write(what: str, entry: object) -> None:
        path = HERE / "quality.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {what: entry}, indent=2) + "\n")
        print(what, entry)

    def measure(what: str, samples: Tensor, wanted: Tensor) -> None:
        x = image_metrics.features(samples, size=SIZE)
        mean, std = image_metrics.kid(x, real)
        rate = class_rate(weight, x, wanted)
        write(what, {"kid": round(mean, 4), "kid_std": round(std, 4), "class_rate": rate})

    if "real" in sets:
        write("setup", {"steps": STEPS, "guidance_scale": GUIDANCE, "samples": args.samples})
        write("class_rate of held-out images", class_rate(weight, real[1::2], classes[1::2]))
        train_classes = labels(args.data, "train")[: args.samples]
        for what, samples in real_sets(args).items():
            measure(what, samples, train_classes)
    wanted = torch.arange(args.samples) % len(CLASSES)
    for name in [n for n in GUIDANCE if n in sets]:
        measure(name, draw(name, wanted.tolist(), seed=1), wanted)


if __name__ == "__main__":
    main()
