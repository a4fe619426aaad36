"""A folder like A1111's `embeddings`, watched: dropping a file in is enough to use it everywhere on the farm.

Subfolders count, the folder is no part of the name, `NAME.pt.disabled` disables. A file that vanishes changes nothing:
a disk that is not mounted must not take 300 embeddings from a farm. What a person replaced or removed since stays so:
after a restart, a file that was once a version of its name is not put back.
"""

from __future__ import annotations

from pathlib import Path

from latentfarm_shared.embeddings.sandbox import NotAnEmbedding
from latentfarm_shared.errors import UsageError
from latentfarm_shared.intake import Intake, beside, is_candidate
from latentfarm_shared.library import name_key
from latentfarm_shared.logs import log

Stamp = tuple[int, int]
DISABLED = ".disabled"


class FolderWatch:
    """Looks at one folder whenever `look` is called, about once a second."""

    def __init__(self, folder: Path, intake: Intake) -> None:
        self._folder, self._intake = folder, intake
        self._settled: dict[Path, Stamp] = {}
        self._growing: dict[Path, Stamp] = {}
        self._is_first = True

    def look(self) -> None:
        """Take what is new or changed and has not grown since the last look."""
        found = self._stamps()
        for path, stamp in sorted(found.items()):
            if self._settled.get(path) == stamp:
                continue
            if not self._is_first and self._growing.get(path) != stamp:
                continue  # it may still be written; the next look tells
            self._handle(path, found)
            self._settled[path] = stamp
        self._growing = found
        self._settled = {path: stamp for path, stamp in self._settled.items() if path in found}
        self._is_first = False

    def _stamps(self) -> dict[Path, Stamp]:
        stamps = {}
        for path in self._folder.rglob("*"):
            plain = path.with_suffix("") if path.suffix == DISABLED else path
            try:
                stat = path.stat()
            except OSError:
                continue  # gone meanwhile
            if is_candidate(plain) and path.is_file() and stat.st_size:
                stamps[path] = stat.st_mtime_ns, stat.st_size
        return stamps

    def _handle(self, path: Path, found: dict[Path, Stamp]) -> None:
        try:
            if path.suffix == DISABLED:
                self._disable(path.with_suffix("").stem)
            elif first := self._elder(path, found):
                log.warning("two embedding files have one name; the first counts", file=str(path), first=str(first))
            else:
                self._take(path)
        except NotAnEmbedding as error:
            log.warning("file is no embedding", file=str(path), reason=error.reason)
        except UsageError as error:
            log.warning("embedding refused", file=str(path), reason=str(error))

    @staticmethod
    def _elder(path: Path, found: dict[Path, Stamp]) -> Path | None:
        """Return another file of the same name that comes before this one."""
        alike = [p for p in found if p.suffix != DISABLED and p.stem.lower() == path.stem.lower() and p < path]
        return min(alike, default=None)

    def _take(self, path: Path) -> None:
        library, owner = self._intake.library, self._intake.owner
        if self._is_first:
            ever = {version.record.content_id for version in library.history(name_key(owner, path.stem))}
            known, _ = self._intake.read(path) if ever else ([], b"")
            if known and {file.content_id for file in known} <= ever:
                return
        for record in self._intake.take(path, None, beside(path)):
            log.info("embedding taken", embedding=record.name, version=record.version, vectors=record.vectors)

    def _disable(self, name: str) -> None:
        library, owner = self._intake.library, self._intake.owner
        known = library.visible(owner).get(name.lower())
        if known is not None and known.state == "active":
            library.disable(name, owner=owner, reason="its file is named .disabled in a watched folder")
            log.info("embedding disabled", embedding=name)
