"""What is shown of jobs: grids, galleries, thumbnails, tables that move."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from latentfarm.cli.thumbnails import Way, show_thumbnails, thumbnail, way_of
from latentfarm.cli.watching import Pace, clock, table_of
from latentfarm.pictures import is_saved, remove_parts
from latentfarm.testing import MemoryFarm
from latentfarm_shared.errors import InvalidField, RenderError
from latentfarm_shared.specs import ImageSpec, JobSpec
from PIL import Image
from rich.console import Console


def painted(image: ImageSpec) -> bytes:
    """Return a picture whose colour says seed (red) and CFG scale (green)."""
    if image.seed == 3:
        raise RenderError("its seed is three")
    file = io.BytesIO()
    Image.new("RGB", (64, 32), (40 * image.seed, int(10 * image.job.cfg_scale), 0)).save(file, "PNG")
    return file.getvalue()


SWEEP = {
    "prompt": "a girl",
    "axes": [{"field": "cfg_scale", "values": [4, 7]}, {"field": "seed", "values": [1, 2, 3]}],
}


def test_grid_has_each_picture_where_its_values_are() -> None:
    farm = MemoryFarm(draws=painted)
    job = farm.submit(JobSpec.check(SWEEP))
    sheet = job.compare("seed", "cfg")
    first_row, second_row = 60 + 96, 60 + 96 + 214

    def at(column: int, height: int) -> tuple[int, ...]:
        left = sheet.width - 12 - 3 * 196 + column * 196
        return sheet.getpixel((left + 96, height))  # type: ignore[return-value]

    assert at(0, first_row) == (40, 40, 0)
    assert at(1, first_row) == (80, 40, 0)
    assert at(0, second_row) == (40, 70, 0)
    assert at(2, first_row) == (250, 250, 248), "failed images leave their place free"


def test_grid_of_one_row_tells_how_many_share_a_place_and_refuses_what_is_not_there() -> None:
    job = MemoryFarm(draws=painted).submit(JobSpec.check(SWEEP))

    assert job.compare("cfg_scale").size[1] < 300
    assert job.compare("embedding").size[0] < 500
    with pytest.raises(InvalidField, match="did you mean sampler"):
        job.compare("samplre")
    with pytest.raises(InvalidField, match="y: the images have no 'strength:x'"):
        job.compare("seed", "strength:x")
    many = MemoryFarm(draws=painted).submit(JobSpec.check({"prompt": "a", "count": 2600, "seed": 4}))
    with pytest.raises(InvalidField, match="over 2500 cells"):
        many.compare("seed")


class Tty(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "way"),
    [
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
    ],
)
def test_terminal_tells_how_it_shows_pictures(environ: dict[str, str], way: Way | None) -> None:
    assert way_of(Tty(), environ) == way
    assert way_of(io.StringIO(), environ) is None


def picture() -> bytes:
    file = io.BytesIO()
    noise = Image.effect_noise((256, 256), 90).convert("RGB")
    noise.paste((255, 0, 0), (0, 0, 256, 128))
    noise.save(file, "PNG")
    return file.getvalue()


def test_thumbnails_are_what_terminals_read() -> None:
    kitty = thumbnail(picture(), "kitty")
    parts = [part.removeprefix("\x1b_G").split(";", 1) for part in kitty.strip().split("\x1b\\") if part]
    sent = base64.b64decode("".join(data for _, data in parts))
    assert Image.open(io.BytesIO(sent)).size == (256, 256)
    assert all(len(data) <= 4096 for _, data in parts)
    assert [head[-3:] for head, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]

    iterm = thumbnail(picture(), "iterm")
    assert iterm.startswith("\x1b]1337;File=inline=1")
    assert Image.open(io.BytesIO(base64.b64decode(iterm.partition(":")[2].partition("\x07")[0]))).width == 256

    blocks = thumbnail(picture(), "blocks")
    assert blocks.count("\n") == 16
    assert "38;2;255;0;0;48;2;255;0;0m▀" in blocks.splitlines()[2]


def test_nothing_is_written_where_pictures_are_not_shown() -> None:
    plain = io.StringIO()
    show_thumbnails([picture()], plain)
    assert plain.getvalue() == ""


def test_table_tells_pace_and_what_is_left() -> None:
    farm = MemoryFarm()
    farm.memory.is_held = True
    status = farm.generate("a [bold]girl", count=30).status()
    pace = Pace()
    for second in range(11):
        pace.note(2 * second, float(second))
    console = Console(width=160, file=io.StringIO())
    console.print(table_of([status], {status.id: pace}))
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert pace.per_second == 2
    assert clock(3725) == "1:02:05"
    assert "0:00:15" in text
    assert "0/30" in text
    assert "a [bold]girl" in text


def test_orders_that_change_nothing_are_told_of_by_nobody() -> None:
    job = MemoryFarm().generate("a girl")
    version = job.wait().version
    job.cancel()
    job.pause()
    assert job.status().version == version


def test_saved_pictures_are_known_by_what_decides_them(tmp_path: Path) -> None:
    farm = MemoryFarm(embeddings=["corneo_dva"])
    one, other = farm.generate("corneo_dva", seed=1), farm.generate("a dog", seed=1)
    (path,) = one.download(tmp_path)
    mine = one.images[0].parameters

    assert is_saved(path, mine)
    assert is_saved(path, mine.replace("latentfarm 0.", "latentfarm 9."))
    assert not is_saved(path, other.images[0].parameters)
    assert not is_saved(path, mine.replace("Steps: 20", "Steps: 21"))
    assert not is_saved(tmp_path / "none.png", mine)


def test_only_old_parts_of_downloads_are_removed(tmp_path: Path) -> None:
    names = (".00000-1.png.77-88.part", ".movie.iso.part", "x.part", ".00001-1.png.77-88.part")
    for name in names:
        (tmp_path / name).write_bytes(b"x")
        if name != names[-1]:
            os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".folder.part").mkdir()
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".movie.iso.part", "x.part", names[-1], ".folder.part"}


def test_held_jobs_wait_and_are_drawn_when_told() -> None:
    farm = MemoryFarm(embeddings=["corneo_dva"], draws=painted)
    farm.memory.is_held = True
    job = farm.generate("corneo_dva", count=3, seed=1)
    assert job.status().state == "queued"
    farm.memory.draw()
    status = job.wait()

    assert status.counts["failed"] == 1
    assert job.images[2].error == {"code": "RENDER_FAILED", "message": "its seed is three", "worker": "memory"}
    assert b"its seed is three" in job.manifest("failed")
