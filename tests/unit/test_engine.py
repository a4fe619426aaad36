"""The engine on a small model that counts its batches."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from latentfarm_shared.errors import DeadlineExceeded, OutOfMemory, RenderCanceled, RenderError
from latentfarm_worker.capacity import Capacity
from latentfarm_worker.engine import Engine
from latentfarm_worker.operations import (
    Conditioning,
    Decode,
    Denoise,
    Encode,
    EncodePixels,
    Enlarge,
    Operation,
    Picture,
    Render,
    Rendered,
)
from latentfarm_worker.sampling.noise_model import Scaling
from latentfarm_worker.torch_device import TorchDevice
from torch import Tensor

SCALING = Scaling(0.0, 1.0, 1.0, 1.0)


class CountingModel:
    """Denoises by halving; fails on a latent that holds 13, runs out of memory on more than `fits` at once."""

    name = "counting"

    def __init__(self, fits: int = 100) -> None:
        self.batches: list[tuple[str, int]] = []
        self.fits = fits

    def encode(self, batch: Sequence[Encode]) -> list[tuple[Conditioning, ...]]:
        self.batches.append(("encode", len(batch)))
        return [(Conditioning(torch.zeros(77, 4)),) for _ in batch]

    def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
        self.batches.append(("denoise", len(batch)))
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("too many")
        if any(float(item.latent.flatten()[0]) == 13 for item in batch):
            raise RenderError("unlucky")
        return [item.latent / 2 for item in batch]

    def decode(self, batch: Sequence[Decode]) -> list[Picture]:
        self.batches.append(("decode", len(batch)))
        return [Picture(item.latent) for item in batch]

    def encode_pixels(self, batch: Sequence[EncodePixels]) -> list[Tensor]:
        return [item.noise for item in batch]

    def enlarge(self, batch: Sequence[Enlarge]) -> list[Tensor]:
        return [item.tile for item in batch]

    def sizes(self, kind: str = "denoise") -> list[int]:
        return [count for found, count in self.batches if found == kind]


def render(start: float, steps: int, edge: int = 2) -> Render:
    yield Encode(((),))
    latent = torch.full((4, edge, edge), start)
    for _ in range(steps):
        latent = yield Denoise(latent, SCALING, ())
    picture: Picture = yield Decode(latent)
    return Rendered(picture.pixels)


def value(future: Future[Rendered]) -> float:
    return float(future.result(5).pixels.flatten()[0])


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(device=TorchDevice())
    yield engine
    engine.stop()


def test_images_of_different_step_counts_share_batches(engine: Engine) -> None:
    model = CountingModel()
    futures = [engine.submit(render(8, steps), model) for steps in (1, 2, 3)]
    engine.start()

    results = [value(future) for future in futures]

    assert results == [4, 2, 1]
    assert model.sizes() == [3, 2, 1]


def test_other_shapes_run_in_batches_of_their_own(engine: Engine) -> None:
    model = CountingModel()
    futures = [engine.submit(render(8, 1, edge), model) for edge in (2, 4, 2)]
    engine.start()

    assert [f.result(5).pixels.shape[-1] for f in futures] == [2, 4, 2]
    assert sorted(model.sizes()) == [1, 2]


def test_error_ends_one_image_and_spares_its_neighbours(engine: Engine) -> None:
    model = CountingModel()
    futures = [engine.submit(render(start, 1), model) for start in (8, 13, 4)]
    engine.start()

    assert value(futures[0]) == 4
    assert value(futures[2]) == 2
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
    doomed: Future[Rendered] = engine.submit(render(8, 100_000), model)
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
    engine = Engine(heard.append, device=TorchDevice())
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
    engine = Engine(device=TorchDevice())
    future = engine.submit(render(8, 100_000), CountingModel())
    engine.start()

    engine.stop()

    with pytest.raises(RenderCanceled):
        future.result(5)


def test_slots_bound_what_is_in_flight() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice(), slots=2)
    futures = [engine.submit(render(8, 2), model) for _ in range(5)]
    engine.start()
    for future in futures:
        future.result(5)
    engine.stop()

    assert max(model.sizes()) == 2


def test_parked_images_wait_while_an_interactive_one_is_in_flight() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice(), policy="park")
    batch = [engine.submit(render(8, 4), model) for _ in range(3)]
    urgent = engine.submit(render(8, 4), model, urgent=True)
    order: list[str] = []
    urgent.add_done_callback(lambda _: order.append("urgent"))
    batch[0].add_done_callback(lambda _: order.append("batch"))
    engine.start()
    for future in (*batch, urgent):
        future.result(5)
    engine.stop()

    assert order == ["urgent", "batch"]
    assert model.sizes()[:4] == [1, 1, 1, 1]


def test_shared_batches_take_an_interactive_image_along() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice(), slots=3, policy="share")
    futures = [engine.submit(render(8, 4), model) for _ in range(3)]
    futures.append(engine.submit(render(8, 4), model, urgent=True))
    engine.start()
    for future in futures:
        future.result(5)
    engine.stop()

    assert model.sizes() == [4, 4, 4, 4]


def test_parking_does_not_last_for_ever() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice(), policy="park", park_limit_s=0.0)
    parked = engine.submit(render(8, 2), model)
    endless = engine.submit(render(8, 10_000_000), model, urgent=True)
    engine.start()

    assert value(parked) == 2
    assert not endless.done()
    engine.stop()


def test_batch_that_does_not_fit_is_halved_and_loses_nothing() -> None:
    model, engine = CountingModel(fits=2), Engine(device=TorchDevice())
    futures = [engine.submit(render(8, 3), model) for _ in range(8)]
    engine.start()

    assert [value(future) for future in futures] == [1.0] * 8
    engine.stop()
    assert [size for size in model.sizes() if size > 2] == [8, 4, 4]


def test_image_that_does_not_fit_alone_fails_with_a_name() -> None:
    model, engine = CountingModel(fits=0), Engine(device=TorchDevice())
    future = engine.submit(render(8, 1), model)
    engine.start()

    with pytest.raises(OutOfMemory, match="while denoising"):
        future.result(5)
    engine.stop()


def test_passed_deadline_ends_one_image() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice())
    late = engine.submit(render(8, 10_000_000), model, deadline=0.0)
    other = engine.submit(render(8, 1), model)
    engine.start()

    with pytest.raises(DeadlineExceeded):
        late.result(5)
    assert value(other) == 4
    engine.stop()


def test_culprit_of_a_failed_batch_is_found_by_halving() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice())
    futures = [engine.submit(render(13 if i == 5 else 8, 1), model) for i in range(8)]
    engine.start()

    with pytest.raises(RenderError, match="unlucky"):
        futures[5].result(5)
    assert [value(f) for i, f in enumerate(futures) if i != 5] == [4.0] * 7
    engine.stop()
    assert len(model.sizes()) == 7


def test_costs_are_measured_once_and_remembered(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    model = CountingModel()
    engine = Engine(device=TorchDevice(), capacity=Capacity(budget_bytes=3 * 64, device=TorchDevice(), costs=costs))
    futures = [engine.submit(render(8, 3, edge=2), model) for _ in range(8)]
    engine.start()
    for future in futures:
        future.result(5)
    engine.stop()

    assert model.sizes()[0] == 1
    assert max(model.sizes()) == 3
    again = Capacity(budget_bytes=3 * 64, costs=costs)
    assert again.fitting("counting", [Denoise(torch.zeros(4, 2, 2), SCALING, ()) for _ in range(8)]) == 3


def test_damaged_cost_file_is_measured_again(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text("[1, 2")

    assert Capacity(budget_bytes=10, costs=costs).describe() == {}


def test_render_handed_in_after_the_end_fails_at_once() -> None:
    engine = Engine(device=TorchDevice())
    engine.start()
    engine.stop()

    with pytest.raises(RenderCanceled):
        engine.submit(render(8, 1), CountingModel()).result(5)


def test_late_render_that_waits_for_a_slot_ends_too() -> None:
    model, engine = CountingModel(), Engine(device=TorchDevice(), slots=1)
    engine.submit(render(8, 10_000_000), model)
    engine.start()
    late = engine.submit(render(8, 1), model, deadline=0.0)

    with pytest.raises(DeadlineExceeded):
        late.result(5)
    engine.stop()


def test_shared_batches_of_one_do_not_starve_the_others() -> None:
    model, engine = CountingModel(fits=1), Engine(device=TorchDevice(), policy="share")
    engine.submit(render(8, 10_000_000), model, urgent=True)
    engine.submit(render(8, 10_000_000), model, urgent=True)
    patient = engine.submit(render(8, 20), model)
    engine.start()

    assert value(patient) == 8 / 2**20
    engine.stop()


def test_memory_of_a_batch_that_did_not_fit_is_let_go_before_its_halves_run() -> None:
    held: list[weakref.ref[Tensor]] = []

    class Greedy(CountingModel):
        def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
            assert all(reference() is None for reference in held), "a failed batch still holds its memory"
            activations = torch.zeros(1000)
            if len(batch) > 2:
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("too many")
            return super().denoise(batch)

    engine = Engine(device=TorchDevice())
    futures = [engine.submit(render(8, 1), Greedy()) for _ in range(1)]
    model = Greedy()
    futures += [engine.submit(render(8, 1), model) for _ in range(4)]
    engine.start()

    assert [value(future) for future in futures] == [4.0] * 5
    engine.stop()
    assert held


def test_end_of_the_engine_is_told_to_everyone() -> None:
    told: list[BaseException] = []

    class Broken(Capacity):
        def fitting(self, model: str, operations: Sequence[Operation]) -> int:
            raise ValueError("a bug")

    engine = Engine(device=TorchDevice(), capacity=Broken(), on_fatal=told.append)
    future = engine.submit(render(8, 1), CountingModel())
    threading.excepthook, before = (lambda _: None), threading.excepthook
    engine.start()

    with pytest.raises(RenderError, match="the engine ended"):
        future.result(5)
    engine.stop()
    threading.excepthook = before
    assert [str(error) for error in told] == ["a bug"]
