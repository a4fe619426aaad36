"""Sweeps over axes: image `i` is a pure function of (spec, i), and labels say where each image lies."""

import pytest
from latentfarm.contact_sheet import axis_sheet
from latentfarm.library import parse_strengths
from latentfarm_shared.embeddings.arithmetic import parse_formula
from latentfarm_shared.errors import EmbeddingRefused, InvalidField, UnknownName
from latentfarm_shared.images import content_id
from latentfarm_shared.parameters import EmbeddingUse
from latentfarm_shared.prompts.contract import Contract, combination_misses, settle
from latentfarm_shared.prompts.mentions import applied_embeddings
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JobSpec, drawn_seeds, expand
from latentfarm_shared.sweeps.axes import Axis
from latentfarm_worker.prompts import PromptLayout

from tests.conftest import checkpoint, embedding

NAMES = ("corneo_dva", "bad-artist", "bad-artist-anime", "style-1", "style-2")
KNOWN = {name: embedding(name) for name in NAMES}


def swept(*axes: tuple[str, tuple[float | str, ...]], **values: object) -> JobSpec:
    given = {"prompt": "a girl", "seed": 5, "axes": [{"field": field, "values": some} for field, some in axes]}
    return JobSpec.check(given | values)


def test_axes_multiply_and_the_last_counts_fastest() -> None:
    spec = swept(("cfg_scale", (3, 7)), ("steps", (10, 20, 30)), count=2)

    images = [expand(spec, index) for index in range(spec.total)]

    assert spec.total == 12
    assert [(i.job.cfg_scale, i.job.steps, i.seed) for i in images[:7]] == [
        (3, 10, 5), (3, 10, 6), (3, 20, 5), (3, 20, 6), (3, 30, 5), (3, 30, 6), (7, 10, 5),
    ]  # fmt: skip
    assert images[6].point == {"cfg_scale": 7, "steps": 10}
    assert [image.index for image in images] == list(range(12))
    with pytest.raises(IndexError):
        expand(spec, 12)


def test_image_of_a_sweep_is_the_image_of_a_plain_job() -> None:
    lock = Lock(checkpoint=checkpoint())
    spec = swept(("sampler", ("Euler", "DPM++ 2M Karras")), ("seed", (1, 9)))
    plain = JobSpec.check({"prompt": "a girl", "sampler": "DPM++ 2M", "schedule": "Karras", "seed": 9})

    assert content_id(expand(spec, 3), lock) == content_id(expand(plain, 0), lock)


def test_strength_weighs_the_name_and_one_leaves_it_alone() -> None:
    spec = swept(("strength:corneo_dva", (0.5, 1, 1.5)), prompt="masterpiece, Corneo_dva, a corneo_dvax")

    assert [expand(spec, i).job.prompt for i in range(3)] == [
        "masterpiece, (Corneo_dva:0.5), a corneo_dvax",
        "masterpiece, Corneo_dva, a corneo_dvax",
        "masterpiece, (Corneo_dva:1.5), a corneo_dvax",
    ]


def test_text_is_replaced_in_every_prompt() -> None:
    spec = swept(("replace:red", ("red", "blue")), prompt="red hat", negative_prompt="red nose")

    assert [(i.job.prompt, i.job.negative_prompt) for i in (expand(spec, 0), expand(spec, 1))] == [
        ("red hat", "red nose"),
        ("blue hat", "blue nose"),
    ]


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ((("steps", (10, 900)),), "steps"),
        ((("nonsense", (1,)),), "no axis"),
        ((("count", (1,)),), "no axis"),
        ((("replace:purple", ("a",)),), "none of the prompts"),
        ((("steps", (1,)), ("steps", (2,))), "twice"),
        ((("strength:x-1", ("big",)),), "number"),
        ((("sampler", ("Oiler",)),), "Oiler"),
        ((("seed", tuple(range(1001))), ("steps", tuple(range(1, 151))), ("cfg_scale", tuple(range(1, 30)))), "images"),
    ],
)
def test_axis_that_makes_no_job_is_refused(axes: tuple[tuple[str, tuple[float | str, ...]], ...], says: str) -> None:
    with pytest.raises((InvalidField, UnknownName), match=says):
        swept(*axes)


