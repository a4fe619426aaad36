"""Renders as generators, driven by hand: guidance, repairs, upscaling, progress."""

from typing import Any

import pytest
import torch
from latentfarm_shared.errors import BrokenPicture
from latentfarm_shared.parameters import HiresFix, SamplingOptions
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JobSpec, expand
from latentfarm_worker.checkpoint import emphasise
from latentfarm_worker.guidance import Guidance, Timed
from latentfarm_worker.operations import (
    Conditioning,
    Decode,
    Denoise,
    Encode,
    EncodePixels,
    Enlarge,
    Picture,
    Progress,
    Rendered,
)
from latentfarm_worker.prompts import LaidPart
from latentfarm_worker.renders import RenderRequest, txt2img
from latentfarm_worker.sampling.noise_model import NoiseModel
from latentfarm_worker.upscaling import TILE, enlarge_latent, enlarge_pixels
from torch import Tensor
from torch.nn import functional

from tests.conftest import checkpoint


class PaperModel:
    """What a render asks of its checkpoint, on paper."""

    noise = NoiseModel(torch.linspace(0.999, 0.005, 1000))
    device = "cpu"
    family = "sd1"

    def __init__(self, *, is_precise: bool = True) -> None:
        self.is_precise = is_precise

    def wants_zero(self, _negative: LaidPart) -> bool:
        return False

    def require_upscaler(self, _name: str) -> None:
        pass


def answer(operation: Any, picture: Picture) -> Any:
    """Answer an operation as a model would that sees nothing but grey."""
    match operation:
        case Encode():
            return tuple(Conditioning(torch.zeros(77 * len(text), 4)) for text in operation.texts)
        case Denoise():
            return operation.latent * 0.5
        case Decode():
            return picture
        case EncodePixels():
            return torch.zeros_like(operation.noise)
        case Enlarge():
            return functional.interpolate(operation.tile[None], scale_factor=4, mode="nearest")[0]


def run(
    spec: JobSpec, tokenizer: ClipTokenizer, pictures: list[Picture], model: PaperModel
) -> tuple[Rendered, list[Any]]:
    """Drive a render to its end; return what it made and what it asked for."""
    request = RenderRequest.build(expand(spec, 0), Lock(checkpoint=checkpoint()), tokenizer)
    render, asked, left = txt2img(request, model), [], list(pictures)
    operation = next(render)
    while True:
        asked.append(operation)
        picture = left.pop(0) if isinstance(operation, Decode) and len(left) > 1 else left[0]
        try:
            operation = render.send(answer(operation, picture))
        except StopIteration as finished:
            return finished.value, asked


GOOD = Picture(torch.full((64, 64, 3), 9, dtype=torch.uint8))
BLACK = Picture(torch.zeros(64, 64, 3, dtype=torch.uint8))
BROKEN = Picture(torch.full((64, 64, 3), 9, dtype=torch.uint8), finite=False)
SMALL = JobSpec(prompt="a cat", seed=1, steps=3, width=64, height=64)


def test_sound_picture_is_made_once(demo_tokenizer: ClipTokenizer) -> None:
    rendered, asked = run(SMALL, demo_tokenizer, [GOOD], PaperModel(is_precise=False))

    assert torch.equal(rendered.pixels, GOOD.pixels)
    assert [type(operation) for operation in asked] == [Encode, Encode, Denoise, Denoise, Denoise, Decode]


@pytest.mark.parametrize("bad", [BLACK, BROKEN])
def test_broken_picture_is_decoded_again_in_float32(demo_tokenizer: ClipTokenizer, bad: Picture) -> None:
    rendered, asked = run(SMALL, demo_tokenizer, [bad, GOOD], PaperModel(is_precise=False))

    assert torch.equal(rendered.pixels, GOOD.pixels)
    assert [operation.precise for operation in asked if isinstance(operation, Decode)] == [False, True]


def test_picture_still_broken_is_rendered_again_in_float32(demo_tokenizer: ClipTokenizer) -> None:
    _, asked = run(SMALL, demo_tokenizer, [BROKEN, BROKEN, GOOD], PaperModel(is_precise=False))

    assert [operation.precise for operation in asked if isinstance(operation, Denoise)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("bad", "says"), [(BLACK, "all black"), (BROKEN, "not finite")])
