"""Samplers on models whose answers are known in closed form, schedules by their properties, noise by its streams."""

import math
from collections.abc import Iterator

import pytest
import torch
from latentfarm_shared.names import SAMPLERS as SAMPLER_NAMES
from latentfarm_shared.names import SCHEDULES as SCHEDULE_NAMES
from latentfarm_shared.names import TRAITS
from latentfarm_shared.parameters import SamplingOptions
from latentfarm_worker.sampling.noise import ImageNoise, NoiseRecipe
from latentfarm_worker.sampling.noise_model import NoiseModel, with_zero_terminal_snr
from latentfarm_worker.sampling.samplers import SAMPLERS, TIMESTEP_SAMPLERS
from latentfarm_worker.sampling.schedules import SCHEDULES, sigmas_for, timesteps_for
from latentfarm_worker.sampling.steps import Steps, TimestepWalk, Walk, ancestral
from torch import Tensor

OPTIONS = SamplingOptions()
SHAPE = (4, 2, 2)


def trained() -> NoiseModel:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseModel((1 - betas).cumprod(0).float())


class Silence:
    """Noise that is not there."""

    def fresh(self) -> Tensor:
        return torch.zeros(1)

    def between(self, _sigma: float, _next_sigma: float) -> Tensor:
        return torch.zeros(1)


def noise(sigmas: list[float]) -> ImageNoise:
    source = ImageNoise(NoiseRecipe(3), SHAPE)
    source.span(min(s for s in sigmas if s), max(sigmas))
    return source


def drive(steps: Steps, answers: Iterator[Tensor] | Tensor) -> tuple[Tensor, int]:
    """Run a sampler against a model that always answers the same; return its last latent and its calls."""
    next(steps)
    calls = 1
    try:
        while True:
            steps.send(answers if isinstance(answers, Tensor) else next(answers))
            calls += 1
    except StopIteration as finished:
        return finished.value, calls


def test_every_promised_sampler_and_schedule_is_there() -> None:
    assert set(SAMPLERS) | set(TIMESTEP_SAMPLERS) == set(SAMPLER_NAMES)
    assert set(SCHEDULES) == set(SCHEDULE_NAMES) - {"Automatic"}
    assert {name for name in SAMPLER_NAMES if TRAITS[name].kind == "timesteps"} == set(TIMESTEP_SAMPLERS)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("DPM fast", "DPM adaptive")])
def test_sampler_ends_at_the_clean_picture_a_perfect_model_sees(name: str) -> None:
    clean = torch.linspace(-1, 1, 16).reshape(SHAPE)
    sigmas = [10.0, 5.0, 2.0, 0.5, 0.0]
    walk = Walk(sigmas, 0.5, 10.0)

    latent, calls = drive(SAMPLERS[name](clean + 10 * torch.randn(SHAPE), walk, noise(sigmas), OPTIONS), clean)

    assert torch.allclose(latent, clean, atol=1e-5)
    assert calls == (7 if TRAITS[name].calls == 2 else 4)


@pytest.mark.parametrize("name", ["DPM fast", "DPM adaptive"])
def test_sampler_without_a_last_zero_comes_close(name: str) -> None:
    clean = torch.linspace(-1, 1, 16).reshape(SHAPE)
    sigmas = [*torch.linspace(10, 0.03, 12).tolist(), 0.0]
    options = SamplingOptions(eta=0.0)

    latent, _ = drive(
        SAMPLERS[name](clean + 10 * torch.randn(SHAPE), Walk(sigmas, 0.03, 10.0), noise(sigmas), options), clean
    )

    assert (latent - clean).abs().max() < 0.15


def flow_error(name: str, count: int) -> float:
    """Return a sampler's error on data of deviation 1, whose probability flow is known in closed form."""
    start, end = 10.0, 0.05
    sigmas = torch.linspace(math.log(start), math.log(end), count + 1).exp().tolist()
    latent = torch.tensor([[[start]]], dtype=torch.float64)
    steps = SAMPLERS[name](latent, Walk(sigmas, end, start), Silence(), OPTIONS)
    latent, sigma = next(steps)
    try:
        while True:
            latent, sigma = steps.send(latent / (1 + sigma**2))
    except StopIteration as finished:
        exact: float = start * ((1 + end**2) / (1 + start**2)) ** 0.5
        return abs(float(finished.value) - exact)


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("Heun", 2), ("DPM2", 2), ("DPM++ 2M", 2)])
def test_sampler_converges_at_its_order(name: str, order: int) -> None:
    coarse, fine = flow_error(name, 60), flow_error(name, 120)

    assert fine < 0.05
    assert 0.8 * 2**order < coarse / fine < 1.4 * 2**order