def test_every_point_is_checked_and_pinned(demo_tokenizer: ClipTokenizer) -> None:
    spec = swept(("prompt", ("a <corneo_dva>", "b, bad-artist-anime", "c")), ("strength:style-1", (0.5, 1)))
    spec = spec.model_copy(update={"embeddings": (EmbeddingUse(name="style-1"),)})

    settled = settle(spec, checkpoint(), KNOWN, demo_tokenizer)

    assert {e.name for e in settled.embeddings} == {"corneo_dva", "bad-artist-anime", "style-1"}
    lock = Lock(checkpoint=checkpoint(), embeddings=settled.embeddings)
    images = [expand(settled.spec, i) for i in range(6)]
    where = [{a.record.name for a in applied_embeddings(image, lock, demo_tokenizer)} for image in images]
    assert where == [{"corneo_dva", "style-1"}] * 2 + [{"bad-artist-anime", "style-1"}] * 2 + [{"style-1"}] * 2
    with pytest.raises(UnknownName, match="style-1"):
        settle(swept(("replace:girl", ("girl", "stile-1"))), checkpoint(), KNOWN, demo_tokenizer)


def test_large_sweep_is_checked_by_value_and_its_combinations_when_claimed(demo_tokenizer: ClipTokenizer) -> None:
    spec = swept(
        ("replace:LEFT", ("bad", *(f"left {n}" for n in range(120)))),
        ("replace:RIGHT", ("artist", *(f"right {n}" for n in range(120)))),
        prompt="LEFT-RIGHT, corneo_dva",
    )
    assert spec.text_variants > 10_000
    contract = Contract(checkpoint(), KNOWN, demo_tokenizer)

    settled = contract.settle(spec)
    lock = Lock(checkpoint=checkpoint(), embeddings=settled.embeddings)

    # every value stands once beside the others' first, so `bad-artist` was seen; without it, it is missed when claimed
    assert {e.name for e in settled.embeddings} == {"corneo_dva", "bad-artist"}
    bare = lock.model_copy(update={"embeddings": tuple(e for e in lock.embeddings if e.name != "bad-artist")})
    assert combination_misses(expand(settled.spec, 0), bare, contract) == ["bad-artist"]
    assert combination_misses(expand(settled.spec, 1), bare, contract) == []
    assert combination_misses(expand(settled.spec, 0), lock, contract) == []


# ---- doing without


@pytest.mark.parametrize(
    ("prompt", "uses", "mode", "expected"),
    [
        ("a girl, <nothing-1>, smile", (), "warn", "a girl, nothing-1, smile"),
        ("a girl, <nothing-1>, smile", (), "drop", "a girl, smile"),
        ("a girl, (corneo_dxa:1.2), smile", (), "drop", "a girl, smile"),
        ("a girl, corneo_dxa", (), "warn", "a girl, corneo_dxa"),
        ("old-1, a girl", (), "drop", "a girl"),
        ("a girl", ("nothing-1",), "drop", "a girl"),
        ("a girl, corneo_dva, wide-1", (), "drop", "a girl, corneo_dva"),
    ],
)
def test_job_may_do_without_what_is_missing(
    demo_tokenizer: ClipTokenizer, prompt: str, uses: tuple[str, ...], mode: str, expected: str
) -> None:
    off = embedding("old-1").model_copy(update={"state": "removed"})
    known = KNOWN | {"old-1": off, "wide-1": embedding("wide-1", 2, 768)}
    spec = JobSpec.check({"prompt": prompt, "embeddings": [{"name": n} for n in uses], "on_missing": mode})

    settled = settle(spec, checkpoint(), known, demo_tokenizer)

    assert settled.spec.prompt == expected
    assert len(settled.dropped) == 1
    assert settled.dropped[0].field == "prompt"
    with pytest.raises((UnknownName, EmbeddingRefused)):
        settle(spec.model_copy(update={"on_missing": "fail"}), checkpoint(), known, demo_tokenizer)


def settled_prompt(tokenizer: ClipTokenizer, **values: object) -> JobSpec:
    known = KNOWN | {"art": embedding("art"), "dva": embedding("dva"), "a(b)-1": embedding("a(b)-1")}
    return settle(JobSpec.check(values), checkpoint(), known, tokenizer).spec


