"""Compares cache policies with each other and with fewer steps; writes docs/caching.md's section.

    python examples/caching.py --phase quality --only fashion-sd --threads 1   # at the same time as
    python examples/caching.py --phase quality --only fashion-dit --threads 1  # this, and then
    python examples/caching.py --phase time            # by itself, on a machine that is idle

Every configuration is kept in docs/caching.json as soon as it is measured, and what is there is not
measured again, so a run that was stopped goes on where it was. Programs, images and features are
kept in --work. What `--again` names is made anew; after a change of a policy it is needed. With
`--phase` alone, only the section is written.
"""

import argparse
import fcntl
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import diffopt
from diffopt import bench, cachedir, metrics, tags
from diffopt import graph as g
from diffopt.core import Pipeline
from diffopt.errors import DiffoptError
from diffopt.loop import find_loop
from diffopt.program import Program

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "models")]
from benchmarks import machine, report  # noqa: E402
from fashion import CLASSES, DEBIAN, images  # noqa: E402

DOCUMENT = HERE.parent / "docs" / "caching.md"
BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"

# How each model is told what to draw.
MODELS = {"fashion-sd": "prompt", "fashion-dit": "class_labels"}
GUIDANCE = 2.0
SIZE = 128  # of the images that features are computed of, as in models/evaluate.py
CHUNK = 32  # requests of one run: more are no faster
GROUP = 3  # engines that are timed in turn with the reference's
OTHER_SEEDS = 1000  # the first seed of the reference's second set of images
CALIBRATION = 1_000_000  # far from all seeds that images are measured on

REFERENCE = "reference"
SPEEDUPS = (1.5, 2, 3)  # at which `auto` is compared with the others
SLACK = 1.03  # a rival may cost this much more: 17 of 50 steps are 2 % over a third
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
    """Return what a configuration stands for."""
    if config == REFERENCE:
        return REFERENCE
    word = re.match(r"[\w-]+", config)
    return {"auto": "auto", "unroll": "fewer steps"}.get(word[0] if word else "", "policy")


# Programs and images


