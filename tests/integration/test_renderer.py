"""The offline renderer on the demo checkpoint: mixtures, determinism, proof, previews."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentfarm_shared.errors import EmbeddingNotApplied, RenderCanceled, UnknownName
from latentfarm_shared.names import SAMPLERS
from latentfarm_shared.specs import JobSpec, expand
from latentfarm_worker import Renderer
from latentfarm_worker.injection import Injection
from latentfarm_worker.operations import Progress
from latentfarm_worker.previews import fitting, preview
from latentfarm_worker.proof import checked
from latentfarm_worker.runtime import Runtime
from torch import Tensor

TOLERANCE = 1  # of 255: what other images in the batch may change, by rounding


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with Renderer("demo") as found:
        yield found


@pytest.fixture(scope="module")
def strict() -> Iterator[Renderer]:
    with Renderer("demo", runtime=Runtime(fixed_size=8), slots=4) as found:
        yield found


JOBS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(
            ["a girl", "masterpiece, corneo_dva", "(a cat:1.3) AND [dog|moon] :0.5", "long " * 80, "[a:corneo_dva:0.5]"]
        ),
        "negative_prompt": st.sampled_from(["", "16-token-demo-neg", "blurry"]),
        "sampler": st.sampled_from([name for name in SAMPLERS if name != "DPM adaptive"]),
        "steps": st.integers(2, 4),
        "cfg_scale": st.sampled_from([1.0, 5.0, 7.5]),
        "seed": st.integers(0, 99),
        "width": st.sampled_from([64, 96]),
        "height": st.just(64),
        "rng": st.sampled_from(["CPU", "NV"]),
        "clip_skip": st.sampled_from([1, 2]),
        "hires": st.sampled_from([None, {"scale": 1.5, "steps": 2}]),
        "tiling": st.booleans(),
    }
)


def together(renderer: Renderer, specs: list[JobSpec]) -> list[Tensor]:
    futures = []
    for number, spec in enumerate(specs):
        frozen, lock = renderer.freeze(spec)
        futures.append((renderer.submit(frozen, lock, urgent=number % 3 == 0), expand(frozen, 0), lock))
    return [checked(future.result(), image, lock).pixels for future, image, lock in futures]


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(JOBS, min_size=2, max_size=6))
def test_image_of_a_mixture_equals_the_image_alone(renderer: Renderer, mixture: list[dict[str, Any]]) -> None:
    specs = [JobSpec.check(values) for values in mixture]

    mixed = together(renderer, specs)

    for spec, picture in zip(specs, mixed, strict=True):
        (alone,) = together(renderer, [spec])
        assert int((picture.int() - alone.int()).abs().max()) <= TOLERANCE, spec


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(JOBS, min_size=2, max_size=4))
def test_strict_image_is_the_same_bit_for_bit_in_any_company(strict: Renderer, mixture: list[dict[str, Any]]) -> None:
    specs = [JobSpec.check(values) for values in mixture]

    mixed = together(strict, specs)

    for spec, picture in zip(specs, mixed, strict=True):
        (alone,) = together(strict, [spec])
        assert torch.equal(picture, alone), spec


def test_embedding_changes_the_picture(renderer: Renderer) -> None:
    plain, with_embedding = (
        renderer.render(prompt, seed=43, steps=4)[0] for prompt in ("masterpiece", "masterpiece, corneo_dva")
    )

    assert (plain.int() - with_embedding.int()).abs().float().mean() > 10


MENTIONS = ["corneo_dva", "a [girl:corneo_dva:0.5]", "(corneo_dva:1.3) AND a cat", "x BREAK corneo_dva"]


@pytest.mark.parametrize("prompt", MENTIONS)
def test_picture_fails_when_the_write_is_disabled(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    monkeypatch.setattr(Injection, "write", lambda _self, _module, _inputs, embedded: embedded)
    with Renderer("demo") as mutant, pytest.raises(EmbeddingNotApplied):
        mutant.render(prompt, steps=1, width=64, height=64)


@pytest.mark.parametrize("prompt", MENTIONS)
def test_picture_fails_when_nothing_is_written_and_nothing_looked_for(
    monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.setattr(Injection, "write", lambda _self, _module, _inputs, embedded: embedded)
    monkeypatch.setattr(Injection, "prove", lambda self: tuple(frozenset[str]() for _ in self.placements))
    with Renderer("demo") as mutant, pytest.raises(EmbeddingNotApplied, match="corneo_dva"):
        mutant.render(prompt, steps=1, width=64, height=64)


def test_rendering_leaves_the_encoder_and_random_streams_alone(renderer: Renderer) -> None:
    encoder = renderer.checkpoint.encoders[0].module
    hooks = len(encoder.get_input_embeddings()._forward_hooks)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.random.get_rng_state()

    renderer.render("corneo_dva", steps=1, width=64, height=64)

    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(encoder.get_input_embeddings()._forward_hooks) == hooks == 0


def test_prompts_are_encoded_once(renderer: Renderer) -> None:
    renderer.render("never seen before, corneo_dva", steps=1, width=64, height=64)
    cache = renderer.checkpoint.cache
    hits, misses = cache.hits, cache.misses

    renderer.render("never seen before, corneo_dva", steps=1, width=64, height=64, seed=5, count=3)

    assert cache.misses == misses
    assert cache.hits == hits + 6


def test_canceled_neighbour_changes_nothing(renderer: Renderer) -> None:
    spec, lock = renderer.freeze(JobSpec(prompt="a girl", seed=7, steps=12, width=64, height=64))
    (alone,) = together(renderer, [spec])
    stays = renderer.submit(spec, lock)
    goes = renderer.submit(spec, lock)
    renderer.engine.cancel(goes)

    assert int((stays.result().pixels.int() - alone.int()).abs().max()) <= TOLERANCE
    with pytest.raises(RenderCanceled):
        goes.result()


def test_float16_works_where_the_vae_asks_for_float32() -> None:
    runtime = Runtime(dtype=torch.float16, vae_dtype=torch.float16)
    with Renderer("demo", runtime=runtime) as half:
        hires = {"scale": 1.5, "upscaler": "Lanczos", "steps": 1}
        (found,) = half.render("masterpiece, corneo_dva", seed=43, steps=2, width=64, height=64, hires=hires)

    assert found.shape == (96, 96, 3)


def test_previews_come_to_resemble_the_picture(renderer: Renderer) -> None:
    colours = renderer.engine.submit(fitting(), renderer.checkpoint).result().pixels
    progress = Progress()
    spec, lock = renderer.freeze(JobSpec(prompt="masterpiece, corneo_dva", seed=43, steps=8))
    assert preview(progress, colours) is None

    pixels = renderer.submit(spec, lock, progress=progress).result().pixels

    found = preview(progress, colours)
    assert found is not None
    assert found.shape == (16, 16, 3)
    small = torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None].float(), size=(16, 16), mode="area")[0]
    both = torch.stack([small.flatten(), found.permute(2, 0, 1).float().flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.5


def test_unknown_upscaler_is_an_error_with_the_names_there_are(renderer: Renderer) -> None:
    with pytest.raises(UnknownName, match="4x-Nothing"):
        renderer.render("a", steps=1, width=64, height=64, hires={"upscaler": "4x-Nothing", "steps": 1})


@pytest.mark.parametrize("vae", [torch.float32, torch.bfloat16])
def test_half_precision_renders_the_same_picture(vae: torch.dtype) -> None:
    runtime = Runtime(dtype=torch.bfloat16, vae_dtype=vae)
    with Renderer("demo") as full, Renderer("demo", runtime=runtime) as half:
        pictures = [r.render("masterpiece, corneo_dva", seed=43, steps=8)[0].int() for r in (full, half)]

    assert (pictures[0] - pictures[1]).abs().float().mean() < 12


def test_example_of_the_readme_works() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), re.DOTALL)
    found: dict[str, Any] = {}

    exec(compile(next(code for code in blocks if "Renderer" in code), "README.md", "exec"), found)  # noqa: S102

    assert [tuple(picture.shape) for picture in found["pictures"]] == [(128, 128, 3)]
