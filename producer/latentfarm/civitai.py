"""Civitai's public API (v1): find a version by id, page or hash, and fetch its embedding files.

Fields and traps as the site's documentation and clients describe them: errors may come as JSON with status 200, the
download redirects to a store that refuses the site's token, files carry scan results and hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from latentfarm_shared.errors import FarmError, InvalidField, Unavailable, UnreadableFile
from latentfarm_shared.sources import Details, Kind, read_side

from latentfarm.addresses import origin
from latentfarm.downloads import Downloader, Fetched

HOSTS = ("civitai.com", "www.civitai.com", "civitai.red", "www.civitai.red", "civitai.green")
_AIR = re.compile(r"(?:urn:)?air:\w+:embedding:civitai:(\d+)@(\d+)", re.IGNORECASE)
_PLAIN = re.compile(r"civitai:(?:(?P<model>\d+)@)?(?P<version>\d+)", re.IGNORECASE)
_HASH = re.compile(r"civitai:(?:sha256:|hash:)?(?P<hash>[0-9a-f]{8,64})", re.IGNORECASE)
_PAGE = re.compile(r"/models/(?P<model>\d+)(?:/|$)")
_DOWNLOAD = re.compile(r"/api/(?:download/models|v1/model-versions)/(?P<version>\d+)")
MAX_ID = 2**31 - 1


def is_civitai(source: str, base_url: str) -> bool:
    """Tell whether a source names something on Civitai."""
    if source.lower().startswith(("civitai:", "urn:air:", "air:")):
        return True
    if not source.startswith(("http://", "https://")):
        return False
    parts = urlsplit(source)
    known = parts.hostname in HOSTS or parts.netloc == urlsplit(base_url).netloc
    return known and bool(_PAGE.search(parts.path) or _DOWNLOAD.search(parts.path))


@dataclass(frozen=True)
class CivitaiFile:
    """One embedding file of a version, and what the site says of it."""

    url: str
    name: str
    sha256: str | None
    details: Details
    preview_url: str


class Civitai:
    """The site at `base_url`."""

    def __init__(self, downloader: Downloader, base_url: str, token: str | None = None) -> None:
        """Ask nothing yet."""
        self._downloader, self._base, self._token = downloader, base_url.rstrip("/"), token

    def files(self, source: str) -> list[CivitaiFile]:
        """Return the embedding files of the version a source names: an id, a page's address, an AIR, or a hash.

        Raises:
            InvalidField: the source names nothing on the site.
            UnreadableFile: the site has no such thing, it is no embedding, or a scan found it dangerous.
            Unavailable: the site does not answer.
        """
        source = without_secrets(source)
        version = self._version(source)
        version["model"] = self._page_of(version)
        kind = version["model"].get("type")
        if kind not in (None, "TextualInversion"):
            raise UnreadableFile(source, f"is a {kind}, not an embedding")
        chosen = _chosen([f for f in version.get("files") or () if isinstance(f, dict)])
        if not chosen:
            raise UnreadableFile(source, "its version has no embedding file")
        return [self._file(source, version, file) for file in chosen]

    @contextmanager
    def fetch(self, file: CivitaiFile) -> Iterator[Fetched]:
        """Fetch a file and make sure it is the one the site means.

        Raises:
            UnreadableFile: its sha256 is another.
        """
        token = self._token if origin(file.url) == origin(self._base) else None
        with self._downloader.fetch(file.url, token) as fetched:
            with fetched.path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if file.sha256 and found != file.sha256:
                what = _said(fetched.path.read_bytes()[:4096])
                reason = f"its sha256 is {found[:12]}…, the site says {file.sha256[:12]}…"
                raise UnreadableFile(file.name, f"{what}" if what else reason)
            yield fetched

    @contextmanager
    def preview(self, file: CivitaiFile) -> Iterator[Path | None]:
        """Fetch the version's first picture, if it can be had."""
        with ExitStack() as held:
            path = None
            if file.preview_url:
                with suppress(FarmError):
                    path = held.enter_context(self._downloader.fetch(file.preview_url)).path
            yield path

    def _version(self, source: str) -> dict[str, Any]:
        """Return the description of the version a source names."""
        model, version, digest = _parsed(source)
        if version is None and model is not None:
            page = self._get(f"/api/v1/models/{model}", source)
            versions = page.get("modelVersions")
            if not isinstance(versions, list) or not versions or not isinstance(versions[0], dict):
                raise UnreadableFile(source, "the page has no version")
            return {"modelId": model, "model": {key: page[key] for key in page if key != "modelVersions"}} | versions[0]
        path = f"by-hash/{digest}" if version is None else str(version)
        return self._get(f"/api/v1/model-versions/{path}", source)

    def _page_of(self, version: dict[str, Any]) -> dict[str, Any]:
        """Return what the version's page says of it, permissions too, as far as it can be had."""
        parent, model = version.get("model"), version.get("modelId")
        known = dict(parent) if isinstance(parent, dict) else {}
        if "allowNoCredit" not in known and isinstance(model, int):
            with suppress(FarmError):
                known = self._get(f"/api/v1/models/{model}", str(model)) | known
        return {key: value for key, value in known.items() if key != "modelVersions"}

    def _get(self, path: str, source: str) -> dict[str, Any]:
        status, body = self._downloader.get(self._base + path, self._token)
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == 429 or status >= 500:
            raise Unavailable("Civitai", f"answers {status}", "try again in a minute")
        message = answer.get("error") if isinstance(answer, dict) else "an answer that is no JSON"
        if status != 200 or message or not isinstance(answer, dict):
            said = answer.get("message") or message if isinstance(answer, dict) else message
            raise UnreadableFile(source, f"Civitai answers {status}: {str(said or 'nothing')[:200]}{_hint(status)}")
        return answer

    def _file(self, source: str, version: dict[str, Any], file: dict[str, Any]) -> CivitaiFile:
        for scan in ("pickleScanResult", "virusScanResult"):
            if file.get(scan) == "Danger":
                raise UnreadableFile(source, f"Civitai's scan calls {file.get('name')!r} dangerous ({scan})")
        hashes = file.get("hashes")
        sha256 = str((hashes if isinstance(hashes, dict) else {}).get("SHA256") or "").lower() or None
        about, _ = read_side(json.dumps(version))
        kind: Kind = "Negative" if file.get("type") == "Negative" else "Model"
        origin_ = f"civitai:{version.get('modelId')}@{version.get('id')}"
        details = Details(origin=origin_, kind=kind, about=about)
        images = [i for i in version.get("images") or () if isinstance(i, dict) and i.get("type", "image") == "image"]
        url = self._own(str(file.get("downloadUrl") or version.get("downloadUrl") or ""))
        return CivitaiFile(
            url, str(file.get("name") or "embedding"), sha256, details, str((images or [{}])[0].get("url") or "")
        )

    def _own(self, url: str) -> str:
        """Return a download's address at the site we were told to use."""
        parts, base = urlsplit(url), urlsplit(self._base)
        if parts.hostname in HOSTS:
            return urlunsplit(parts._replace(scheme=base.scheme, netloc=base.netloc))
        return url