def test_only_what_was_asked_for_is_dropped(demo_tokenizer: ClipTokenizer) -> None:
    given = {"prompt": "a garden, <nothing>, smart party", "negative_prompt": "bad nothing", "on_missing": "drop"}

    spec = settled_prompt(demo_tokenizer, **given)

    assert (spec.prompt, spec.negative_prompt) == ("a garden, smart party", "bad nothing")
    other = settled_prompt(demo_tokenizer, prompt="corneo_dva, <dv>", on_missing="drop")
    assert other.prompt == "corneo_dva"


def test_explicit_requests_of_a_sweep_are_resolved_point_by_point(demo_tokenizer: ClipTokenizer) -> None:
    axes = [{"field": "replace:STYLE", "values": ["style-1", "style-2"]}]
    swept = settle(JobSpec.check({"prompt": "portrait, <STYLE>", "axes": axes}), checkpoint(), KNOWN, demo_tokenizer)

    assert {e.name for e in swept.embeddings} == {"style-1", "style-2"}
    assert [expand(swept.spec, i).job.prompt for i in range(2)] == ["portrait, style-1", "portrait, style-2"]

    axes = [{"field": "replace:<style-1>", "values": ["<style-1>", "", "(<style-2>:0.5)"]}]
    swept = settle(JobSpec.check({"prompt": "a <style-1> b", "axes": axes}), checkpoint(), KNOWN, demo_tokenizer)
    prompts = [expand(swept.spec, i).job.prompt for i in range(3)]
    assert prompts == ["a style-1 b", "a  b", "a (style-2:0.5) b"]

    with pytest.raises((EmbeddingRefused, UnknownName, InvalidField)):
        settled_prompt(
            demo_tokenizer, prompt="a girl", embeddings=[{"name": "corneo_dva"}],
            axes=[{"field": "prompt", "values": ["a girl"]}, {"field": "replace:corneo", "values": ["fine"]}],
        )  # fmt: skip


def test_image_of_a_sweep_promises_what_its_own_prompt_means(demo_tokenizer: ClipTokenizer) -> None:
    known = {"dva": embedding("dva")}
    axes = [{"field": "prompt", "values": ["dva, a girl", "advance, a girl"]}]
    settled = settle(JobSpec.check({"prompt": "", "axes": axes}), checkpoint(), known, demo_tokenizer)
    lock = Lock(checkpoint=checkpoint(), embeddings=settled.embeddings)

    found = [applied_embeddings(expand(settled.spec, i), lock, demo_tokenizer) for i in range(2)]
    laid = [PromptLayout(expand(settled.spec, i).job, lock, demo_tokenizer).first_pass() for i in range(2)]

    placed = [[p for part in x.positive for text in part.texts for c in text for p in c.placements] for x in laid]
    assert [bool(some) for some in found] == [bool(some) for some in placed]


def test_strength_finds_the_name_as_prompts_write_it(demo_tokenizer: ClipTokenizer) -> None:
    axes = [{"field": "strength:a(b)-1", "values": [0.5, 0.00001]}]
    spec = settled_prompt(demo_tokenizer, prompt="x", embeddings=[{"name": "a(b)-1"}], axes=axes)
    assert [expand(spec, i).job.prompt for i in range(2)] == ["x, (a\\(b\\)-1:0.5)", "x, (a\\(b\\)-1:0)"]

    axes = [{"field": "strength:bad-artist", "values": [0.5]}]
    spec = settled_prompt(demo_tokenizer, prompt="bad-artist-anime, bad-artist", axes=axes)
    assert expand(spec, 0).job.prompt == "bad-artist-anime, (bad-artist:0.5)"
    with pytest.raises(InvalidField, match="none of the prompts"):
        settled_prompt(demo_tokenizer, prompt="a girl", axes=axes)


def test_axes_that_decide_what_is_reached_are_checked(demo_tokenizer: ClipTokenizer) -> None:
    axes = [{"field": "steps", "values": [10, 20]}]
    spec = JobSpec.check({"prompt": "[a cat:style-2:15]", "steps": 10, "axes": axes})
    assert [e.name for e in settle(spec, checkpoint(), KNOWN, demo_tokenizer).embeddings] == ["style-2"]
    few = checkpoint().model_copy(update={"layers": 2})
    with pytest.raises(InvalidField, match="clip_skip"):
        settle(swept(("clip_skip", (1, 5))), few, KNOWN, demo_tokenizer)


