"""Draws docs/architecture.svg from the imports between the rooms of diffopt.

    python docs/draw_architecture.py

A room is a package of diffopt; the modules beside them are one, "base". An arrow leads from a room
to one that it imports, unless a longer way leads there as well (the transitive reduction). Dashed
are those that are found by name (`diffopt.plugins`), so that nothing below imports them.
"""

import ast
import importlib.util
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

import grimp
import networkx as nx

PICTURE = Path(__file__).with_name("architecture.svg")
BY_NAME = (("core", "passes"), ("lowering", "targets"), ("caching", "caching/policies"))
TOP = "cli"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 62, 26, 44, 20
STYLE = "font-family='sans-serif' text-anchor='middle'"


def room(module: str) -> str:
    """Return the room that a module is in."""
    path = module.split(".")
    if len(path) == 1:
        return TOP  # the public names, which are as far up as the command line
    spec = importlib.util.find_spec(".".join(path[:2]))
    return path[1] if spec and spec.submodule_search_locations else "base"


def imports() -> nx.DiGraph:
    """Return which room imports which, lazily and for types as well."""
    modules = grimp.build_graph("diffopt", cache_dir=None)
    graph = nx.DiGraph()
    for module in modules.modules - {"diffopt.testing"}:
        graph.add_node(room(module))
        for other in modules.find_modules_directly_imported_by(module):
            if room(module) != room(other):
                graph.add_edge(room(module), room(other))
    return graph


def levels(graph: nx.DiGraph) -> list[list[str]]:
    """Return the rooms by the longest way down from them, the lowest first.

    In a row those that only compile programs come last: they import `lowering`.
    """
    compiles = nx.ancestors(graph, "lowering") - {TOP} | {"lowering"}
    rows = [
        sorted(set(row) - {TOP}, key=lambda name: (name in compiles, name))
        for row in nx.topological_generations(graph.reverse())
    ]
    return [row for row in rows if row] + [[TOP]]


def about(name: str) -> list[str]:
    """Return the first sentence of what a room says of itself, in lines."""
    if name == "base":
        text = "errors, spec, plugins, optional, progress"
    else:
        found = importlib.util.find_spec(f"diffopt.{name}")
        assert found is not None
        assert found.origin is not None
        text = ast.get_docstring(ast.parse(Path(found.origin).read_text("utf-8"))) or ""
    return textwrap.wrap(text.splitlines()[0].rstrip("."), 32)


def draw(graph: nx.DiGraph) -> str:
    """Return the picture: one row a level, the command line on top."""
    rows = levels(graph)[::-1]
    width = max(map(len, rows)) * (WIDTH + GAP_X) + 2 * MARGIN - GAP_X
    height = len(rows) * (HEIGHT + GAP_Y) + 2 * MARGIN - GAP_Y
    corner = {
        name: (
            (width - len(row) * (WIDTH + GAP_X) + GAP_X) / 2 + column * (WIDTH + GAP_X),
            MARGIN + index * (HEIGHT + GAP_Y),
        )
        for index, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}'>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='7'"
        " markerHeight='7' orient='auto'><path d='M0,0 L8,4 L0,8 z' fill='#667'/></marker></defs>",
        f"<rect width='{width:g}' height='{height:g}' fill='white'/>",
    ]
    for source, target in sorted(nx.transitive_reduction(graph).edges):
        (x0, y0), (x1, y1) = corner[source], corner[target]
        lines.append(_arrow(x0 + WIDTH / 2, y0 + HEIGHT, x1 + WIDTH / 2, y1, ""))
    for source, target in BY_NAME:
        if source in corner and target in corner:
            (x0, y0), (x1, y1) = corner[source], corner[target]
            lines.append(
                _arrow(x0 + WIDTH - 20, y0, x1 + WIDTH - 20, y1 + HEIGHT, " stroke-dasharray='5 4'")
            )
    for name, (x, y) in sorted(corner.items()):
        middle = x + WIDTH / 2
        lines += [
            f"<rect x='{x:g}' y='{y:g}' width='{WIDTH}' height='{HEIGHT}' rx='7' fill='#eef3fb'"
            " stroke='#456'/>",
            f"<text x='{middle:g}' y='{y + 20:g}' font-size='15' font-weight='bold' {STYLE}>"
            f"{escape(name)}</text>",
            *(
                f"<text x='{middle:g}' y='{y + 37 + 14 * i:g}' font-size='10.5' fill='#334'"
                f" {STYLE}>{escape(line)}</text>"
                for i, line in enumerate(about(name))
            ),
        ]
    return "\n".join([*lines, "</svg>", ""])


def _arrow(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    bend = (y1 - y0) / 2
    return (
        f"<path d='M{x0:g},{y0:g} C{x0:g},{y0 + bend:g} {x1:g},{y1 - bend:g} {x1:g},{y1:g}'"
        f" fill='none' stroke='#667'{style} marker-end='url(#tip)'/>"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(imports()), encoding="utf-8", newline="\n")
