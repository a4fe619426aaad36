"""A folder like A1111's `embeddings`, watched: dropping a file in is enough to use it everywhere on the farm.

Subfolders count, the folder is no part of the name, `NAME.pt.disabled` disables. A file that vanishes changes nothing:
a disk that is not mounted must not take 300 embeddings from a farm. What a person replaced or removed since stays so:
after a restart, a file that was once a version of its name is not put back.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from latentfarm_shared.embeddings.sandbox import NotAnEmbedding
from latentfarm_shared.errors import Unavailable, UsageError
from latentfarm_shared.intake import Intake, is_candidate
from latentfarm_shared.library import name_key
from latentfarm_shared.logs import log

Stamp = tuple[int, int]
DISABLED = ".disabled"
MAX_TRIES = 3


class FolderWatch:
    """Looks at one folder whenever `look` is called, about once a second."""

    def __init__(self, folder: Path, intake: Intake) -> None:
        self._folder, self._intake = folder, intake
        self._settled: dict[Path, Stamp] = {}
        self._growing: dict[Path, Stamp] = {}
        self._tries: Counter[Path] = Counter()
        self._twins: set[Path] = set()
        self._is_first = True

    def look(self) -> None:
        """Take what is new or changed and has not grown since the last look.

        Raises:
            Unavailable: Redis or S3 does not answer; the next look goes on.
        """
        found = self._stamps()
        for twin in {twin for twin in self._twins if not self._elder(twin, found)}:
            self._twins.discard(twin)
            self._settled.pop(twin, None)  # it is alone now
        for path, stamp in sorted(found.items()):
            if self._settled.get(path) == stamp:
                continue
            if not self._is_first and self._growing.get(path) != stamp:
                continue  # it may still be written; the next look tells
            self._tries[path] += 1
            if self._is_done(path, found) or self._tries[path] >= MAX_TRIES:
                self._settled[path] = stamp
                del self._tries[path]
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

    def _is_done(self, path: Path, found: dict[Path, Stamp]) -> bool:
        """Handle one file; false if another look may do better. Nothing about one file keeps the others from their turn."""
        try:
            if path.suffix == DISABLED:
                self._disable(path.with_suffix("").stem)
            elif first := self._elder(path, found):
                log.warning("two embedding files have one name; the first counts", file=str(path), first=str(first))
                self._twins.add(path)
            else:
                self._take(path)
        except NotAnEmbedding as error:
            log.warning("file is no embedding", file=str(path), reason=error.reason)
            return error.refusal != "TIMEOUT"
        except UsageError as error:
            log.warning("embedding refused", file=str(path), reason=str(error))
        except Unavailable:
            raise
        except Exception:  # noqa: BLE001 - files of any origin fail in any way
            log.exception("file cannot be taken", file=str(path))
        return True

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
        for record in self._intake.take(path, None, self._intake.beside(path)):
            log.info("embedding taken", embedding=record.name, version=record.version, vectors=record.vectors)

    def _disable(self, name: str) -> None:
        library, owner = self._intake.library, self._intake.owner
        known = library.visible(owner).get(name.lower())
        if known is not None and known.state == "active":
            library.disable(name, owner=owner, reason="its file is named .disabled in a watched folder")
            log.info("embedding disabled", embedding=name)