def test_higher_orders_are_more_exact() -> None:
    assert flow_error("LMS", 40) < flow_error("Euler", 40) / 3


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_timestep_sampler_finds_the_clean_latent_of_a_perfect_model(name: str) -> None:
    model = trained()
    clean = torch.linspace(-1, 1, 16).reshape(SHAPE)
    timesteps = timesteps_for(20, OPTIONS)
    start = torch.randn(SHAPE)
    steps = TIMESTEP_SAMPLERS[name](start, TimestepWalk(timesteps, model.alphas_cumprod), Silence(), OPTIONS)
    latent, step = next(steps)
    last: Tensor | None = None
    while last is None:
        try:
            alpha = float(model.alphas_cumprod[min(max(round(step), 0), 999)])
            eps = (latent - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
            latent, step = steps.send(torch.stack([eps, eps]) if name == "DDIM CFG++" else eps)
        except StopIteration as finished:
            last = finished.value

    assert (last - clean).abs().max() < 0.2


def test_ancestral_steps_split_the_next_level() -> None:
    down, up = ancestral(5.0, 2.0, 1.0)

    assert down**2 + up**2 == pytest.approx(4.0)
    assert up == pytest.approx((4 * (25 - 4) / 25) ** 0.5)
    assert ancestral(5.0, 0.0, 1.0) == (0.0, 0.0)
    assert ancestral(5.0, 2.0, 0.0) == (2.0, 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 150])
def test_schedule_descends(schedule: str, steps: int) -> None:
    sigmas = sigmas_for("Euler", schedule, trained(), steps, OPTIONS)

    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == pytest.approx(0, abs=0.03)
    assert len(sigmas) == steps + 1 or schedule == "DDIM"


def test_brownian_path_does_not_depend_on_the_order_of_questions() -> None:
    first, second = noise([14.6, 0.03]), noise([14.6, 0.03])
    pairs = [(14.6, 9.0), (9.0, 5.0), (5.0, 1.0)]

    there = [first.between(*pair) for pair in pairs]
    back = [second.between(*pair) for pair in reversed(pairs)][::-1]

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(there, back, strict=True))
    whole = first.between(14.6, 1.0) * math.sqrt(13.6)
    parts = [piece * math.sqrt(a - b) for piece, (a, b) in zip(there, pairs, strict=True)]
    assert torch.allclose(whole, torch.stack(parts).sum(0), atol=1e-4)


def test_brownian_path_has_unit_variance() -> None:
    source = ImageNoise(NoiseRecipe(1), (4, 64, 64))
    source.span(0.03, 14.6)

    assert float(source.between(9.0, 3.0).std()) == pytest.approx(1, abs=0.03)


def test_noise_of_a_gpu_starts_as_a_gpu_does() -> None:
    first = ImageNoise(NoiseRecipe(0, "NV"), (4, 64, 64)).initial().flatten()

    assert first[:4].tolist() == pytest.approx([-0.9246624, -0.425344, -2.643846, 0.145184], abs=1e-5)


def test_zero_terminal_snr_leaves_no_signal_in_the_last_step() -> None:
    model = trained()
    shifted = with_zero_terminal_snr(model.alphas_cumprod)

    assert float(shifted[-1]) < 1e-7
    assert float(shifted[0]) == pytest.approx(float(model.alphas_cumprod[0]), rel=1e-5)


def test_velocity_and_noise_tell_the_same_picture() -> None:
    model = trained()
    velocity = NoiseModel(model.alphas_cumprod, "v_prediction")
    clean, eps, sigma = torch.randn(SHAPE), torch.randn(SHAPE), 3.0
    latent = clean + sigma * eps
    alpha = 1 / math.sqrt(1 + sigma**2)
    answers = {"epsilon": eps, "v_prediction": alpha * eps - sigma * alpha * clean}

    for levels in (model, velocity):
        scaling = levels.at_sigma(sigma)
        found = scaling.keep * latent + scaling.gain * answers[levels.prediction]
        assert torch.allclose(found, clean, atol=1e-5)


def test_adaptive_sampler_ends_when_the_model_answers_nonsense() -> None:
    sigmas = [*torch.linspace(10, 0.03, 12).tolist(), 0.0]
    nonsense = torch.full(SHAPE, math.nan)

    latent, calls = drive(
        SAMPLERS["DPM adaptive"](torch.randn(SHAPE), Walk(sigmas, 0.03, 10.0), noise(sigmas), OPTIONS), nonsense
    )

    assert calls < 10
    assert not bool(latent.isfinite().any())