def test_picture_broken_in_float32_is_an_error(demo_tokenizer: ClipTokenizer, bad: Picture, says: str) -> None:
    with pytest.raises(BrokenPicture, match=says):
        run(SMALL, demo_tokenizer, [bad], PaperModel())


@pytest.mark.parametrize("upscaler", ["Latent", "Latent (nearest-exact)", "Lanczos", "None", "some-model"])
def test_hires_pass_walks_exactly_its_steps(demo_tokenizer: ClipTokenizer, upscaler: str) -> None:
    hires = HiresFix(scale=2, upscaler=upscaler, steps=5, denoising_strength=0.3)
    _, asked = run(SMALL.model_copy(update={"hires": hires}), demo_tokenizer, [GOOD], PaperModel())

    shapes = [tuple(operation.latent.shape) for operation in asked if isinstance(operation, Denoise)]
    assert shapes == [(4, 8, 8)] * 3 + [(4, 16, 16)] * 5


def test_hires_without_denoising_only_enlarges(demo_tokenizer: ClipTokenizer) -> None:
    hires = HiresFix(scale=2, denoising_strength=0.0)
    _, asked = run(SMALL.model_copy(update={"hires": hires}), demo_tokenizer, [GOOD], PaperModel())

    assert sum(isinstance(operation, Denoise) for operation in asked) == 3
    assert asked[-1].latent.shape == (4, 16, 16)


def test_upscaler_model_is_run_in_tiles_that_fit_together() -> None:
    pixels = torch.randint(0, 256, (TILE + 70, TILE * 2 + 3, 3), dtype=torch.uint8)
    size = pixels.shape[1] * 4, pixels.shape[0] * 4
    steps = enlarge_pixels(pixels, "some-model", size)
    tiles = [next(steps)]
    result: Tensor | None = None
    while result is None:
        try:
            tiles.append(steps.send(answer(tiles[-1], GOOD)))
        except StopIteration as finished:
            result = finished.value

    assert len(tiles) == 6
    assert all(isinstance(tile, Enlarge) and max(tile.tile.shape) <= TILE for tile in tiles)
    expected = functional.interpolate(pixels.permute(2, 0, 1)[None].float(), scale_factor=4, mode="nearest")[0]
    assert torch.equal(result, expected.permute(1, 2, 0).to(torch.uint8))


def test_latent_is_enlarged_to_the_size_in_pixels() -> None:
    assert enlarge_latent(torch.randn(4, 8, 12), "Latent (bicubic)", (144, 96)).shape == (4, 12, 18)


def test_progress_tells_stage_and_step(demo_tokenizer: ClipTokenizer) -> None:
    request = RenderRequest.build(expand(SMALL, 0), Lock(checkpoint=checkpoint()), demo_tokenizer)
    render = txt2img(request, PaperModel())
    operation: Any = next(render)
    for _ in range(4):
        operation = render.send(answer(operation, GOOD))

    progress: Progress = request.progress
    assert (progress.stage, progress.step, progress.steps) == ("first pass", 2, 3)
    assert progress.latent is not None
    assert progress.latent.shape == (4, 8, 8)


# ---- guidance


def text(value: float, chunks: int = 1) -> Conditioning:
    return Conditioning(torch.full((77 * chunks, 2), value))


def guidance(cfg: float = 7.0, options: SamplingOptions | None = None, **values: Any) -> Guidance:
    positive = values.pop("positive", (Timed(1.0, (10,), (text(1),)),))
    negative = values.pop("negative", Timed(1.0, (10,), (text(0),)))
    return Guidance(positive, negative, cfg, 10, options or SamplingOptions(), **values)


def shares(found: Guidance, call: int = 1, level: float = 1.0) -> list[float]:
    return [round(side.share, 6) for side in found.sides(call, level)]


def test_negative_side_is_left_out_where_it_changes_nothing() -> None:
    assert shares(guidance(1.0)) == [1.0]
    assert len(shares(guidance(7.0))) == 2
    assert len(shares(guidance(1.0, renoises=True))) == 2


