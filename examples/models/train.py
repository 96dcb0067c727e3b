"""Train the two example pipelines, fashion-sd and fashion-dit, on Fashion-MNIST from scratch.

Three steps, each resumable; everything is written to a scratch folder, which export.py reads:

    python train.py vae      # the autoencoder, then the latents of the whole training set
    python train.py sd       # text encoder and UNet
    python train.py dit      # class-conditional transformer

Training lasts a given number of minutes, not steps: the learning rate follows the fraction of the
time that is spent, so a run ends well on a slow or a shared machine too.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from fashion import (
    DEBIAN,
    NULL_CLASS,
    WORK,
    all_captions,
    attributes,
    draw_captions,
    images,
    labels,
    make_dit,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss

SNR_CAP = 5.0  # min-SNR weighting, https://arxiv.org/abs/2303.09556


def batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield shuffled index batches for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % size].split(size)


def learning_rate(peak: float, step: int, done: float) -> float:
    """Warm up for 200 steps, then follow a cosine over the fraction of the time that is done."""
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * math.cos(done * math.pi / 2) ** 2)


@torch.no_grad()
def average(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the averaged weights a little towards the model's."""
    for k, v in model.state_dict().items():
        ema[k].lerp_(v, 1 - decay)


@dataclass(frozen=True)
class Recipe:
    """Peak learning rate, batch size, and the decay of the averaged weights."""

    lr: float
    batch: int
    ema_decay: float


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    n: int,
    recipe: Recipe,
    args: argparse.Namespace,
) -> None:
    """Minimise a loss over `n` samples for `args.minutes`; save averaged weights in `<name>.pt`.

    The state is saved every two minutes, and a later call resumes from it.
    """
    opt = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    path, curve = args.work / f"{name}.pt", args.work / f"{name}.csv"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
    else:
        curve.write_text("step,minutes,images,loss\n")

    def save() -> None:
        state = {"model": model.state_dict(), "opt": opt.state_dict(), "ema": ema}
        torch.save(state | {"step": step, "spent": spent}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    losses, saved = [], spent
    for rows in batches(n, recipe.batch, seed=step):
        began, done = time.monotonic(), spent / (60 * args.minutes)
        if done >= 1:
            break
        opt.param_groups[0]["lr"] = learning_rate(recipe.lr, step, done)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        step += 1
        average(ema, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        spent += time.monotonic() - began
        if step % 50 == 0:
            row = [step, f"{spent / 60:.2f}", step * recipe.batch, f"{np.mean(losses):.5f}"]
            with curve.open("a") as f:
                csv.writer(f).writerow(row)
            losses.clear()
        if spent - saved > 120:
            save()
            saved = spent
    save()


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder, centre and scale its latents, encode the training set."""
    x = images(args.data, "train")
    vae = make_vae()

    def edges(a: Tensor) -> Tensor:
        return torch.cat([a.diff(dim=2).flatten(1), a.diff(dim=3).flatten(1)], 1)

    def loss_of(rows: Tensor) -> Tensor:
        real = x[rows]
        posterior = vae.encode(real).latent_dist
        fake = vae.decode(posterior.sample()).sample.float()
        sharp = (edges(fake) - edges(real)).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return (fake - real).abs().mean() + mse_loss(fake, real) + sharp + 5e-4 * kl

    train("vae", vae, loss_of, len(x), Recipe(lr=2e-3, batch=32, ema_decay=0.995), args)
    export_latents(args, x)


@torch.no_grad()
def export_latents(args: argparse.Namespace, x: Tensor) -> None:
    """Write the averaged autoencoder, made to give centred latents, and the latents of `x`.

    Each channel's mean and spread are folded into the two 1x1 convolutions around the latent, so
    one scaling factor for all channels is exact.
    """
    vae = make_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt")["ema"])
    vae.eval()

    def encode() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([vae.encode(b).latent_dist.mean.float() for b in x.split(500)])

    z = encode()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    relative = std / std.mean()
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    to_latent.weight[:4] /= relative[:, None, None, None]
    to_latent.bias[:4] = (to_latent.bias[:4] - mean) / relative
    to_latent.bias[4:] -= 2 * relative.log()
    from_latent.bias += from_latent.weight[:, :, 0, 0] @ mean
    from_latent.weight *= relative[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / std.mean().item(), 5))
    vae.save_pretrained(args.work / "vae")
    z = (z - mean[:, None, None]) / relative[:, None, None] * vae.config.scaling_factor
    torch.save(z, args.work / "latents.pt")
    print("latent std", z.std((0, 2, 3)), "scaling", vae.config.scaling_factor)


def denoising_loss(predict: Callable[[Tensor, Tensor], Tensor], z: Tensor) -> Tensor:
    """Compute the v-prediction loss at random timesteps, weighted by min-SNR."""
    alphas = make_scheduler().alphas_cumprod
    # One draw per stratum of the timestep range: less variance than independent draws.
    t = ((torch.arange(len(z)) + torch.rand(len(z))) * (1000 / len(z))).long()
    alpha, noise = alphas[t][:, None, None, None], torch.randn_like(z)
    noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    error = (predict(noisy, t).float() - target).square().mean((1, 2, 3))
    snr = alphas[t] / (1 - alphas[t])
    return (error * snr.clamp(max=SNR_CAP) / (snr + 1)).mean()


def train_sd(args: argparse.Namespace) -> None:
    """Train the UNet and its text encoder on the latents and generated captions."""
    z = torch.load(args.work / "latents.pt")
    attrs = attributes(images(args.data, "train"), labels(args.data, "train"))
    tokenizer, unet = make_tokenizer(), make_unet()
    text_encoder = make_text_encoder(tokenizer)
    tokens = tokenizer(all_captions(), padding="max_length", return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(torch.seed())

    def loss_of(rows: Tensor) -> Tensor:
        drawn, where = draw_captions(attrs[rows], generator).unique(return_inverse=True)
        text = text_encoder(tokens[drawn]).last_hidden_state[where]
        return denoising_loss(lambda x, t: unet(x, t, text).sample, z[rows])

    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    plain_attention(both)
    train("sd", both, loss_of, len(z), Recipe(lr=1e-3, batch=64, ema_decay=0.999), args)


def train_dit(args: argparse.Namespace) -> None:
    """Train the transformer on the latents and class numbers."""
    z, classes = torch.load(args.work / "latents.pt"), labels(args.data, "train")
    dit = make_dit()
    # AdaLN-zero: every block starts as the identity.
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(dit.proj_out_2.weight)
    plain_attention(dit)
    fast = torch.compile(dit)  # a quarter faster; the UNet gains nothing

    def loss_of(rows: Tensor) -> Tensor:
        c = classes[rows].masked_fill(torch.rand(len(rows)) < 0.1, NULL_CLASS)
        return denoising_loss(lambda x, t: fast(x, timestep=t, class_labels=c).sample, z[rows])

    train("dit", dit, loss_of, len(z), Recipe(lr=1e-3, batch=64, ema_decay=0.999), args)


def plain_attention(model: nn.Module) -> None:
    """Write attention out as matmuls: on the CPU the fused kernel's backward is slower."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def main() -> None:
    """Run the step named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("vae", "sd", "dit"))
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files")
    parser.add_argument("--work", type=Path, default=WORK, help="scratch folder")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    {"vae": train_vae, "sd": train_sd, "dit": train_dit}[args.step](args)


if __name__ == "__main__":
    main()
