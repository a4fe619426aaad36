"""The tokenizers of the farm's checkpoints, fetched by hash and kept in the cache folder."""

from __future__ import annotations

import secrets
from pathlib import Path

from latentfarm_shared.errors import InvalidField
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.registry import Registry


class Vocabularies:
    """Tokenizers by checkpoint."""

    def __init__(self, registry: Registry, cache: Path) -> None:
        """Fetch from this registry what is asked for and missing in the cache folder."""
        self._registry, self._folder = registry, cache / "tokenizers"
        self._held: dict[str, ClipTokenizer] = {}

    def of(self, checkpoint: CheckpointRecord) -> ClipTokenizer:
        """Return a checkpoint's tokenizer.

        Raises:
            InvalidField: it has none that can be used.
        """
        if checkpoint.hash not in self._held:
            paths = [self._file(checkpoint, name) for name in ("tokenizer/vocab.json", "tokenizer/merges.txt")]
            try:
                self._held[checkpoint.hash] = ClipTokenizer(*paths)
            except ValueError as error:
                raise InvalidField("model", f"{checkpoint.name!r} has no usable tokenizer ({error})") from error
        return self._held[checkpoint.hash]

    def knowing(self, word: str) -> str | None:
        """Return the name of a checkpoint of which `word` is one word of the vocabulary, if there is any."""
        for checkpoint in self._registry.checkpoints().values():
            if len(self.of(checkpoint).encode(word)) == 1:
                return checkpoint.name
        return None

    def _file(self, checkpoint: CheckpointRecord, name: str) -> Path:
        file = checkpoint.file(name)
        if file is None:
            raise InvalidField("model", f"{checkpoint.name!r} has no {name}")
        path = self._folder / file.sha256
        if not path.exists():
            partial = path.with_name(path.name + secrets.token_hex(4))
            self._registry.download_blob(file.sha256, partial)
            partial.replace(path)
        return path
