import io
from pathlib import Path

import pytest
import torch
from latentfarm_shared.names import SAMPLERS as SAMPLER_NAMES
from latentfarm_shared.names import SCHEDULES as SCHEDULE_NAMES
from latentfarm_worker.png import encode_png
from latentfarm_worker.samplers import SAMPLERS, _ancestral
from latentfarm_worker.schedules import SCHEDULES
from latentfarm_worker.vitals import STALL_LIMIT_S, StallWatch, Vitals
from PIL import Image


def test_every_promised_sampler_and_schedule_is_there() -> None:
    assert set(SAMPLERS) == set(SAMPLER_NAMES)
    assert set(SCHEDULES) == set(SCHEDULE_NAMES) - {"Automatic"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_ends_at_the_clean_picture_a_perfect_model_sees(name: str) -> None:
    clean = torch.linspace(-1, 1, 16).reshape(4, 2, 2)
    sigmas = [10.0, 5.0, 2.0, 0.5, 0.0]
    steps = SAMPLERS[name](clean + 10 * torch.randn(4, 2, 2), sigmas, lambda: torch.randn(4, 2, 2))

    latent, calls = next(steps)[0], 0
    try:
        while True:
            calls += 1
            latent, _ = steps.send(clean)
    except StopIteration as finished:
        latent = finished.value

    assert torch.allclose(latent, clean, atol=1e-5)
    assert calls == (7 if name == "Heun" else 4)


def flow_error(name: str, count: int) -> float:
    """Return a sampler's error on data of deviation 1, whose probability flow is known in closed form."""
    start, end = 10.0, 0.05
    sigmas = torch.linspace(torch.tensor(start).log(), torch.tensor(end).log(), count + 1).exp().tolist()
    steps = SAMPLERS[name](torch.tensor([[[start]]], dtype=torch.float64), sigmas, lambda: torch.zeros(1, 1, 1))
    latent, sigma = next(steps)
    try:
        while True:
            latent, sigma = steps.send(latent / (1 + sigma**2))
    except StopIteration as finished:
        exact: float = start * ((1 + end**2) / (1 + start**2)) ** 0.5
        return abs(float(finished.value) - exact)


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("Heun", 2), ("DPM++ 2M", 2)])
def test_sampler_converges_at_its_order(name: str, order: int) -> None:
    coarse, fine = flow_error(name, 60), flow_error(name, 120)

    assert fine < 0.05
    assert 0.8 * 2**order < coarse / fine < 1.35 * 2**order


def test_ancestral_steps_split_the_next_level() -> None:
    down, up = _ancestral(5.0, 2.0)

    assert down**2 + up**2 == pytest.approx(4.0)
    assert up == pytest.approx((4 * (25 - 4) / 25) ** 0.5)
    assert _ancestral(5.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("text", ["plain, words", "中文 提示, 猫\nNegative prompt: 丑"])
def test_png_carries_its_parameters(text: str) -> None:
    pixels = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8)

    image = Image.open(io.BytesIO(encode_png(pixels, text)))

    assert image.info["parameters"] == text
    assert torch.equal(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(16, 24, 3), pixels)


def test_vitals_are_read_as_written(tmp_path: Path) -> None:
    reader = Vitals(tmp_path / "vitals", create=True)
    writer = Vitals(tmp_path / "vitals")
    writer.beat("loading")
    writer.note(8, 1, 3)
    writer.advertise(["a" * 64, "b" * 64])
    writer.beat("denoising")

    signs = reader.read()

    assert (signs.phase, signs.slots, signs.loads, signs.embeddings) == ("denoising", 8, 1, 3)
    assert signs.checkpoints == ("a" * 64, "b" * 64)


def test_stall_is_seen_only_past_the_limit_of_the_phase(tmp_path: Path) -> None:
    vitals = Vitals(tmp_path / "vitals", create=True)
    vitals.beat("denoising")
    watch = StallWatch()
    limit = STALL_LIMIT_S["denoising"]

    assert not watch.is_stalled(vitals.read(), now=0)
    assert not watch.is_stalled(vitals.read(), now=limit - 1)
    assert watch.is_stalled(vitals.read(), now=limit + 1)
    vitals.beat("denoising")
    assert not watch.is_stalled(vitals.read(), now=limit + 2)


def test_idle_worker_never_stalls(tmp_path: Path) -> None:
    vitals = Vitals(tmp_path / "vitals", create=True)
    vitals.beat("idle")
    watch = StallWatch()
    watch.is_stalled(vitals.read(), now=0)

    assert not watch.is_stalled(vitals.read(), now=1e9)
