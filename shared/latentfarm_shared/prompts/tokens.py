"""CLIP's tokenizer on `tokenizers`, built from a checkpoint's own `vocab.json` and `merges.txt`."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
# openai/CLIP's word pattern (MIT): special tokens, contractions, letters, single digits, runs of the rest.
_WORD = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class ClipTokenizer:
    """Text to token ids, without start, end or padding. Raises ValueError if the files are not CLIP's."""

    def __init__(self, vocabulary: Path, merges: Path) -> None:
        """Read the two files of a checkpoint's tokenizer folder."""
        try:
            ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
            pairs = [
                line.split(" ")
                for line in merges.read_text(encoding="utf-8").splitlines()
                if not line.startswith("#version")
            ]
            model = models.BPE(
                vocab=ids,
                merges=[(left, right) for left, right in (pair for pair in pairs if len(pair) == 2)],
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token=END,
            )
            self.start_id, self.end_id, self.comma_id = ids[START], ids[END], ids.get(",</w>")
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{vocabulary} and {merges} are not a CLIP tokenizer: {error}") from error
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )

    def word(self, token: int) -> str:
        """Return a token as people read it."""
        return (self._tokenizer.id_to_token(token) or "").removesuffix("</w>")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
