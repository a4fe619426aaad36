"""The engine on a small model that counts its batches."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch
from latentfarm_shared.errors import RenderCanceled, RenderError
from latentfarm_worker.engine import Engine
from latentfarm_worker.operations import Conditioning, Decode, Denoise, Encode
from latentfarm_worker.renders import Render
from torch import Tensor


class CountingModel:
    """Denoises by halving; fails on a latent that holds 13."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []

    def encode(self, batch: Sequence[Encode]) -> list[Conditioning]:
        self.batches.append(("encode", len(batch)))
        return [Conditioning(torch.zeros(77, 4)) for _ in batch]

    def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
        self.batches.append(("denoise", len(batch)))
        if any(float(item.latent.flatten()[0]) == 13 for item in batch):
            raise RenderError("unlucky")
        return [item.latent / 2 for item in batch]

    def decode(self, batch: Sequence[Decode]) -> list[Tensor]:
        self.batches.append(("decode", len(batch)))
        return [item.latent for item in batch]


def render(start: float, steps: int, edge: int = 2) -> Render:
    conditioning = yield Encode((), 1)
    latent = torch.full((4, edge, edge), start)
    for _ in range(steps):
        latent = yield Denoise(latent, 1.0, conditioning, conditioning, 7.0)
    pixels: Tensor = yield Decode(latent)
    return pixels


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.stop()


def test_images_of_different_step_counts_share_batches(engine: Engine) -> None:
    model = CountingModel()
    futures = [engine.submit(render(8, steps), model) for steps in (1, 2, 3)]
    engine.start()

    results = [float(f.result(5).flatten()[0]) for f in futures]

    assert results == [4, 2, 1]
    denoises = [count for kind, count in model.batches if kind == "denoise"]
    assert denoises == [3, 2, 1]


def test_other_shapes_run_in_batches_of_their_own(engine: Engine) -> None:
    model = CountingModel()
    futures = [engine.submit(render(8, 1, edge), model) for edge in (2, 4, 2)]
    engine.start()

    assert [f.result(5).shape[-1] for f in futures] == [2, 4, 2]
    assert sorted(count for kind, count in model.batches if kind == "denoise") == [1, 2]


def test_error_ends_one_image_and_spares_its_neighbours(engine: Engine) -> None:
    model = CountingModel()
    futures = [engine.submit(render(start, 1), model) for start in (8, 13, 4)]
    engine.start()

    assert float(futures[0].result(5).flatten()[0]) == 4
    assert float(futures[2].result(5).flatten()[0]) == 2
    with pytest.raises(RenderError, match="unlucky"):
        futures[1].result(5)


def test_render_that_cannot_begin_fails_its_own_future(engine: Engine) -> None:
    def broken() -> Render:
        raise RenderError("no start")
        yield

    engine.start()

    with pytest.raises(RenderError, match="no start"):
        engine.submit(broken(), CountingModel()).result(5)


def test_canceled_render_ends_and_the_others_go_on(engine: Engine) -> None:
    model = CountingModel()
    doomed: Future[Tensor] = engine.submit(render(8, 100_000), model)
    engine.start()
    other = engine.submit(render(8, 1), model)
    other.result(5)

    engine.cancel(doomed)
    engine.cancel(doomed)

    with pytest.raises(RenderCanceled):
        doomed.result(5)


def test_render_canceled_before_the_engine_saw_it_never_runs(engine: Engine) -> None:
    model = CountingModel()
    doomed = engine.submit(render(8, 1), model)
    engine.cancel(doomed)
    engine.start()

    with pytest.raises(RenderCanceled):
        doomed.result(5)
    assert model.batches == []


def test_engine_says_when_it_is_idle() -> None:
    heard: list[str] = []
    engine = Engine(heard.append)
    engine.start()
    engine.submit(render(8, 1), CountingModel()).result(5)
    engine.stop()

    assert heard[-4:-1] == ["encoding", "denoising", "decoding"]
    assert heard[-1] == "idle"


def test_urgent_image_overtakes(engine: Engine) -> None:
    model = CountingModel()
    order: list[str] = []
    slow = engine.submit(render(8, 1, 4), model)
    slow.add_done_callback(lambda _: order.append("batch"))
    fast = engine.submit(render(8, 1, 2), model, urgent=True)
    fast.add_done_callback(lambda _: order.append("interactive"))
    engine.start()
    slow.result(5)
    fast.result(5)

    assert order == ["interactive", "batch"]


def test_stop_cancels_what_is_in_flight() -> None:
    engine = Engine()
    future = engine.submit(render(8, 100_000), CountingModel())
    engine.start()

    engine.stop()

    with pytest.raises(RenderCanceled):
        future.result(5)
