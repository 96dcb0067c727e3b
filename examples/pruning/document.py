"""Writes the measurements of docs/pruning.md from the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.pruning import findings
from examples.pruning.configurations import (
    AUTO,
    BY_IMPORTANCE,
    COMPOSED,
    GOAL,
    LONGER,
    PEERS,
    RECOVER,
    configurations,
    fewer,
    recovered,
    untrained,
)
from examples.study.document import floor_lines, larger, left_out, milliseconds, number
from examples.study.models import GUIDANCE
from examples.study.rows import Rows, median
from examples.study.study import REFERENCE

DOCUMENT = Path(__file__).parents[2] / "docs" / "pruning.md"

_MAGNITUDE = BY_IMPORTANCE[GOAL]["magnitude"]
PICTURED = (REFERENCE, _MAGNITUDE, recovered(_MAGNITUDE), recovered(AUTO), fewer(18))


def pictured(rows: Rows) -> list[str]:
    """Return the configurations that the picture shows, from the top."""
    return [config for config in PICTURED if "quality" in rows.get(config, {})]


def section(data: Mapping[str, Any], folder: Path) -> str:
    """Return the results as the text between the markers; pictures are in the folder."""
    lines = [
        "`make bench-pruning` writes this section; the raw numbers are in pruning.json beside it.",
        "",
        *_about(data),
    ]
    for title, model in data.get("models", {}).items():
        lines += ["", f"### {title}", "", *_model(title, model, folder)]
    if large := data.get("large"):
        lines += ["", "### Times of larger models", "", *_large(large)]
    return "\n".join(lines)


def _about(data: Mapping[str, Any]) -> list[str]:
    lines = [
        f"The reference is the pipeline as it is: DDIM, guidance {GUIDANCE:g}, fp32. All others are"
        " `unroll`, then what is named, `hoist`, `cache` if it is named, `simplify,fuse`, and what"
        " has fewer bits. FLOPs and parameters are of the whole pipeline. Trained is what goes on"
        f" with `{RECOVER}`, from requests of all classes; training changes neither size nor time."
        " Images are those of"
        f" {data['setup']['images']} seeds, the same for all and others than those of training."
        " Distance is the mean over pairs of images of the same seed of |f(a) - f(b)| / |f(b)|, f"
        " the features of diffopt/cli/image_metrics.py. KID is to held-out images, times 1000,"
        " ± its deviation over subsets.",
    ]
    if at := data.get("machine"):
        lines += [
            "",
            f"Times are of one request on {at['cpu']}, {at['threads']} threads, torch"
            f" {at['torch']}, target {_targets(data)}, medians of engines that take turns with the"
            " reference's: as a part of its time in the same minutes, and in ms, with the"
            " interquartile range in parentheses. Behind them is how much the time falls, next to"
            " how much the FLOPs do.",
        ]
    return lines


def _targets(data: Mapping[str, Any]) -> str:
    models = data.get("models", {}).values()
    rows = [row for model in models for row in model["configs"].values()]
    timed = [row["time"]["target"] for row in rows if "time" in row]
    for model in data.get("large", {}).values():
        timed += [key.rpartition(" on ")[2] for key in model.get("times", ())]
    return ", ".join(f"`{target}`" for target in dict.fromkeys(timed))


def _model(title: str, results: Mapping[str, Any], folder: Path) -> list[str]:
    rows = {config: row for config, row in results["configs"].items() if "cost" in row}
    model, _, rest = title.partition(", ")
    steps = int(rest.partition(" ")[0])
    if REFERENCE not in rows:
        return []
    blocks = [
        _table(rows, configurations(model, steps)),
        floor_lines(results, rows),
        findings.importances(rows),
        findings.rivals(rows, model),
        findings.composed(rows),
        _peer(results, rows, model),
        [*findings.goals(rows), *left_out(results["configs"], "cost")],
        _picture(title, rows, folder),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def _table(rows: Rows, configs: Sequence[str]) -> list[str]:
    lines = [
        "| configuration | FLOPs | parameters | time; ms | of the promise | distance | trained"
        " | KID | trained |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for config in dict.fromkeys([*configs, *rows]):
        is_long = config.endswith(LONGER)
        if config not in rows or (config != untrained(config) and not is_long):
            continue
        row, trained = rows[config], rows.get(recovered(config), {})
        if is_long:
            row, trained = {**rows.get(untrained(config), {}), "cost": row["cost"]}, row
        kept = findings.kept_promise(rows, config)
        qualities = [each.get("quality", {}) for each in (row, trained)]
        cells = [
            f"`{config}`" if config != COMPOSED else "all of these together (below)",
            f"{findings.share(rows, config):.2f}",
            f"{findings.share(rows, config, 'parameters'):.2f}",
            _time(rows, untrained(config)) if "time" in row else "-",
            f"{kept:.0%}" if kept is not None else "-",
            *(number(quality.get("distance"), 1, 4) for quality in qualities),
            *(number(quality.get("kid held-out"), 1000, 2) for quality in qualities),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _time(rows: Rows, config: str) -> str:
    part = median(rows, config) / median(rows, config, REFERENCE)
    return f"{part:.2f}; {milliseconds(rows[config]['time']['seconds'])}"


def _large(data: Mapping[str, Any]) -> list[str]:
    def cells(times: Rows, key: str) -> list[str]:
        kept = findings.kept_promise_of(times, key)
        return [
            f"`{key.partition(' on ')[0]}`",
            f"{findings.large_share(times, key):.2f}",
            milliseconds(times[key]["seconds"]),
            f"{kept:.0%}" if kept is not None else "-",
        ]

    return [
        "Random weights: what is measured is time. All components count, as above.",
        *larger(data, ("engine", "FLOPs", "time, ms", "of the promise"), cells),
        "",
        *findings.large_goals(data),
    ]


def _peer(results: Mapping[str, Any], rows: Rows, model: str) -> list[str]:
    if "groups" not in results:
        return []
    version = results["groups"]["version"]
    lines = [
        f"**torch-pruning {version}.** {' '.join(findings.grouped(results['groups']['found']))}"
    ]
    return [*lines, *(f"- {line}" for line in findings.peer(rows, *PEERS[model]))]


def _picture(title: str, rows: Rows, folder: Path) -> list[str]:
    picture = f"pruning-{title.replace(', ', '-').removesuffix(' steps')}.png"
    if not (folder / picture).exists():
        return []
    names = ", ".join(f"`{config}`" for config in pictured(rows))
    return [f"![images]({picture})", "", f"From the top: {names}."]
