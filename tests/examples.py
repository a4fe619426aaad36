"""Every example that README, docs and `--help` give, found where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import latentfarm
import typer
from latentfarm import testing
from latentfarm.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/api.md",
    "docs/sdk.md",
    "docs/jobs.md",
    "docs/embeddings.md",
    "docs/parameters.md",
    "docs/scaling.md",
    "docs/settings.md",
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """Something that is shown to be typed: `kind` is console, python, yaml, json or jsonl."""

    where: str
    kind: str
    text: str

    def __str__(self) -> str:
        """Name it in a test's report."""
        return f"{self.where}: {self.text.strip().splitlines()[0][:60]}"


def _of_page(page: str) -> Iterator[Example]:
    for kind, text in _FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        if kind == "console":
            lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
            yield from (Example(page, kind, line) for line in lines)
        elif kind:
            yield Example(page, kind, text)


def _of_command(name: str, command: object) -> Iterator[Example]:
    for line in (getattr(command, "help", None) or "").splitlines():
        if line.strip().startswith("latentfarm "):
            yield Example(f"{name} --help", "console", line.strip())
        elif line.strip().startswith("{"):
            yield Example(f"{name} --help", "jsonl", line.strip())
    for child_name, child in getattr(command, "commands", {}).items():
        yield from _of_command(f"{name} {child_name}", child)


def _of_docstring(where: str, text: str | None) -> Iterator[Example]:
    lines = [line[4:] for line in (text or "").splitlines() if line.startswith((">>> ", "... "))]
    if lines:
        yield Example(where, "python", "\n".join(lines) + "\n")


def examples() -> list[Example]:
    """Return all, each once."""
    found = [example for page in PAGES for example in _of_page(page)]
    found += _of_command("latentfarm", typer.main.get_command(app))
    found += _of_docstring("latentfarm", latentfarm.__doc__)
    found += _of_docstring("latentfarm.testing", testing.__doc__)
    return list({(e.kind, e.text.partition("  #")[0].strip()): e for e in reversed(found)}.values())[::-1]
