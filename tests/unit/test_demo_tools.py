"""The demo checkpoint's pictures, captions and judge."""

import random

import pytest
from demo_checkpoint.captions import describe, quality_tags, training_caption
from demo_checkpoint.classify import check, validate
from demo_checkpoint.diffusion import HEADS, _labels
from demo_checkpoint.inversion import CHARACTER, POSITIVE_CAPTIONS
from demo_checkpoint.scenes import (
    DEGRADATIONS,
    Background,
    Portrait,
    RidingScene,
    ShapeScene,
    degrade,
    is_held_out,
    random_scene,
    render,
)
from latentfarm_shared.prompts.tokens import ClipTokenizer

KINDS = (ShapeScene, Portrait, RidingScene)


def test_judge_confirms_what_is_painted_and_denies_what_is_not() -> None:
    figures = validate(count=40)

    assert min(value for name, value in figures.items() if not name.endswith("false")) >= 0.97
    assert max(value for name, value in figures.items() if name.endswith("false")) < 0.75


def test_judge_sees_missing_headphones_and_extra_ones() -> None:
    rng = random.Random(1)
    with_pink = Portrait(
        hair="brown", long_hair=False, eyes="green", smile=True, blush=False, headphones="pink", scarf="",
        suit="blue", background=Background("yellow"),
    )  # fmt: skip
    without = Portrait(**{**vars(with_pink), "headphones": ""})

    assert check(render(with_pink, rng), with_pink)["headphones"]
    assert not check(render(without, rng), with_pink)["headphones"]
    assert not check(render(with_pink, rng), without)["headphones"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [128, 256])
def test_scene_is_painted_at_any_size(kind: type, size: int) -> None:
    image = render(random_scene(random.Random(3), kind), random.Random(4), size)

    assert image.size == (size, size)
    for way in DEGRADATIONS:
        assert degrade(image, random.Random(5), way).size == (size, size)


def test_some_scenes_are_held_out() -> None:
    rng = random.Random(6)
    scenes = [random_scene(rng, ShapeScene) for _ in range(600)]

    assert 20 < sum(map(is_held_out, scenes)) < 90


def test_descriptions_read_as_the_documentation_writes_them() -> None:
    riding = RidingScene("astronaut riding a horse", "brown", "moon", Background("red"))
    shape = ShapeScene("star", "red", "large", Background("blue", "striped", "white"))

    assert describe(riding) == "an astronaut riding a brown horse on the moon"
    assert describe(shape) == "a large red star on a blue and white striped background"
    assert describe(CHARACTER).startswith("1girl, brown hair, long hair")


def test_every_label_fits_its_head() -> None:
    rng = random.Random(7)
    for _ in range(300):
        for name, value in _labels(random_scene(rng), rng.choice(("", *DEGRADATIONS))).items():
            assert 0 <= value < HEADS[name], name


def test_captions_fit_the_encoder(demo_tokenizer: ClipTokenizer) -> None:
    rng = random.Random(8)
    for _ in range(300):
        scene = random_scene(rng)
        text = f"{quality_tags(rng.choice(('', *DEGRADATIONS)), rng)}, {training_caption(scene, rng)}"
        assert len(demo_tokenizer.encode(text)) <= 75


def test_lessons_name_the_word_once() -> None:
    assert all(caption.count("{}") == 1 for caption in POSITIVE_CAPTIONS)
