"""Compares engines with other packages that cache features; writes their section of the document.

    pip install DeepCache cache-dit
    python -m examples.caching.peers                  # all of it, about half an hour
    python -m examples.caching.peers --only deepcache-3 --rounds 3 --out quick --into quick.md

Each row is one cache of one package, on one of the models of examples/models, next to an engine
whose `cache` pass has the same schedule. The raw times go to docs/peers.json, the table to
docs/caching.md; rows that were not run stay as they are. Packages that are not installed are left
out. Run it on a machine that does nothing else.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from examples.benchmarks import known, report
from examples.caching.peers.document import document, put
from examples.caching.peers.measure import compare
from examples.caching.peers.pairs import PEERS

ROOT = Path(__file__).parents[3]


def main() -> None:
    """Run what was asked for and write the document."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.caching.peers", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", choices=[*PEERS], nargs="+", default=[*PEERS])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "peers")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "caching.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    raw = options.out.with_suffix(".json")
    data = {"rows": {}, **known(parser, raw, options.threads)}
    with tempfile.TemporaryDirectory() as name:
        for key in options.only:
            if PEERS[key].version is None:
                report(f"== {key} left out: pip install {PEERS[key].package}")
                continue
            report(f"== {key}")
            data["rows"][key] = compare(PEERS[key], options, Path(name))
            data["rows"] = {key: data["rows"][key] for key in PEERS if key in data["rows"]}
            raw.write_text(json.dumps(data, indent=1) + "\n")
    if not data["rows"]:
        sys.exit("nothing was run: pip install DeepCache cache-dit")
    put(document(data), options.into)
    report(f"wrote {raw} and {options.into}")


if __name__ == "__main__":
    main()
