"""The configurations: the reference, policies, `auto`, and fewer steps with several schedulers."""

import re

from examples.study.study import REFERENCE

CONFIGS = (
    REFERENCE,
    *(f"auto,speedup={n}" for n in (1.5, 2, 2.5, 3)),
    *(f"deepcache,interval={n}" for n in (2, 3, 5)),
    "deepcache,interval=5,nonuniform=true",
    "faster-diffusion",
    *(f"fora,interval={n}" for n in (2, 3, 4)),
    *(f"delta-dit,interval={n}" for n in (2, 3)),
    *(f"t-gate,gate={n}" for n in (10, 25)),
    "t-gate,gate=10,sp-interval=5,fi-interval=1",
    *(f"taylorseer,interval={n},order=1" for n in (2, 3, 4, 5)),
    *(f"taylorseer,interval={n},order=2" for n in (3, 5)),
    *(f"smoothcache,alpha={a}" for a in (0.08, 0.18, 0.35)),
    *(f"magcache,threshold={t}" for t in (0.06, 0.12, 0.24)),
    "mask,11111111111010101010" + "100" * 10,
    *(
        f"unroll(steps={n},scheduler={name})"
        for name in ("DDIM", "DPMSolverMultistep", "UniPCMultistep")
        for n in (33, 25, 20, 17, 12)
    ),
)


def kind(config: str) -> str:
    """Return the kind of a configuration."""
    if config == REFERENCE:
        return REFERENCE
    word = re.match(r"[\w-]+", config)
    return {"auto": "auto", "unroll": "fewer steps"}.get(word[0] if word else "", "policy")


def shown(config: str) -> str:
    """Return a configuration as pipeline text."""
    return config if kind(config) in (REFERENCE, "fewer steps") else f"cache({config})"
