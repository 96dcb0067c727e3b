"""Define the example models and their data: images, captions, networks, tokenizer, sampler."""

import gzip
import tempfile
from itertools import product
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
WORK = Path(tempfile.gettempdir()) / "fashion-train"  # checkpoints and latents
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
TONES = ("dark", "", "light")  # terciles of the item's brightness within its class
SURFACES = ("plain", "", "patterned")  # terciles of its fine detail within its class
TEMPLATES = ("{}", "a {}", "a photo of a {}")
NULL_CLASS = 1000  # DiTPipeline's unconditional class, as of ImageNet


# --- data -----------------------------------------------------------------------------------------


def images(data: Path, split: str) -> Tensor:
    """Read a split ("train" or "t10k") as float images in [-1, 1], padded to 32 pixels."""
    raw = gzip.decompress((data / f"{split}-images-idx3-ubyte.gz").read_bytes())
    pixels = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28)
    return pad(pixels.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)


def labels(data: Path, split: str) -> Tensor:
    """Read the class numbers of a split."""
    raw = gzip.decompress((data / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return torch.frombuffer(bytearray(raw[8:]), dtype=torch.uint8).long()


def terciles(values: Tensor, classes: Tensor) -> Tensor:
    """Say for each value whether it is in the low, middle or high third of its class (0, 1, 2)."""
    third = torch.empty_like(classes)
    for c in classes.unique():
        of_class = values[classes == c]
        cuts = torch.quantile(of_class, torch.tensor([1 / 3, 2 / 3]))
        third[classes == c] = torch.bucketize(of_class, cuts)
    return third


def attributes(x: Tensor, classes: Tensor) -> Tensor:
    """Describe each image as (class, tone, surface), the last two computed from its pixels."""
    item = (x > -0.9).float()
    area = item.sum((1, 2, 3)).clamp(min=1)
    tone = (x * item).sum((1, 2, 3)) / area
    detail = ((x - avg_pool2d(x, 3, 1, 1)).abs() * item).sum((1, 2, 3)) / area
    return torch.stack([classes, terciles(tone, classes), terciles(detail, classes)], 1)


def caption(template: str, tone: str, surface: str, name: str) -> str:
    """Put a caption together, with the right article."""
    words = " ".join(word for word in (tone, surface, name) if word)
    text = template.format(words)
    return text.replace("a ankle", "an ankle")


def all_captions() -> list[str]:
    """List every caption; the last one is empty, for classifier-free guidance."""
    return [caption(*c) for c in product(TEMPLATES, TONES, SURFACES, CLASSES)] + [""]


def draw_captions(attrs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a caption for each image, as an index into `all_captions()`."""
    n = len(attrs)
    name, tone, surface = attrs.unbind(1)
    hidden = torch.rand(2, n, generator=generator) < 0.4  # an adjective is often left out
    tone, surface = tone.masked_fill(hidden[0], 1), surface.masked_fill(hidden[1], 1)
    template = torch.randint(len(TEMPLATES), (n,), generator=generator)
    index = ((template * 3 + tone) * 3 + surface) * len(CLASSES) + name
    empty = torch.rand(n, generator=generator) < 0.1
    return index.masked_fill(empty, len(TEMPLATES) * 9 * len(CLASSES))


# --- models ---------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """Make the autoencoder, 32x32x1 to 8x8x4."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=32,
        force_upcast=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Make the text-conditional denoiser of fashion-sd."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=(2, 3),  # diffusers' old misnomer: the number of heads, 32 wide each
    )


def make_dit() -> DiTTransformer2DModel:
    """Make the class-conditional denoiser of fashion-dit."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        patch_size=2,
        sample_size=8,
        num_embeds_ada_norm=NULL_CLASS,
    )


def make_tokenizer() -> CLIPTokenizer:
    """Make a byte-level BPE tokenizer in which every word of the captions is one token."""
    words = sorted({w for c in all_captions() for w in c.replace("-", " ").split()})
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in codes] + [chr(256 + i) for i in range(256 - len(codes))]
    vocab = {t: i for i, t in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for right in [*word[1:-1], f"{word[-1]}</w>"][: len(word) - 1]:
            if (left, right) not in merges:
                merges.append((left, right))
                vocab.setdefault(left + right, len(vocab))
            left += right
    vocab |= {t: len(vocab) + i for i, t in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make the text encoder, trained together with the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Make the sampler; trailing steps, so that sampling begins at pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # no effect on trailing steps; pipelines warn about any other value
    )