class Study:
    """One model: its programs, images and features, each made once and kept on disk."""

    def __init__(self, name: str, steps: int, work: Path) -> None:
        self.name = name
        self.steps = steps
        self.folder = work / f"{name}-{steps}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._last: tuple[str, Program] | None = None

    def request(self, index: int, seed: int) -> dict[str, Any]:
        """Return the arguments of a call: classes take turns."""
        label = index % len(CLASSES)
        argument = MODELS[self.name]
        return {argument: CLASSES[label] if argument == "prompt" else [label], "seed": seed}

    @cached_property
    def pipe(self) -> Any:
        """The model's own pipeline."""
        pipe = DiffusionPipeline.from_pretrained(HERE / "models" / self.name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def _traced(self) -> Program:
        return diffopt.trace(self.pipe, **self._arguments(0, CALIBRATION - 1))

    def _arguments(self, index: int, seed: int) -> dict[str, Any]:
        request = self.request(index, seed)
        return {
            "generator": torch.Generator().manual_seed(request.pop("seed")),
            **request,
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE,
            "output_type": "np",
        }

    @cached_property
    def _unrolled(self) -> Program:
        return Pipeline.parse("unroll,hoist").run(self._traced, verify=False)

    def path(self, config: str, ending: str) -> Path:
        """Return the file that belongs to a configuration."""
        return self.folder / (re.sub(r"[^\w.=-]+", "_", config).strip("_") + ending)

    def forget(self, config: str) -> None:
        """Remove all files of a configuration."""
        endings = [f".{s}{e}" for s in (0, OTHER_SEEDS) for e in (".pt", ".features.pt")]
        for ending in (".program", ".json", *endings):
            self.path(config, ending).unlink(missing_ok=True)

    def program(self, config: str) -> Program:
        """Return the program of a configuration, for one request."""
        path = self.path(config, ".program")
        if not (path.exists() and self.path(config, ".json").exists()):
            self._make(config)
        return Program.load(path)

    def cost(self, config: str) -> dict[str, Any]:
        """Return what a configuration costs: FLOPs, and the seconds to find it."""
        if not self.path(config, ".json").exists():
            self._make(config)
        cost: dict[str, Any] = json.loads(self.path(config, ".json").read_text())
        return cost

    def _make(self, config: str) -> None:
        report(f"{self.name}, {config}: passes")
        if kind(config) == REFERENCE:
            program = self._unrolled
        elif kind(config) == "fewer steps":
            program = Pipeline.parse(f"{config},hoist").run(self._traced, verify=False)
        else:
            by_label = MODELS[self.name] != "prompt"
            prompts = [str(k) for k in range(len(CLASSES))] if by_label else CLASSES
            program = Pipeline.parse(shown(config)).run(
                self._unrolled, verify=False, seed=CALIBRATION, prompts=prompts
            )
        cost = {
            "denoiser": self._denoiser_flops(program),
            "seconds": program.history[-1]["seconds"] if kind(config) in ("auto", "policy") else 0,
            "notes": program.history[-1]["notes"],
        }
        program = Pipeline.parse("simplify,fuse").run(program, verify=False)
        program.save(self.path(config, ".program"))
        cost["program"] = program.flops()
        self.path(config, ".json").write_text(json.dumps(cost))

    def _denoiser_flops(self, program: Program) -> int:
        """Return the FLOPs of all calls of the loop's body, and of what a cache made of them."""
        (component,) = {
            own.component
            for call in find_loop(self._unrolled).calls.values()
            if (own := tags.tag(call)) is not None
        }
        calls = [
            str(call.target)
            for call in program.calls()
            if (own := tags.tag(call)) is not None and own.component == component
        ]
        return sum(g.flops(program.components[name]) for name in calls)

    def images(self, config: str, count: int, first: int, tell: Callable[[int], None]) -> Tensor:
        """Return the images of seeds from `first` on, as a tensor [count, 1, 32, 32]."""
        path = self.path(config, f".{first}.pt")
        made: Tensor = torch.load(path) if path.exists() else torch.empty(0, 1, 32, 32)
        while len(made) < count:
            batched = self._batched(config)
            tell(len(made))
            chunk = range(len(made), min(len(made) + CHUNK, count))
            requests = [self.request(k, first + k) for k in chunk]
            flat = [batched.prepare(**request) for request in requests]
            outputs = batched.run([torch.stack(rows) for rows in zip(*flat, strict=True)])
            new = [
                batched.pack([tensor[k] for tensor in outputs], "pt")[0] for k in range(len(chunk))
            ]
            made = torch.cat([made, *new])
            torch.save(made, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        return made[:count]

    def _batched(self, config: str) -> Program:
        if self._last is None or self._last[0] != config:
            # The graph fixes no number of requests: one of two is the cheapest to check.
            program = Pipeline.parse("batch(max=2)").run(self.program(config), verify=False)
            self._last = config, program
        return self._last[1]

    def features(self, config: str, made: Tensor, first: int) -> Tensor:
        """Return the features of a configuration's images."""
        return kept_features(self.path(config, f".{first}.features.pt"), made)

    def pipeline_error(self, made: Tensor) -> float:
        """Return the largest difference of the first images from the pipeline's own."""
        own = [self.pipe(**self._arguments(k, k))[0] for k in range(min(2, len(made)))]
        pixels = torch.cat([torch.as_tensor(x).movedim(-1, 1) for x in own])
        return float((pixels - made[: len(own)]).abs().max())


def kept_features(path: Path, made: Tensor) -> Tensor:
    """Return features of images, from disk if these were computed before."""
    if path.exists():
        kept = torch.load(path)
        if torch.equal(kept["sum"], made.double().sum((1, 2, 3))):
            known: Tensor = kept["features"]
            return known
    found = metrics.features(made, size=SIZE)
    torch.save({"features": found, "sum": made.double().sum((1, 2, 3))}, path)
    return found


# Measurements


class Results:
    """The JSON file; several processes may add to it."""

    def __init__(self, path: Path, lock: Path) -> None:
        self.path = path
        self._lock = lock

    def read(self) -> dict[str, Any]:
        """Return all results."""
        data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return data

    def put(self, value: Any, *keys: str) -> None:
        """Set one value, at a path of keys."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = self.read()
            inner = data
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = value
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(data, indent=1) + "\n")
            new.replace(self.path)

    def get(self, *keys: str) -> Any:
        """Return the value at a path of keys; None where there is none."""
        value: Any = self.read()
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


class Clock:
    """Says how much is done and how long the rest will take."""

    def __init__(self, what: str, count: int) -> None:
        self.what = what
        self.count = count
        self.started = time.monotonic()

    def tell(self, item: str, done: float) -> None:
        """Say that `done` of all items are done, a part of this one included."""
        spent = time.monotonic() - self.started
        left = f"about {(self.count - done) * spent / done / 60:.0f} min left" if done else ""
        report(f"{self.what}, {item}: {done:.1f} of {self.count} {left}".rstrip())


def left(results: Results, name: str, configs: Sequence[str], phase: str) -> list[str]:
    """Return which configurations a phase has yet to measure."""
    done = results.get("models", name, "configs") or {}
    return [c for c in configs if not {phase, "left out"} & done.get(c, {}).keys()]


def quality(study: Study, configs: Sequence[str], results: Results, count: int) -> None:
    """Measure the images of all configurations that are not in the results yet."""
    configs = left(results, study.name, configs, "quality")
    if not configs:
        return
    clock = Clock(f"{study.name}, images of the reference", 2)
    reference, other = (
        study.images(
            REFERENCE,
            count,
            first,
            lambda n, i=index: clock.tell(f"image {n} of {count}", i + n / count),
        )
        for index, first in enumerate((0, OTHER_SEEDS))
    )
    x, y = study.features(REFERENCE, reference, 0), study.features(REFERENCE, other, OTHER_SEEDS)
    held = held_out(study.folder.parent)
    if results.get("models", study.name, "floors") is None:
        floors = {
            "pipeline": study.pipeline_error(reference),
            "other seeds": compare(reference, x, other, y)["distance"],
            **({"real": kid(train(study.folder.parent, count), held)} if held is not None else {}),
        }
        results.put(floors, "models", study.name, "floors")
    clock = Clock(f"{study.name}, images", len(configs))
    for index, config in enumerate(configs):
        at = ("models", study.name, "configs", config)
        clock.tell(config, index)
        cost = cost_of(study, config, results)
        if cost is None:
            continue
        made = study.images(
            config,
            count,
            0,
            lambda n, i=index, c=config: clock.tell(f"{c}, image {n} of {count}", i + n / count),
        )
        own = study.features(config, made, 0)
        found = compare(made, own, reference, x)
        found["kid other seeds"] = kid(own, y)
        if held is not None:
            found["kid held-out"] = kid(own, held)
        results.put(cost, *at, "cost")
        results.put(found, *at, "quality")


def cost_of(study: Study, config: str, results: Results) -> dict[str, Any] | None:
    """Return what a configuration costs relative to the reference; None if it does not fit."""
    full = study.cost(REFERENCE)
    try:
        cost = study.cost(config)
    except DiffoptError as error:
        # A subclass says that the result is wrong, and not that the model is another.
        what = "left out" if type(error) is DiffoptError else "failed"
        report(f"{study.name}: {what} {config}: {error}")
        results.put(str(error), "models", study.name, "configs", config, what)
        return None
    return {
        **cost,
        "denoiser": cost["denoiser"] / full["denoiser"],
        "program": cost["program"] / full["program"],
    }


def compare(made: Tensor, own: Tensor, reference: Tensor, x: Tensor) -> dict[str, Any]:
    """Return how far images are from the reference's of the same seeds, each mean with its error.

    Args:
        made: The images.
        own: Their features.
        reference: The reference's images.
        x: Their features.
    """
    norm = torch.linalg.vector_norm
    pixels = norm((made - reference).flatten(1), dim=1) / norm(reference.flatten(1), dim=1)
    return {
        "distance": mean(metrics.feature_distance(own, x)),
        "pixels": mean(pixels),
    }


def mean(values: Tensor) -> list[float]:
    """Return the mean and its standard error."""
    return [float(values.mean()), float(values.std() / math.sqrt(len(values)))]


def kid(x: Tensor, y: Tensor) -> list[float]:
    """Return the kernel distance of features and its deviation over subsets of half the images."""
    return list(metrics.kid(x, y, subset_size=max(2, min(len(x), len(y)) // 2)))


def held_out(work: Path) -> Tensor | None:
    """Return the features of the 10,000 held-out images; None where the data is missing."""
    if not DEBIAN.exists():
        report(f"no KID against held-out images: install the data of {DEBIAN}")
        return None
    path = work / "held-out.pt"
    if not path.exists():
        report("features of the held-out images")
    return kept_features(path, images(DEBIAN, "t10k") / 2 + 0.5)


def train(work: Path, count: int) -> Tensor:
    """Return the features of real images that are not among the held-out ones."""
    return kept_features(work / "train.pt", images(DEBIAN, "train")[:count] / 2 + 0.5)


def times(study: Study, configs: Sequence[str], results: Results, rounds: int, target: str) -> None:
    """Time the engines of all configurations that are not in the results yet."""
    configs = [c for c in left(results, study.name, configs, "time") if c != REFERENCE]
    clock = Clock(f"{study.name}, times", len(configs))
    with tempfile.TemporaryDirectory() as name:
        for start in range(0, len(configs), GROUP):
            group = (REFERENCE, *configs[start : start + GROUP])
            found_costs = {c: cost_of(study, c, results) for c in group}
            costs = {c: cost for c, cost in found_costs.items() if cost is not None}
            contenders = {}
            for config in costs:
                clock.tell(f"building {config}", start)
                contenders[config] = engine(study, config, target, Path(name))
            clock.tell("timing", start)
            found = bench.measure(contenders, REFERENCE, rounds=rounds)
            for config, cost in costs.items():
                at = ("models", study.name, "configs", config)
                taken = {
                    "target": target,
                    "load": os.getloadavg()[0],
                    "seconds": found[config].seconds,
                    "reference": found[REFERENCE].seconds,
                }
                results.put(cost, *at, "cost")
                results.put(taken, *at, "time")


def engine(study: Study, config: str, target: str, folder: Path) -> bench.Make:
    """Build an engine for one request; return it as a function from a seed to images."""
    path = folder / study.path(config, ".engine").name
    built = diffopt.build(study.program(config), target, path)
    return lambda seed: built(**study.request(9, seed), output_type="pt")[0]


# The document


def section(data: Mapping[str, Any], folder: Path) -> str:
    """Return the results as the text between the markers; pictures are in the folder."""
    setup, at = data["setup"], data.get("machine", {})
    lines = [
        "`make bench-caching` writes this section; the raw numbers are in caching.json beside it.",
        "",
        f"The reference is the pipeline as it is: DDIM, {setup['steps']} steps, guidance"
        f" {GUIDANCE:g}, fp32. Images are those of {setup['images']} seeds, the same for all;"
        " policies that measure do so with other seeds. Distance is the mean over pairs of images"
        " of the same seed of |f(a) - f(b)| / |f(b)|, f the features of diffopt/metrics.py. KID"
        " is times 1000, ± its deviation over subsets; other seeds are images of the reference"
        " itself. In bold: no configuration has both fewer FLOPs and a smaller distance.",
    ]
    if at:
        lines += [
            "",
            f"Times are of one request on {at['cpu']}, {at['threads']} threads, torch"
            f" {at['torch']}, medians of engines that take turns with the reference's; in"
            " parentheses, the interquartile range. Promised is the ratio of the FLOPs of the"
            " whole program, text encoder and decoder included.",
        ]
    for name, own in data.get("models", {}).items():
        rows = {c: r for c, r in own["configs"].items() if "cost" in r}
        lines += ["", f"### {name}", "", *table(rows), "", *floor_lines(own, rows)]
        if duels(rows):
            lines += ["", *duel_table(rows)]
        lines += ["", *verdicts(rows), *kid_goal(own, rows), *left_out(own["configs"])]
        picture = picture_rows(rows)
        if (folder / f"caching-{name}.png").exists():
            names = ", ".join(f"`{c}`" for c in picture)
            lines += ["", f"![images](caching-{name}.png)", "", f"From the top: {names}."]
    return "\n".join(lines)


def table(rows: Mapping[str, Any]) -> list[str]:
    """Return a row for each configuration, the most FLOPs first."""
    lines = [
        "| configuration | FLOPs | | time, ms | measured | promised | distance | pixels"
        " | KID, held-out | KID, other seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    best = front(rows)
    for config, row in sorted(rows.items(), key=lambda item: -item[1]["cost"]["denoiser"]):
        part, quality = row["cost"]["denoiser"], row.get("quality", {})
        name = f"**`{shown(config)}`**" if config in best else f"`{shown(config)}`"
        cells = [
            name,
            f"{part:.3f}",
            f"{1 / part:.2f}×",
            *time_cells(row),
            *(number(quality.get(key), 1, 4) for key in ("distance", "pixels")),
            *(number(quality.get(key), 1000, 2) for key in ("kid held-out", "kid other seeds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(config: str) -> str:
    """Return a configuration as pipeline text."""
    return config if kind(config) in (REFERENCE, "fewer steps") else f"cache({config})"


def number(pair: Sequence[float] | None, scale: float, digits: int) -> str:
    """Return a number with its error."""
    if pair is None:
        return "-"
    return f"{pair[0] * scale:.{digits}f} ± {pair[1] * scale:.{digits}f}"


def time_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the time, and how much faster it is than the reference, measured and promised."""
    promised = f"{1 / row['cost']['program']:.2f}×"
    if "time" not in row:
        return ["-", "-", promised]
    low, middle, high = statistics.quantiles(row["time"]["seconds"], n=4, method="inclusive")
    return [f"{middle * 1e3:.1f} ({(high - low) * 1e3:.1f})", f"{measured(row):.2f}×", promised]


def measured(row: Mapping[str, Any]) -> float:
    """Return how many times faster a configuration is than the reference beside it."""
    at = row["time"]
    return statistics.median(at["reference"]) / statistics.median(at["seconds"])


def distance(row: Mapping[str, Any]) -> float:
    """Return the distance from the reference; infinite where it was not measured."""
    return float(row["quality"]["distance"][0]) if "quality" in row else math.inf


def front(rows: Mapping[str, Any]) -> set[str]:
    """Return what no other is better than in FLOPs and distance at once."""
    points = {c: (r["cost"]["denoiser"], distance(r)) for c, r in rows.items() if "quality" in r}
    return {
        c
        for c, own in points.items()
        if c != REFERENCE
        and not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in points.values())
    }


def best_of(rows: Mapping[str, Any], group: str, speedup: float) -> str | None:
    """Return the configuration of a group that is nearest to the reference at this speedup.

    It may cost as much as `auto` does, or 1 / speedup if that is more, and a little on top.
    """
    own = f"auto,speedup={speedup:g}"
    cost = max(1 / speedup, rows[own]["cost"]["denoiser"] if own in rows else 0)
    fitting = [
        c
        for c, r in rows.items()
        if kind(c) == group and "quality" in r and r["cost"]["denoiser"] <= cost * SLACK + 1e-6
    ]
    return min(fitting, key=lambda c: distance(rows[c]), default=None)


def duels(rows: Mapping[str, Any]) -> dict[float, tuple[str, str | None, str | None]]:
    """Return, by speedup, `auto` and the best of the fixed policies and of fewer steps."""
    return {
        s: (own, best_of(rows, "policy", s), best_of(rows, "fewer steps", s))
        for s in SPEEDUPS
        if "quality" in rows.get(own := f"auto,speedup={s:g}", {})
    }


def duel_table(rows: Mapping[str, Any]) -> list[str]:
    """Return `auto` beside its best rivals."""
    lines = [
        f"A rival may have {SLACK - 1:.0%} more FLOPs than `auto` has or than the speedup asks.",
        "",
        "| at | `auto`: FLOPs, distance | best fixed policy | best with fewer steps |",
        "| --- | --- | --- | --- |",
    ]
    for speedup, chosen in duels(rows).items():
        cells = [
            f"{rows[c]['cost']['denoiser']:.3f}, {distance(rows[c]):.4f}"
            + ("" if kind(c) == "auto" else f": `{shown(c)}`")
            if c
            else "none as cheap"
            for c in chosen
        ]
        lines.append(f"| {speedup:g}× | {' | '.join(cells)} |")
    return lines


def verdicts(rows: Mapping[str, Any]) -> list[str]:
    """Return what the numbers say, in sentences."""
    lines = []
    for speedup, (own, *rivals) in duels(rows).items():
        nearer = [c for c in rivals if c and distance(rows[c]) <= distance(rows[own])]
        text = " and ".join(f"`{shown(c)}`" for c in nearer)
        verb = "is" if len(nearer) == 1 else "are"
        lines.append(
            f"- At {speedup:g}× `auto` is behind: {text} {verb} nearer to the reference."
            if nearer
            else f"- At {speedup:g}× `auto` is ahead of every fixed policy and of fewer steps."
        )
    ratios = {
        c: measured(r) * r["cost"]["program"]
        for c, r in rows.items()
        if "time" in r and c != REFERENCE
    }
    if ratios:
        low = min(ratios, key=lambda c: ratios[c])
        good = sum(ratio >= 0.85 for ratio in ratios.values())
        lines.append(
            f"- {good} of {len(ratios)} engines reach 85 % of the speedup that their FLOPs promise;"
            f" the least is {ratios[low]:.0%}, of `{shown(low)}`."
        )
    return lines


def kid_goal(own: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """Return how `auto` at 2.5 times fewer FLOPs compares with the floors of KID."""
    config = "auto,speedup=2.5"
    row, base = (
        rows.get(c, {}).get("quality", {}).get("kid held-out") for c in (config, REFERENCE)
    )
    floor = own.get("floors", {}).get("real")
    if not (row and base and floor):
        return []
    words = [
        f"{name} {number(other, 1000, 2)}: it is {'' if row[0] <= 1.1 * other[0] else 'not '}within"
        " that plus 10 %"
        for name, other in (("the reference's", base), ("that of real images", floor))
    ]
    return [
        f"- `cache({config})` has {1 / rows[config]['cost']['denoiser']:.2f}× fewer FLOPs. Its KID"
        f" to held-out images is {number(row, 1000, 2)}; {'; '.join(words)}."
    ]


def floor_lines(own: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """Return what the numbers are to be compared with."""
    floors = own.get("floors", {})
    lines = []
    if REFERENCE in rows and "quality" in rows[REFERENCE]:
        base = rows[REFERENCE]["quality"]
        real = f", of real images {number(floors['real'], 1000, 2)}" if "real" in floors else ""
        lines += [
            f"- Floors of KID: of the reference to its own images of other seeds"
            f" {number(base['kid other seeds'], 1000, 2)}; to held-out images, of the reference"
            f" {number(base.get('kid held-out'), 1000, 2)}{real}.",
        ]
    if floors and "real" not in floors:
        lines.append("- The held-out images were not at hand: there is no KID to them.")
    if floors:
        lines += [
            f"- Two images of the reference of one class and different seeds have the distance"
            f" {number(floors['other seeds'], 1, 4)}. The reference's pixels differ from the"
            f" pipeline's own by at most {floors['pipeline']:.1e}.",
        ]
    return lines


def left_out(configs: Mapping[str, Any]) -> list[str]:
    """Return which configurations do not fit the model, and why: one line a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for config, row in configs.items():
        for what in {"left out", "failed"} & row.keys() if "cost" not in row else ():
            reasons.setdefault((what, row[what]), []).append(f"`{shown(config)}`")
    return [f"- {what.capitalize()}: {', '.join(n)}: {why}." for (what, why), n in reasons.items()]


def picture_rows(rows: Mapping[str, Any]) -> list[str]:
    """Return the configurations that the picture shows, from the top."""
    wanted = [REFERENCE, "auto,speedup=2", "auto,speedup=3"]
    wanted += [c for c in (best_of(rows, "policy", 3), best_of(rows, "fewer steps", 3)) if c]
    return [c for c in wanted if c in rows]


def draw(study: Study, rows: Mapping[str, Any], path: Path) -> None:
    """Write the first images of some configurations as a PNG, enlarged three times."""
    files = [study.path(c, ".0.pt") for c in picture_rows(rows)]
    if not files or not all(file.exists() for file in files):
        return
    grid = torch.cat([torch.cat(list(torch.load(file)[:10, 0]), 1) for file in files])
    image = Image.fromarray((grid * 255).round().byte().numpy())
    size = (image.width * 3, image.height * 3)
    image.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def rewrite(document: Path, data: Mapping[str, Any]) -> None:
    """Replace what is between the markers of the document."""
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise DiffoptError(f"{document}: has no lines {BEGIN} and {END} to write between")
    text = f"{before}{BEGIN}\n{section(data, document.parent)}\n{END}{after}"
    document.write_text(text, encoding="utf-8")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS))
    phases = ("quality", "time")
    parser.add_argument("--phase", choices=phases, nargs="*", default=phases, help="default: both")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="default: all")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="cpu", help="of the engines that are timed")
    parser.add_argument("--again", action="store_true", help="measure what is known once more")
    parser.add_argument("--work", type=Path, default=cachedir.folder() / "caching")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(words)
    for config in options.configs:
        if config != REFERENCE:
            Pipeline.parse(shown(config))
    if not 2 <= options.images <= OTHER_SEEDS:
        parser.error(f"--images: wants 2 to {OTHER_SEEDS}, other seeds follow")
    return options


def prepare(options: argparse.Namespace, results: Results) -> None:
    """Check that known results are of the same kind, and forget those that are made again."""
    setup = {"images": options.images, "steps": options.steps}
    if results.get("setup") not in (None, setup):
        raise DiffoptError(
            f"{results.path} has results of {results.get('setup')}: remove it, or ask for the same"
        )
    results.put(setup, "setup")
    if "time" in options.phase:
        now = machine(options.threads)
        if results.get("machine") not in (None, now):
            raise DiffoptError(f"{results.path} has times of another machine, or thread count")
        results.put(now, "machine")
    if not options.again:
        return
    for name in options.only:
        for config in options.configs:
            row = results.get("models", name, "configs", config) or {}
            for phase in options.phase:
                row.pop(phase, None)
            row = {key: value for key, value in row.items() if key not in ("left out", "failed")}
            results.put(row, "models", name, "configs", config)
            if "quality" in options.phase:
                Study(name, options.steps, options.work).forget(config)


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked for, and write the section of the document."""
    options = arguments(words)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.document.with_suffix(".json"), options.work / "lock")
    prepare(options, results)
    for name in options.only:
        study = Study(name, options.steps, options.work)
        if "quality" in options.phase:
            quality(study, options.configs, results, options.images)
        if "time" in options.phase:
            times(study, options.configs, results, options.rounds, options.target)
        rows = results.get("models", name, "configs") or {}
        rows = {c: r for c, r in rows.items() if "quality" in r}
        draw(study, rows, options.document.parent / f"caching-{name}.png")
    rewrite(options.document, results.read())
    report(f"wrote {options.document} and {results.path}")


if __name__ == "__main__":
    try:
        main()
    except DiffoptError as error:
        sys.exit(f"caching.py: error: {error}")
