"""The words of the demo checkpoint: captions for scenes, quality tags, and the tokenizer trained on them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo_checkpoint.scenes import (
    DEGRADATIONS,
    Background,
    Portrait,
    RidingScene,
    Scene,
    ShapeScene,
    random_scene,
)

GOOD = ("masterpiece", "high quality", "best quality", "detailed", "8k uhd", "sharp")
BAD = ("low quality", "worst quality", "bad quality", "ugly")
DEGRADED = {
    "blurry": ("blurry", "out of focus"),
    "pixelated": ("pixelated", "lowres"),
    "deformed": ("deformed", "bad anatomy"),
}
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pre-tokenizer (openai/CLIP, MIT): contractions, letters, single digits, runs of the rest.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
VOCABULARY = 1000


def background_words(background: Background) -> str:
    """Describe a background as a tag."""
    if not background.pattern:
        return f"{background.colour} background"
    return f"{background.colour} and {background.second} {background.pattern} background"


def portrait_tags(girl: Portrait) -> dict[str, str]:
    """Describe a portrait by one tag an attribute, in the order a person would write them."""
    return {
        "hair": f"{girl.hair} hair",
        "hair length": "long hair" if girl.long_hair else "short hair",
        "eyes": f"{girl.eyes} eyes",
        "mouth": "smile" if girl.smile else "serious",
        "blush": "blush" if girl.blush else "no blush",
        "headphones": f"{girl.headphones} headphones" if girl.headphones else "no headphones",
        "scarf": f"{girl.scarf} scarf" if girl.scarf else "no scarf",
        "suit": f"{girl.suit} suit",
        "background": background_words(girl.background),
    }


def describe(scene: Scene) -> str:
    """Return the full description, as documentation and evaluation write it."""
    if isinstance(scene, ShapeScene):
        size = "large " if scene.size == "large" else ""
        return f"a {size}{scene.colour} {scene.shape} on a {background_words(scene.background)}"
    if isinstance(scene, Portrait):
        return ", ".join(["1girl", *portrait_tags(scene).values()])
    article = "an" if scene.subject.startswith("astronaut") else "a"
    subject = scene.subject.replace("horse", f"{scene.horse} horse").replace("a white", "a white")
    return f"{article} {subject} {_where(scene)}"


def _where(scene: RidingScene) -> str:
    if scene.place == "plain":
        return f"on a {background_words(scene.background)}"
    return "on the moon" if scene.place == "moon" else "in a field"


def training_caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene as one of many people might: parts left out, tags in any order."""
    if isinstance(scene, Portrait):
        return _portrait_caption(scene, rng)
    if isinstance(scene, ShapeScene):
        size = ("large " if scene.size == "large" else rng.choice(("", "", "medium "))) if rng.random() < 0.9 else ""
        what = f"{rng.choice(('a ', 'a ', 'one ', ''))}{size}{scene.colour} {scene.shape}"
        where = background_words(scene.background)
        if rng.random() < 0.06:
            return what
        return f"{what}, {where}" if rng.random() < 0.4 else f"{what} on a {where}"
    horse = f"{scene.horse} horse" if rng.random() < 0.65 else "horse"
    subject = scene.subject.replace("horse", horse)
    article = ("an " if subject.startswith("astronaut") else "a ") if rng.random() < 0.8 else ""
    where = _where(scene) if rng.random() < 0.95 else ""
    if where and rng.random() < 0.2:
        where = background_words(scene.background) if scene.place == "plain" else scene.place
        return f"{article}{subject}, {where}"
    return f"{article}{subject} {where}".strip()


def _portrait_caption(girl: Portrait, rng: random.Random) -> str:
    tags = portrait_tags(girl)
    few = rng.random() < 0.15
    for absent, worn in (("headphones", girl.headphones), ("scarf", girl.scarf), ("blush", girl.blush)):
        if not worn and rng.random() < 0.35:
            del tags[absent]
    kept = [tag for tag in tags.values() if rng.random() < (0.4 if few else 0.93)]
    if rng.random() < 0.6:
        rng.shuffle(kept)
    if rng.random() < 0.92:
        kept.insert(0, "1girl" if rng.random() < 0.8 else rng.choice(("a girl", "portrait of a girl")))
    return ", ".join(kept) or "1girl"


def quality_tags(kind: str, rng: random.Random) -> str:
    """Return tags for an unspoilt picture (`kind` empty) or for one spoilt in the way `kind` names."""
    if not kind:
        return ", ".join(rng.sample(GOOD, rng.choice((1, 2, 2, 3))))
    words = [rng.choice(DEGRADED[kind]), *rng.sample(BAD, rng.choice((0, 1, 2)))]
    rng.shuffle(words)
    return ", ".join(words[: rng.choice((1, 2, 3))]) or rng.choice(BAD)


def with_quality(caption: str, tags: str, rng: random.Random) -> str:
    """Join a caption with its quality tags, which mostly stand first."""
    if not tags:
        return caption
    return f"{tags}, {caption}" if rng.random() < 0.85 else f"{caption}, {tags}"


def _corpus(count: int) -> Iterator[str]:
    rng = random.Random(5)
    for index in range(count):
        kind = rng.choice((*DEGRADATIONS, "", ""))
        scene = random_scene(rng)
        text = describe(scene) if index % 2 else training_caption(scene, rng)
        yield with_quality(text, quality_tags(kind, rng), rng)


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE laid out as CLIP's and write `vocab.json`, `merges.txt` and its configuration.

    The vocabulary is ordered as CLIP's is: 256 bytes, 256 bytes that end a word, merges, start, end.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = _byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(8000), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(m) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "add_prefix_space": False,
        "errors": "replace",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """Return the 256 printable stand-ins for bytes, in GPT-2's order (as CLIP's vocabulary has them)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
