"""Group the layers of the sampling loop's body by module, as rows of a table.

Modules are read from the paths in nodes' metadata. A block is a module with a number for a name and
two layers or more in it, such as `blocks.3`; it is divided into the blocks inside it where there
are several and LIMIT rows are enough. A layer in no block is a row, together with those whose paths
begin with the same name. Where the blocks alone are more than LIMIT, neighbours share a row. Every
layer is in one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, takewhile

from torch import fx

from diffopt.ir.sampling_loop import Loop

LIMIT = 48

Path = tuple[str, ...]
LayerGroups = Mapping[str, Sequence[fx.Node]]
_Rows = Mapping[Path, list[Path]]


def layer_groups(loop: Loop) -> LayerGroups:
    """Return the nodes of each row by its label, in the order of execution."""
    layers = _layers(loop)
    names = {layers[node] for node in layers}
    shared = len(_common(names)) if len(names) > 1 else 0
    keys = _divide({path[shared:] for path in names})
    by_row: dict[Path, list[fx.Node]] = {}
    for node, path in layers.items():
        by_row.setdefault(keys[path[shared:]], []).append(node)
    labelled = {
        ".".join(_common({layers[node] for node in nodes})) or loop.name: nodes
        for nodes in by_row.values()
    }
    return labelled if len(labelled) <= LIMIT else _ranges(labelled)


def _layers(loop: Loop) -> dict[fx.Node, Path]:
    """Return the nodes that cost anything, in order, each with the path of its module."""
    layers: dict[fx.Node, Path] = {}
    path: Path = ()
    for node in loop.body.graph.nodes:
        if loop.cost([node]):
            # A node that a pass inserted has no path: it belongs to the module before it.
            path = tuple(str(node.meta["module"]).split(".")) if node.meta.get("module") else path
            layers[node] = path
    return layers


def _divide(paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the row of each layer, as a path."""
    rows = _children((), sorted(paths))
    while len(divided := _divide_once(rows)) <= LIMIT and len(divided) > len(rows):
        rows = divided
    return {path: row for row, layers in rows.items() for path in layers}


def _divide_once(rows: _Rows) -> _Rows:
    """Divide the outermost blocks that contain several blocks, all at the same depth."""
    inner = {row: _children(row, layers) for row, layers in rows.items() if _is_block(row, layers)}
    inner = {
        row: children
        for row, children in inner.items()
        if sum(_is_block(child, layers) for child, layers in children.items()) > 1
    }
    depth = min(map(len, inner), default=0)
    divided: dict[Path, list[Path]] = {}
    for row, layers in rows.items():
        is_next = row in inner and len(row) == depth
        divided |= inner[row] if is_next else {row: layers}
    return divided


def _children(row: Path, paths: Iterable[Path]) -> _Rows:
    """Return the blocks in a row and, by their next name, its other layers."""
    under: dict[Path, list[Path]] = {}
    for path in paths:
        for end in range(len(row) + 1, len(path) + 1):
            under.setdefault(path[:end], []).append(path)
    children: dict[Path, list[Path]] = {}
    for path in paths:
        starts = [path[:end] for end in range(len(row) + 1, len(path) + 1)]
        block = next((start for start in starts if _is_block(start, under[start])), None)
        children.setdefault(block or (starts[0] if starts else row), []).append(path)
    return children


def _is_block(row: Path, layers: Sequence[Path]) -> bool:
    return bool(row) and row[-1].isdecimal() and len(layers) > 1


def _common(paths: Iterable[Path]) -> Path:
    """Return the common prefix of paths."""
    columns = zip(*paths, strict=False)
    return tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, columns))


def _ranges(groups: LayerGroups) -> LayerGroups:
    """Merge neighbouring rows until LIMIT is enough: blocks.0-2, blocks.3-5."""
    size = math.ceil(len(groups) / LIMIT)
    merged: dict[str, list[fx.Node]] = {}
    for parent, siblings in groupby(groups, lambda label: label.rpartition(".")[0]):
        run = list(siblings)
        for labels in (run[i : i + size] for i in range(0, len(run), size)):
            first, last = labels[0], labels[-1].rpartition(".")[2]
            joint = "-" if last.isdecimal() and parent else " … "
            label = first if len(labels) == 1 else f"{first}{joint}{last}"
            merged[label] = [node for each in labels for node in groups[each]]
    return merged
