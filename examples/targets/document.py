"""Writes the table of plans in docs/tensorrt.md from the results."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffopt.lowering.hardware import hardware
from examples.targets.measure import whole
from examples.targets.programs import ARCHITECTURES, FORMATS, MODELS

DOCUMENT = Path(__file__).parents[2] / "docs" / "tensorrt.md"
DEVICES = ["rtx3090", "rtx4090", "rtx5090"]

Rows = Mapping[str, Any]


def section(data: Rows) -> str:
    """Return the results as the text between the markers."""
    models = {name: data["models"][name] for name in MODELS if name in data.get("models", {})}
    shown = ", ".join(f"{device} (SM{_dotless(device)})" for device in DEVICES)
    lines = [
        "`python -m examples.targets` writes this section; tensorrt.json beside it has every plan.",
        f"Devices: {shown}. Programs after `{FORMATS['fp32']}`, then `cast` and `quantize`. Sizes"
        " are those of all components' plans together; export and build are their seconds on two"
        " shared cores, the build for one device (the median of the devices).",
        "",
        "| model | format | components | whole for | plans, MB | weights, MB | export, s |"
        " build, s | products |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in models.items():
        title = f"{ARCHITECTURES[name]} (tiny)" if name in ARCHITECTURES else name
        for number in FORMATS:
            if "components" in model.get(number, {}):
                lines.append(_row(title, number, model[number]))
    return "\n".join([*lines, "", *_left_out(models)])


def _dotless(device: str) -> str:
    return "".join(map(str, hardware(device).capability or ()))


def _row(title: str, number: str, result: Rows) -> str:
    rows = result["components"]
    fits = [device for device in DEVICES if whole(rows, device)]
    plans = [[row["devices"][device] for row in rows.values()] for device in fits]
    sizes = sorted({f"{sum(p['bytes'] for p in each) / 1e6:.1f}" for each in plans}, key=float)
    builds = sorted(sum(p["seconds"] for p in each) for each in plans)
    exports = sum(row.get("export seconds", 0.0) for row in rows.values())
    cells = [
        title,
        number,
        str(len(rows)),
        "all" if len(fits) == len(DEVICES) else ", ".join(fits) or "none",
        " to ".join([sizes[0], sizes[-1]] if len(sizes) > 1 else sizes) or "-",
        f"{sum(p['weight'] for p in plans[-1]) / 1e6:.2f}" if plans else "-",
        f"{exports:.0f}",
        f"{builds[len(builds) // 2]:.1f}" if builds else "-",
        _products(plans[-1]) if plans else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _products(plans: Iterable[Rows]) -> str:
    """Return the number of products by kind, from the builder's report."""
    counts: Counter[str] = Counter()
    for plan in plans:
        counts.update({kind: n for kind, n in plan["steps"].items() if kind != "other"})
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


def _left_out(models: Mapping[str, Rows]) -> list[str]:
    """Return what has no plan, and why: one line a reason."""
    reasons: dict[str, list[str]] = {}
    for name, model in models.items():
        for number, result in model.items():
            for device, reason in result.get("refused", {}).items():
                kind = reason.partition(", and ")[2].partition(";")[0] or reason
                reasons.setdefault(f"{device}, {number}: {kind}", [])
            for component, row in result.get("components", {}).items():
                for reason in _failures(row):
                    reasons.setdefault(reason, []).append(f"{name} {component} in {number}")
    return [
        f"- {reason}" + (f" ({', '.join(where)})" if where else "")
        for reason, where in sorted(reasons.items())
    ]


def _failures(row: Rows) -> list[str]:
    if "not exported" in row:
        return [f"not exported: {row['not exported']}"]
    plans = row["devices"].values()
    return sorted({plan["refused"].partition(": ")[2] for plan in plans if "refused" in plan})