def test_open_seeds_are_drawn_in_axes_too() -> None:
    draws = iter(range(100, 200))
    fields = drawn_seeds(swept(("seed", (-1, 2, -1)), ("variation_strength", (0, 0.3))), lambda _: next(draws))
    spec = JobSpec.check({"prompt": "x"} | fields)

    assert spec.axes[0].values == (101, 2, 102)
    assert spec.variation_seed == 100


def test_numbers_are_put_into_prompts_as_they_are_written() -> None:
    spec = swept(("replace:N", (1, 2.5)), prompt="N cats")

    assert [expand(spec, i).job.prompt for i in range(2)] == ["1 cats", "2.5 cats"]


def test_wrong_family_says_where_it_fits_and_what_would(demo_tokenizer: ClipTokenizer) -> None:
    known = KNOWN | {"style-3": embedding("style-3", 2, 768)}
    others = (checkpoint("sd15", 768), checkpoint())

    with pytest.raises(EmbeddingRefused, match=r"clip_l 768 \(sd1\).*takes clip_l 128.*fits 'sd15'.*'style-2'"):
        settle(JobSpec(prompt="a girl, style-3"), checkpoint(), known, demo_tokenizer, others)


def test_word_of_the_vocabulary_is_a_word_unless_allowed(demo_tokenizer: ClipTokenizer) -> None:
    plain = embedding("girl")
    allowed = plain.model_copy(update={"allow_word": True})
    removed = allowed.model_copy(update={"state": "removed"})

    def used(record: object, prompt: str) -> list[str]:
        settled = settle(JobSpec(prompt=prompt), checkpoint(), {"girl": record}, demo_tokenizer)  # type: ignore[dict-item]
        return [e.name for e in settled.embeddings]

    assert used(plain, "a girl") == []
    assert used(allowed, "a girl") == ["girl"]
    assert used(removed, "a girl") == []
    with pytest.raises(EmbeddingRefused, match="word of the model's vocabulary"):
        used(plain, "a <girl>")


def test_one_job_takes_one_version_of_a_name(demo_tokenizer: ClipTokenizer) -> None:
    old = embedding("style-1").model_copy(update={"content_id": "older"})
    contract = Contract(checkpoint(), KNOWN, demo_tokenizer, lookup=lambda _: old)

    assert contract.settle(JobSpec(prompt="<style-1@12345678>")).embeddings == (old,)
    with pytest.raises(EmbeddingRefused, match="two versions"):
        contract.settle(JobSpec(prompt="<style-1@12345678>, <style-1>"))


# ---- small readers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1.5:0.25", (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)),
        ("0,1, 2", (0, 1, 2)),
        ("-1:0:0.5", (-1, -0.5, 0)),
        ("1", (1,)),
    ],
)
def test_strengths_are_read(text: str, expected: tuple[float, ...]) -> None:
    assert parse_strengths(text) == expected


@pytest.mark.parametrize("text", ["", "1:0:1", "0:1:0", "a", "0:1000:0.001"])
def test_strengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="FROM:TO:STEP"):
        parse_strengths(text)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a + 0.5*b - c", [(1, "a"), (0.5, "b"), (-1, "c")]),
        ("bad-hands-5 - 2 * corneo_dva", [(1, "bad-hands-5"), (-2, "corneo_dva")]),
        ("'gasai yuno-15200'*0.5+a", [(0.5, "gasai yuno-15200"), (1, "a")]),
        ("-a", [(-1, "a")]),
        ("gasai yuno-15200 + a", [(1, "gasai yuno-15200"), (1, "a")]),
        ("猫 + .5*a", [(1, "猫"), (0.5, "a")]),
    ],
)
def test_formula_is_read(formula: str, expected: list[tuple[float, str]]) -> None:
    assert parse_formula(formula) == expected


@pytest.mark.parametrize("formula", ["", "+", "a +", "a b*", "0.5*", "a * b", "2*a*3"])
def test_formula_that_makes_no_sense_is_refused(formula: str) -> None:
    with pytest.raises(InvalidField, match="formula"):
        parse_formula(formula)


def test_sheet_has_a_column_for_each_value_of_the_first_axis() -> None:
    spec = swept(("strength:x-1", (0.5, 1, 1.5)), ("seed", (1, 2)), prompt="x-1")

    sheet = axis_sheet(spec, {})

    assert sheet.width > 3 * 160
    assert 2 * 160 < sheet.height < 3 * 160
    assert Axis(field="seed", values=(1,)).kind == ""
