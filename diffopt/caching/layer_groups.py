"""Names the parts of the sampling loop's body that cost anything, as rows of a table.

Parts are modules of the model, found in the paths that nodes carry. A block is a module with a
number for a name and two layers or more in it, such as `blocks.3`; it is divided into the blocks
inside it where there are several and LIMIT rows are enough. A layer in no block is a row, together
with those whose paths begin with the same name. Where the blocks alone are more than LIMIT,
neighbours share a row. No layer is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, takewhile

from torch import fx

from diffopt.ir.sampling_loop import Loop

LIMIT = 48

Path = tuple[str, ...]
Rows = Mapping[str, Sequence[fx.Node]]
Parts = Mapping[Path, list[Path]]


def rows(loop: Loop) -> Rows:
    """Return the parts of the loop's body in the order of execution, by what to call them."""
    layers = _layers(loop)
    names = {layers[node] for node in layers}
    shared = len(_common(names)) if len(names) > 1 else 0
    keys = _divide({path[shared:] for path in names})
    found: dict[Path, list[fx.Node]] = {}
    for node, path in layers.items():
        found.setdefault(keys[path[shared:]], []).append(node)
    labelled = {
        ".".join(_common({layers[node] for node in nodes})) or loop.name: nodes
        for nodes in found.values()
    }
    return labelled if len(labelled) <= LIMIT else _ranges(labelled)


def _layers(loop: Loop) -> dict[fx.Node, Path]:
    """Return the nodes that cost anything, in order, each with the path of its module."""
    found: dict[fx.Node, Path] = {}
    path: Path = ()
    for node in loop.body.graph.nodes:
        if loop.cost([node]):
            # What a pass made has the path of what is before it.
            path = tuple(str(node.meta["module"]).split(".")) if node.meta.get("module") else path
            found[node] = path
    return found


def _divide(paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the row of each layer, as a path."""
    found = _parts((), sorted(paths))
    while len(divided := _divide_once(found)) <= LIMIT and len(divided) > len(found):
        found = divided
    return {path: row for row, layers in found.items() for path in layers}


def _divide_once(found: Parts) -> Parts:
    """Divide the outermost blocks that have several in them; neighbours are treated alike."""
    inner = {row: _parts(row, layers) for row, layers in found.items() if _is_block(row, layers)}
    inner = {
        row: parts
        for row, parts in inner.items()
        if sum(_is_block(part, layers) for part, layers in parts.items()) > 1
    }
    depth = min(map(len, inner), default=0)
    divided: dict[Path, list[Path]] = {}
    for row, layers in found.items():
        is_next = row in inner and len(row) == depth
        divided |= inner[row] if is_next else {row: layers}
    return divided


def _parts(row: Path, paths: Iterable[Path]) -> Parts:
    """Return the blocks in a row and, by their next name, its other layers."""
    under: dict[Path, list[Path]] = {}
    for path in paths:
        for end in range(len(row) + 1, len(path) + 1):
            under.setdefault(path[:end], []).append(path)
    found: dict[Path, list[Path]] = {}
    for path in paths:
        starts = [path[:end] for end in range(len(row) + 1, len(path) + 1)]
        own = next((start for start in starts if _is_block(start, under[start])), None)
        found.setdefault(own or (starts[0] if starts else row), []).append(path)
    return found


def _is_block(row: Path, layers: Sequence[Path]) -> bool:
    return bool(row) and row[-1].isdecimal() and len(layers) > 1


def _common(paths: Iterable[Path]) -> Path:
    """Return what paths begin with."""
    columns = zip(*paths, strict=False)
    return tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, columns))


def _ranges(found: Rows) -> Rows:
    """Put as many neighbours as needed into one row: blocks.0-2, blocks.3-5."""
    size = math.ceil(len(found) / LIMIT)
    merged: dict[str, list[fx.Node]] = {}
    for parent, siblings in groupby(found, lambda label: label.rpartition(".")[0]):
        run = list(siblings)
        for labels in (run[i : i + size] for i in range(0, len(run), size)):
            first, last = labels[0], labels[-1].rpartition(".")[2]
            joint = "-" if last.isdecimal() and parent else " … "
            label = first if len(labels) == 1 else f"{first}{joint}{last}"
            merged[label] = [node for each in labels for node in found[each]]
    return merged
