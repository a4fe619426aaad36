"""What commands print: JSON or a table on stdout, a progress bar on stderr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from latentfarm_shared.ledger import JobStatus

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show(rows: Sequence[dict[str, Any]], *, as_json: bool, single: bool = False) -> None:
    """Print rows as JSON (one object if `single`) or as a table."""
    if as_json:
        typer.echo(json.dumps(rows[0] if single else list(rows), ensure_ascii=False))
        return
    from rich.console import Console  # noqa: PLC0415 - keeps --help fast
    from rich.table import Table  # noqa: PLC0415

    console = Console()
    if not rows:
        console.print("nothing yet", style="dim")
        return
    if single:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for key, value in rows[0].items():
            table.add_row(f"[bold]{key}", _cell(value))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for key in rows[0]:
            table.add_column(key, overflow="fold" if key in ("id", "name", "s3_url") else "ellipsis")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items() if item)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    from rich.markup import escape  # noqa: PLC0415

    return escape("" if value is None else str(value))


def describe(status: JobStatus) -> dict[str, Any]:
    """Return a job's status as the JSON that the documentation promises."""
    return {
        "id": status.id,
        "state": status.state,
        **({"reason": status.reason} if status.reason else {}),
        **({"name": status.name} if status.name else {}),
        "total": status.total,
        "counts": status.counts,
        "model": status.model,
        "prompt": status.prompt,
        "created": status.created,
        **({"progress": status.progress} if status.progress else {}),
        **({"dropped": [item.model_dump() for item in status.dropped]} if status.dropped else {}),
    }
