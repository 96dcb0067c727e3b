"""Write the trained models as fp16 diffusers pipelines, their logs, and a plot of the logs.

    python export.py

The averaged weights of the last checkpoint are exported, also while training goes on.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from fashion import (
    CLASSES,
    HERE,
    WORK,
    make_dit,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from matplotlib import pyplot
from torch import nn


def export_sd(work: Path) -> None:
    """Write the text-conditional pipeline."""
    tokenizer, unet = make_tokenizer(), make_unet()
    text_encoder = make_text_encoder(tokenizer)
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    both.load_state_dict(torch.load(work / "sd.pt")["ema"])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipe, HERE / "fashion-sd", work)


def export_dit(work: Path) -> None:
    """Write the class-conditional pipeline."""
    dit = make_dit()
    dit.load_state_dict(torch.load(work / "dit.pt")["ema"])
    vae = AutoencoderKL.from_pretrained(work / "vae")
    save(DiTPipeline(dit, vae, make_scheduler()), HERE / "fashion-dit", work)


def save(pipe: DiffusionPipeline, to: Path, work: Path) -> None:
    """Save a pipeline in fp16, without leaving a half-written folder in anyone's way."""
    new, old = work / f"{to.name}.new", work / f"{to.name}.old"
    shutil.rmtree(new, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(new)
    for path in new.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.suffix == ".json":
            edit_config(path)
    if (new / "tokenizer").exists():  # transformers 4 reads these two files
        pipe.tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))
    shutil.rmtree(old, ignore_errors=True)
    if to.exists():
        shutil.move(to, old)
    shutil.move(new, to)


def edit_config(path: Path) -> None:
    """Drop the local path that diffusers notes, add the class names that it forgets.

    Transformers would load the text encoder in the noted type, while diffusers loads in fp32 unless
    told otherwise: the two must agree.
    """
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    if config.get("_class_name") == "DiTPipeline":
        config["id2label"] = dict(enumerate(CLASSES))
    path.write_text(json.dumps(config, indent=2) + "\n")


def plot(work: Path) -> None:
    """Copy the logs here and draw the loss curves."""
    names = [n for n in ("vae", "sd", "dit") if (work / f"{n}.csv").exists()]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        to = HERE / f"curve-{name}.csv"
        shutil.copy(work / f"{name}.csv", to)
        curve = np.genfromtxt(to, delimiter=",", names=True)
        axis.semilogy(curve["images"] / 60_000, curve["loss"], linewidth=0.8)
        axis.set(
            title=f"{name}, {curve['minutes'][-1]:.0f} minutes", xlabel="epochs", ylabel="loss"
        )
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=80)


def main() -> None:
    """Export what has been trained so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="scratch folder")
    work = parser.parse_args().work
    if (work / "sd.pt").exists():
        export_sd(work)
    if (work / "dit.pt").exists():
        export_dit(work)
    plot(work)


if __name__ == "__main__":
    main()