def without_secrets(source: str) -> str:
    """Return a source as it may be kept and shown: of an address's query only the version is left."""
    if not source.startswith(("http://", "https://")):
        return source
    parts = urlsplit(source)
    version = parse_qs(parts.query).get("modelVersionId", [""])[0]
    query = f"modelVersionId={version}" if version.isdecimal() else ""
    return urlunsplit(parts._replace(query=query, fragment="", netloc=parts.netloc.rpartition("@")[2]))


def _parsed(source: str) -> tuple[int | None, int | None, str | None]:
    """Return model id, version id and hash, as far as a source names them.

    Raises:
        InvalidField: none of them.
    """
    text = source.strip()
    model: int | None = None
    version: int | None = None
    digest: str | None = None
    if match := _AIR.fullmatch(text):
        model, version = int(match[1]), int(match[2])
    elif match := _PLAIN.fullmatch(text):
        version = int(match["version"])
    elif match := _HASH.fullmatch(text):
        digest = match["hash"].upper()
    elif text.startswith(("http://", "https://")):
        parts = urlsplit(text)
        asked = parse_qs(parts.query).get("modelVersionId", [""])[0]
        page, download = _PAGE.search(parts.path), _DOWNLOAD.search(parts.path)
        version = int(asked) if asked.isdecimal() else int(download["version"]) if download else None
        model = int(page["model"]) if page and not download else None
    if (version or model or 0) > MAX_ID or (version is None and model is None and digest is None):
        raise InvalidField("source", f"{text[:100]!r} should be civitai:VERSION, civitai:HASH or the page's address")
    return model, version, digest


def _chosen(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one file for each of the kinds that are embeddings; safetensors if there is a choice."""
    best: dict[str, dict[str, Any]] = {}
    for file in files:
        kind = file.get("type")
        if kind not in ("Model", "Negative"):
            continue
        metadata = file.get("metadata")
        safe = isinstance(metadata, dict) and metadata.get("format") == "SafeTensor"
        if kind not in best or (safe and not best[kind].get("_safe")):
            best[kind] = file | {"_safe": safe}
    return list(best.values())


def _said(start: bytes) -> str:
    """Return what the site said, if it sent a JSON error in place of a file."""
    try:
        answer = json.loads(start)
    except ValueError:
        return ""
    if not isinstance(answer, dict) or not (answer.get("error") or answer.get("message")):
        return ""
    return f"Civitai answers: {str(answer.get('message') or answer['error'])[:200]}"


def _hint(status: int) -> str:
    return "; set LATENTFARM_CIVITAI_TOKEN" if status in (401, 403) else ""
