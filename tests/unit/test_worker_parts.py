import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from latentfarm_worker.counts import Counts
from latentfarm_worker.png import encode_png
from latentfarm_worker.room import Room
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.shelf import Shelf
from latentfarm_worker.vitals import STALL_LIMIT_S, StallWatch, Vitals
from PIL import Image


@pytest.mark.parametrize("text", ["plain, words", "中文 提示, 猫\nNegative prompt: 丑"])
def test_png_carries_its_parameters(text: str) -> None:
    pixels = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8)

    image = Image.open(io.BytesIO(encode_png(pixels.numpy(), text)))

    assert image.info["parameters"] == text
    assert torch.equal(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(16, 24, 3), pixels)


def test_vitals_are_read_as_written(tmp_path: Path) -> None:
    reader = Vitals(tmp_path / "vitals", create=True)
    writer = Vitals(tmp_path / "vitals")
    writer.beat("loading")
    writer.note(8, Counts(1, 3))
    writer.advertise(["a" * 64, "b" * 64], ["batch:" + "a" * 64])
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


def test_room_lets_in_what_fits_and_one_picture_however_large() -> None:
    room = Room(100)
    order: list[str] = []

    def take() -> None:
        room.take(60)
        order.append("second")

    room.take(1000)
    waiting = threading.Thread(target=take)
    waiting.start()
    order.append("first")
    room.give(1000)
    waiting.join(5)

    assert order == ["first", "second"]


class Weight:
    def __init__(self, size: int) -> None:
        self.bytes = size


def test_shelf_gives_up_the_least_recently_used_that_nobody_uses() -> None:
    shelf = Shelf(budget_bytes=25)
    loaded: list[str] = []

    def loading(name: str) -> Callable[[], Weight]:
        def load() -> Weight:
            loaded.append(name)
            return Weight(10)

        return load

    with shelf.using("a", loading("a")):
        for name in ("b", "c", "b"):
            with shelf.using(name, loading(name)):
                pass
        assert "a" in shelf

    assert loaded == ["a", "b", "c", "b"]
    assert shelf.loads == 4


def test_strict_runtime_fills_calls_up_to_one_size() -> None:
    runtime = Runtime(fixed_size=4)

    assert list(runtime.fixed([1, 2, 3, 4, 5])) == [[1, 2, 3, 4], [5, 5, 5, 5]]
    assert list(Runtime().fixed([1, 2, 3])) == [[1, 2, 3]]
