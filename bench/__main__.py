"""Measure this machine: `python -m bench [NAME …]`. Every run and every pair is kept in bench/results.

A ratio is the median over interleaved pairs, with its 95 % bootstrap interval; docs/performance.md shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
NAMES = (
    "engine",
    "layout",
    "mixed",
    "interactive",
    "embeddings",
    "png",
    "cold",
    "parts",
    "farm",
    "library",
    "scale",
    "submit",
    "api",
    "pack",
    "memory",
)
ON_REQUEST = ("applied",)  # needs files that do not ship with the repository


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure, of {', '.join(NAMES)}; all if none")
    names = parser.parse_args().names or NAMES
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        if name not in (*NAMES, *ON_REQUEST):
            parser.error(f"there is no {name}")
        began = time.monotonic()
        found = import_module(f"bench.{name}").measure()
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"bench": name, "took_s": round(time.monotonic() - began, 1)} | machine | found
        path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
        print(f"kept in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
