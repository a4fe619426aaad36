"""A1111 v1.10.1's own numbers: attention, chunks, sigmas, noise, quoting."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from latentfarm_shared.infotext import quote
from latentfarm_shared.prompts.attention import parse_attention
from latentfarm_shared.prompts.chunks import chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.specs import JobSpec, expand
from latentfarm_worker.operations import Conditioning, Denoise, Encode
from latentfarm_worker.renders import RenderRequest, txt2img
from latentfarm_worker.schedules import SCHEDULES, NoiseModel, sigmas_for

from tests.conftest import embedding, vectors

# Known faults of A1111 that are not reproduced: a number it cannot read raises, BREAK in brackets becomes a word,
# comma backtracking leaves an embedding's vectors behind.
FAULTS = ("(a:1..2)", "(a BREAK b:1.3)")


def weighted_text(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Drop the empty segments that surround breaks."""
    return [(text, round(weight, 6)) for text, weight in pairs if text]


def test_attention_agrees_with_every_case() -> None:
    for case in vectors("a1111_attention.json"):
        if case["in"] in FAULTS:
            continue
        found = [("BREAK", -1.0) if s.is_break else (s.text, s.weight) for s in parse_attention(case["in"])]

        assert weighted_text(found) == weighted_text([(t, w) for t, w in case["out"]]), case["in"]


def test_chunks_agree_with_every_case(clip_tokenizer: ClipTokenizer) -> None:
    table = vectors("a1111_chunks.json")
    matcher = NameMatcher(clip_tokenizer, [embedding(name, n, 768) for name, n in table["embeddings"].items()])
    for case in table["cases"]:
        fault = case["in"] in FAULTS or ("badhandv4" in case["in"] and len(case["in"].split()) > 70)
        if fault:
            continue
        chunks = chunk_prompt(case["in"], clip_tokenizer, matcher)

        assert [list(c.tokens) for c in chunks] == [c["tokens"] for c in case["chunks"]], case["in"]
        assert [list(c.weights) for c in chunks] == [pytest.approx(c["multipliers"]) for c in case["chunks"]]
        placed = [[[p.position - 1, p.embedding.name] for p in c.placements] for c in chunks]
        assert placed == [c["fixes"] for c in case["chunks"]], case["in"]


def test_backtracking_takes_an_embedding_along(clip_tokenizer: ClipTokenizer) -> None:
    matcher = NameMatcher(clip_tokenizer, [embedding("badhandv4", 6, 768)])
    prompt = "cat " * 60 + ", dog badhandv4 " + "cat " * 12

    first, second = chunk_prompt(prompt, clip_tokenizer, matcher)

    assert first.placements == ()
    assert [(p.position, p.rows) for p in second.placements] == [(2, 6)]


@pytest.fixture(scope="module")
def noise_model() -> NoiseModel:
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000
    )
    return NoiseModel.from_alphas(scheduler.alphas_cumprod)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigmas_agree(noise_model: NoiseModel, schedule: str) -> None:
    for steps, expected in vectors("a1111_sigmas.json")["schedules"].items():
        assert sigmas_for(schedule, noise_model, int(steps)) == pytest.approx(expected[schedule], rel=2e-6)


def test_training_step_is_the_inverse_of_sigma(noise_model: NoiseModel) -> None:
    for step in (0.0, 0.5, 353.25, 998.9, 999.0):
        sigma = float(noise_model.sigma_at(torch.tensor([step])))
        assert noise_model.step_at(sigma) == pytest.approx(step, abs=1e-2)


def noise_of_a_render(noise_model: NoiseModel, seed: int, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the initial noise of a render and that of its first ancestral step, read off what it yields."""
    spec = JobSpec(prompt="", sampler="Euler a", steps=2, seed=seed, width=shape[2] * 8, height=shape[1] * 8)
    request = RenderRequest((), (), expand(spec, 0))
    render = txt2img(request, noise_model)
    conditioning = Conditioning(torch.zeros(77, 4))
    assert isinstance(next(render), Encode)
    assert isinstance(render.send(conditioning), Encode)
    start = render.send(conditioning)
    assert isinstance(start, Denoise)
    after = render.send(torch.zeros(shape))
    assert isinstance(after, Denoise)
    sigma, next_sigma = start.sigma, after.sigma
    up = (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5
    down = (next_sigma**2 - up**2) ** 0.5
    return start.latent / sigma, (after.latent - start.latent * down / sigma) / up


def test_noise_of_a_seed_agrees(noise_model: NoiseModel) -> None:
    cases: list[dict[str, Any]] = [c for c in vectors("a1111_rng.json") if c["source"] == "CPU" and len(c) == 7]
    checked = 0
    for case in cases:
        if len(case["seeds"]) != 1 or case["ensd"]:
            continue
        first, second = noise_of_a_render(noise_model, case["seeds"][0], case["shape"])
        assert first.flatten()[:8].tolist() == pytest.approx(case["first8"], abs=1e-6)
        assert second.flatten()[:8].tolist() == pytest.approx(case["second8"], abs=1e-3)
        checked += 1

    assert checked


def test_quoting_agrees() -> None:
    for case in vectors("a1111_infotext.json")["quote"]:
        assert quote(case["in"]) == str(case["out"])
