"""Which images a sweep stands for, and in which order they are handed out."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentfarm_shared.specs import JobSpec, expand
from latentfarm_shared.sweeps.axes import Axis
from latentfarm_shared.sweeps.dynamic import parse, texts
from latentfarm_shared.sweeps.orders import OrderName, order_of
from latentfarm_shared.sweeps.points import Column, Grid

NAMES: tuple[OrderName, ...] = ("sequential", "random", "corners-first", "spread")
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(st.sampled_from(NAMES), SHAPES, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_every_order_hands_out_every_image_once_and_knows_where(name: OrderName, shape: list[int], seed: int) -> None:
    order, total = order_of(name, shape, seed), math.prod(shape)
    handed = [order.at(position) for position in range(total)]

    assert sorted(handed) == list(range(total))
    assert [order.of(index) for index in handed] == list(range(total))


def test_spread_shows_the_whole_grid_in_its_first_hundredth() -> None:
    shape = (20, 20, 25)
    order = order_of("spread", shape)
    first = [order.at(position) for position in range(math.prod(shape) // 100)]
    places = [(i // 500, i // 25 % 20, i % 25) for i in first]

    for side in range(3):
        assert len({place[side] for place in places}) == shape[side]
    for a, b in itertools.combinations(range(3), 2):
        quarters = {(4 * p[a] // shape[a], 4 * p[b] // shape[b]) for p in places}
        assert len(quarters) == 16


def test_corners_come_first_then_the_middles() -> None:
    order = order_of("corners-first", (5, 5))
    places = [divmod(order.at(position), 5) for position in range(25)]

    assert set(places[:4]) == {(0, 0), (0, 4), (4, 0), (4, 4)}
    assert set(places[:9]) == set(itertools.product((0, 2, 4), repeat=2))


def test_random_orders_differ_by_their_seed() -> None:
    orders = [[order_of("random", (1000,), seed).at(i) for i in range(20)] for seed in (1, 2)]

    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def grid(*sides: int, exclude: tuple[dict[str, int], ...] = (), include: tuple[dict[str, int], ...] = ()) -> Grid:
    columns = tuple(Column((Axis(field=f"f{n}", values=tuple(range(side))),)) for n, side in enumerate(sides))
    return Grid(columns, tuple(map(dict, exclude)), tuple(map(dict, include)))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=150, deadline=None)
def test_points_are_the_combinations_less_the_excluded(sides: list[int], data: st.DataObject) -> None:
    point = st.fixed_dictionaries({}, optional={f"f{n}": st.integers(0, s - 1) for n, s in enumerate(sides)})
    exclude = tuple(data.draw(st.lists(point.filter(bool), max_size=4)))
    found = grid(*sides, exclude=exclude, include=({"f0": 99},))
    wanted = [
        dict(zip((f"f{n}" for n in range(len(sides))), values, strict=True))
        for values in itertools.product(*map(range, sides))
    ]
    wanted = [p for p in wanted if not any(e.items() <= p.items() for e in exclude)]

    assert [found.at(number) for number in range(found.total)] == [*wanted, {"f0": 99}]


def test_million_points_are_found_without_being_listed() -> None:
    axes = [
        {"field": "seed", "values": {"first": 1, "last": 100_000}},
        {"field": "cfg_scale", "values": [3, 5, 7, 9, 11, 13]},
    ]
    spec = JobSpec.check(
        {"prompt": "a", "axes": axes, "exclude": [{"cfg_scale": 9}], "order": "random", "dynamic_seed": 3}
    )

    assert spec.total == 500_000
    source = random.Random(0)
    for _ in range(50):
        position = source.randrange(spec.total)
        index = spec.layout.index_at(position)
        assert spec.layout.position_of(index) == position
        assert expand(spec, index).point["cfg_scale"] != 9
    assert len(spec.encode()) < 2500


def test_zipped_axes_advance_together_and_multiply_with_the_rest() -> None:
    spec = JobSpec.check(
        {
            "prompt": "a", "seed": 7, "count": 2, "axes": [{"field": "steps", "values": [10, 20]}],
            "zipped": [{"field": "sampler", "values": ["Euler", "DDIM"]}, {"field": "cfg_scale", "values": [3, 7]}],
            "include": [{"steps": 50}],
        }
    )  # fmt: skip
    points = [expand(spec, index) for index in range(spec.total)]

    assert spec.total == 10
    assert [(p.job.steps, p.job.sampler, p.job.cfg_scale, p.seed) for p in points[:5]] == [
        (10, "Euler", 3, 7), (10, "Euler", 3, 8), (10, "DDIM", 7, 7), (10, "DDIM", 7, 8), (20, "Euler", 3, 7),
    ]  # fmt: skip
    assert points[8].job.steps == 50


def no_wildcards(name: str) -> list[str]:
    raise KeyError(name)


def words(template: str, **wildcards: list[str]) -> list[str]:
    node = parse(template, wildcards.__getitem__)
    return [node.at(number) for number in range(node.count)]


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("a cat", ["a cat"]),
        ("a {red|blue} cat", ["a red cat", "a blue cat"]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{0-1$$ and $$a|b}", ["", "a", "b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b"]),
        ("{0.5::a|b}", ["a", "b"]),
        ("__animal__ {x|y}", ["cat x", "cat y", "dog x", "dog y"]),
        (r"\{a|b\}", ["{a|b}"]),
        ("(a:1.2), [b:c:0.5], 中文 {黑|白}", ["(a:1.2), [b:c:0.5], 中文 黑", "(a:1.2), [b:c:0.5], 中文 白"]),
    ],
)
def test_template_makes_its_texts(template: str, made: list[str]) -> None:
    assert words(template, animal=["cat", "dog"]) == made


def test_random_texts_are_the_images_own_and_follow_the_weights() -> None:
    spec = JobSpec.check(
        {"prompt": "{9::red|1::blue} cat", "seed": 1, "count": 2000, "dynamic": "random", "dynamic_seed": 5}
    )
    drawn = [expand(spec, index).job.prompt for index in range(2000)]

    assert drawn == [expand(spec, index).job.prompt for index in range(2000)]
    assert 0.87 < drawn.count("red cat") / 2000 < 0.93


def test_all_texts_are_images_of_their_own() -> None:
    spec = JobSpec.check(
        {"prompt": "{a|b} {c|d|e}", "negative_prompt": "{x|y}", "dynamic": "all", "variants": 12, "seed": 1}
    )
    made = {(expand(spec, i).job.prompt, expand(spec, i).job.negative_prompt) for i in range(spec.total)}

    assert len(made) == spec.total == 12


def test_long_templates_are_shown_by_every_option_once() -> None:
    node = parse(" ".join(f"{{a{n}|b{n}|c{n}}}" for n in range(20)), no_wildcards)
    shown = " ".join(texts(node, 1000)).split()

    assert node.count == 3**20
    assert {f"{letter}{n}" for letter in "abc" for n in range(20)} == set(shown)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"axes": [{"field": "step", "values": [1]}]}, "did you mean steps"),
        ({"zipped": [{"field": "steps", "values": [1, 2]}, {"field": "seed", "values": [1]}]}, "one length"),
        ({"axes": [{"field": "steps", "values": [1, 2]}], "exclude": [{"steps": 3}]}, "never is 3"),
        ({"axes": [{"field": "steps", "values": [1, 2]}], "exclude": [{"steps": 1}, {"steps": 2}]}, "0 images"),
        ({"axes": [{"field": "steps", "values": [1]}], "include": [{"model": "x"}]}, "include cannot set"),
        (
            {"order": "corners-first", "axes": [{"field": "steps", "values": [1, 2]}], "exclude": [{"steps": 1}]},
            "full grid",
        ),
        ({"dynamic": "all", "axes": [{"field": "prompt", "values": ["a", "b"]}]}, "neither axes nor rows"),
    ],
)
def test_sweep_that_cannot_be_is_refused(values: dict[str, object], says: str) -> None:
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    with pytest.raises(InvalidField, match=says):
        JobSpec.check({"prompt": "a", "seed": 1} | values)