def test_negative_side_is_left_out_when_noise_is_low_or_early() -> None:
    low = SamplingOptions(ngms=2.0)
    assert [len(shares(guidance(7.0, low), call, 1.0)) for call in (0, 1, 2, 3)] == [2, 1, 2, 1]
    assert len(shares(guidance(7.0, low), 1, 3.0)) == 2
    always = SamplingOptions(ngms=2.0, ngms_all_steps=True)
    assert [len(shares(guidance(7.0, always), call, 1.0)) for call in (0, 1)] == [1, 1]
    early = SamplingOptions(skip_early_cfg=0.2)
    assert [len(shares(guidance(7.0, early), call)) for call in (0, 2, 3)] == [1, 1, 2]


def test_timed_texts_serve_one_call_more_than_they_have_steps() -> None:
    timed = Timed(1.0, (2, 5), (text(1), text(2)))

    assert [timed.index_at(call) for call in range(7)] == [0, 0, 0, 1, 1, 1, 0]


def test_padding_brings_both_sides_to_one_length() -> None:
    long = (Timed(1.0, (10,), (text(1, 3),)),)

    padded = guidance(7.0, SamplingOptions(pad_conds="empty"), positive=long, empty=text(5)).sides(0, 1.0)
    assert [len(side.conditioning.tokens) for side in padded] == [231, 231]
    assert padded[1].conditioning.tokens[[0, 80], 0].tolist() == [0, 5]
    first = guidance(7.0, SamplingOptions(pad_conds="v0"), positive=long).sides(0, 1.0)
    assert first[1].conditioning.tokens[[0, 80], 0].tolist() == [0, 0]
    assert [len(side.conditioning.tokens) for side in guidance(7.0, positive=long).sides(0, 1.0)] == [231, 77]


def test_sides_of_an_and_are_brought_to_one_length() -> None:
    sides = (Timed(1.0, (10,), (text(1, 2),)), Timed(-0.5, (10,), (text(2),)))

    found = guidance(2.0, positive=sides).sides(0, 1.0)
    assert [len(side.conditioning.tokens) for side in found] == [154, 154, 77]
    assert [side.share for side in found[:2]] == [2.0, -1.0]


def test_emphasis_modes() -> None:
    states, weights = torch.rand(2, 77, 4) + 1, torch.ones(2, 77)
    weights[0, 3:6] = 1.5

    plain = emphasise(states, weights, "No norm")
    assert torch.equal(plain[0, 4], states[0, 4] * 1.5)
    restored = emphasise(states, weights, "Original")
    assert float(restored.mean()) == pytest.approx(float(states.mean()), rel=1e-5)
    assert not torch.equal(restored[1], states[1])
    assert torch.equal(emphasise(states, weights, "Ignore"), states)


def test_first_pass_that_broke_is_noticed_behind_a_pixel_upscaler(demo_tokenizer: ClipTokenizer) -> None:
    hires = HiresFix(scale=2, upscaler="Lanczos", steps=1)

    with pytest.raises(BrokenPicture):
        run(SMALL.model_copy(update={"hires": hires}), demo_tokenizer, [BROKEN], PaperModel())


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps", "strength"),
    [("UniPC", "Automatic", 1, 0.5), ("DDIM", "Automatic", 1, 0.3), ("Euler", "DDIM", 150, 0.1), ("LCM", "DDIM", 20, 0.2),
     ("DPM++ 2M", "Simple", 150, 0.1), ("DPM++ 2M", "Karras", 150, 0.01)],
)  # fmt: skip
def test_unusual_hires_passes_come_to_an_end(
    demo_tokenizer: ClipTokenizer, sampler: str, schedule: str, steps: int, strength: float
) -> None:
    hires = HiresFix(sampler=sampler, schedule=schedule, steps=steps, denoising_strength=strength)

    rendered, _ = run(SMALL.model_copy(update={"hires": hires}), demo_tokenizer, [GOOD], PaperModel())

    assert torch.equal(rendered.pixels, GOOD.pixels)
