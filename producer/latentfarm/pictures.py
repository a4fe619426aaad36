"""Pictures in users' hands: saved, downloaded side by side, shown in notebooks, laid out on sheets."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from latentfarm_shared.infotext import read_infotext
from latentfarm_shared.ledger import ImageState
from latentfarm_shared.png import png_texts
from PIL import Image

from latentfarm.contact_sheet import contact_sheet

SHOWN, ACROSS = 24, 4
AT_ONCE = 8
PART, OLD_S = ".part", 3600.0
HEAD = 2**18  # texts stand before the picture
OF_WRITERS = ("Version", "TI hashes", "Model")
_OURS = re.compile(r"\.\d{5,}-\d+\.png\.\d+-\d+\.part")


def file_name(index: int, seed: int) -> str:
    """Return what a picture is called in a folder of its job's."""
    return f"{index:05d}-{seed}.png"


class Picture(ABC):
    """An image of a job that can be had as a PNG."""

    index: int
    state: ImageState

    @property
    @abstractmethod
    def seed(self) -> int:
        """The image's own seed."""

    @property
    @abstractmethod
    def parameters(self) -> str:
        """The infotext, as written into the picture."""

    @property
    @abstractmethod
    def point(self) -> Mapping[str, Any]:
        """Where it lies on the job's axes."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return what the command line prints as JSON."""

    @abstractmethod
    def png(self) -> bytes:
        """Return the picture's bytes."""

    @abstractmethod
    def link(self, expires_in: int = 300) -> str:
        """Return an address of the picture that whoever has it can read for so many seconds."""

    @property
    def file_name(self) -> str:
        """What it is called in a folder of its job's pictures."""
        return file_name(self.index, self.seed)

    def pil(self) -> Image.Image:
        """Return the picture as Pillow has it, RGB."""
        with Image.open(io.BytesIO(self.png())) as picture:
            return picture.convert("RGB")

    def save(self, path: str | Path) -> Path:
        """Write the picture to a file, making its folder; the file is there whole or not at all."""
        path = Path(path)
        write_whole(path, self.png())
        return path

    def _repr_png_(self) -> bytes | None:
        """Show itself in a notebook, once there is a picture."""
        return self.png() if self.state == "succeeded" else None


P = TypeVar("P", bound=Picture)


class Pictures(list[P]):
    """Images in order, which a notebook shows as a gallery."""

    def sheet(self, title: str = "", across: int = ACROSS) -> Image.Image:
        """Return a contact sheet of those that are rendered, `across` in a row, each with its index and seed."""
        done = [(f"{picture.index}: seed {picture.seed}", picture.png()) for picture in self if _is_done(picture)]
        rows = [("", done[start : start + across]) for start in range(0, len(done), across)]
        return contact_sheet(title, rows or [("nothing is rendered yet", [])])

    def _repr_html_(self) -> str:
        shown = [picture for picture in self if _is_done(picture)][:SHOWN]
        cells = "".join(
            f'<figure style="display:inline-block;margin:4px"><img width="192" src="data:image/png;base64,'
            f'{base64.b64encode(picture.png()).decode()}"><figcaption>{picture.index}: seed {picture.seed}</figcaption></figure>'
            for picture in shown
        )
        return f"<div>{cells}</div><p>{len(shown)} of {len(self)} images</p>"


def _is_done(picture: Picture) -> bool:
    return picture.state == "succeeded"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is never seen half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PART}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
            file.write(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what downloads left that were killed, an hour ago or longer."""
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError):
            if _OURS.fullmatch(part.name) and part.is_file() and time.time() - part.stat().st_mtime > OLD_S:
                part.unlink()


def is_saved(path: Path, parameters: str) -> bool:
    """Tell whether a file is the picture of these parameters: another job's of the same name and seed is not.

    What wrote the text, and what else its job had, do not matter.
    """
    try:
        with path.open("rb") as file:
            text = dict(png_texts(file.read(HEAD))).get("parameters")
    except OSError:
        return False
    return text is not None and _told(text.decode(errors="replace")) == _told(parameters)


def _told(parameters: str) -> tuple[str, str, dict[str, str]]:
    found = read_infotext(parameters)
    fields = {name: str(value) for name, value in found.fields.items() if name not in OF_WRITERS}
    return found.prompt, found.negative_prompt, fields


def download(
    pictures: Iterable[Picture],
    folder: Path,
    at_once: int = AT_ONCE,
    on_saved: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Save those that are rendered, several at a time; files that are there already are kept. Return all their paths.

    A file of the same name that holds another picture is replaced. A download that was interrupted goes on where it was. `on_saved` hears of each file as it is there.
    """
    remove_parts(folder)
    files: list[Path] = []
    running: list[tuple[Path, Future[Path]]] = []
    with ThreadPoolExecutor(at_once, "download") as threads:
        try:
            for picture in pictures:
                if not _is_done(picture):
                    continue
                path = folder / picture.file_name
                files.append(path)
                if is_saved(path, picture.parameters):
                    _tell(on_saved, path)
                    continue
                running.append((path, threads.submit(picture.save, path)))
                if len(running) > 2 * at_once:
                    _finish(*running.pop(0), on_saved)
            for path, future in running:
                _finish(path, future, on_saved)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return files


def _finish(path: Path, future: Future[Path], on_saved: Callable[[Path], None] | None) -> None:
    future.result()
    _tell(on_saved, path)


def _tell(on_saved: Callable[[Path], None] | None, path: Path) -> None:
    if on_saved is not None:
        on_saved(path)


def job_html(job_id: str, state: str, finished: int, total: int, prompt: str) -> str:
    """Return what a notebook shows of a job."""
    return (
        f"<p><b>{html.escape(job_id)}</b> {html.escape(state)}: {finished} of {total}"
        f' <progress value="{finished}" max="{total}"></progress><br>{html.escape(prompt)}</p>'
    )
