import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from latentfarm_shared.a1111 import spec_from_request
from latentfarm_shared.errors import InvalidField, UnknownName
from latentfarm_shared.infotext import format_infotext, read_infotext, spec_values
from latentfarm_shared.names import effective_schedule
from latentfarm_shared.parameters import EmbeddingUse, HiresFix
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import MAX_SEED, JobSpec, expand

from tests.conftest import checkpoint


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"steps": 10_000}, "steps"),
        ({"steps": 0}, "steps"),
        ({"width": 100}, "width"),
        ({"height": 4096}, "height"),
        ({"seed": 2**32}, "seed"),
        ({"seed": -2}, "seed"),
        ({"seed": MAX_SEED, "count": 2}, "spec"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"count": 10**9}, "count"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"promt": "typo"}, "promt"),
        ({"lane": "fast"}, "lane"),
        ({"clip_skip": 0}, "clip_skip"),
    ],
)
def test_bad_value_is_refused_by_its_field(values: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidField) as caught:
        JobSpec.check({"prompt": "a", **values})

    assert caught.value.field == named
    assert caught.value.exit_code == 2


def test_unknown_sampler_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Euler"):
        JobSpec.check({"prompt": "a", "sampler": "Eular"})


def test_legacy_sampler_name_brings_its_schedule() -> None:
    spec = JobSpec.check({"prompt": "a", "sampler": "dpm++ 2m karras"})

    assert (spec.sampler, spec.schedule) == ("DPM++ 2M", "Karras")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50), st.integers(0, 1000))
def test_spec_survives_the_wire(prompt: str, seed: int) -> None:
    spec = JobSpec.check({"prompt": prompt, "seed": seed, "count": 3})

    assert JobSpec.decode(spec.encode()) == spec


def test_image_follows_from_spec_and_index_alone() -> None:
    spec = JobSpec(prompt="猫", seed=43, count=4)

    assert [expand(spec, i).seed for i in range(4)] == [43, 44, 45, 46]
    with pytest.raises(IndexError):
        expand(spec, 4)


@pytest.mark.parametrize(
    ("text", "side"), [("a-b", None), ("a-b:neg", "negative"), ("gasai yuno-15200:pos", "positive")]
)
def test_embedding_use_reads_its_side(text: str, side: str | None) -> None:
    assert EmbeddingUse.parse(text).side == side


@pytest.mark.parametrize("text", ["name:left", "", ":neg", " ", "x" * 201])
def test_embedding_use_refuses_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidField):
        EmbeddingUse.parse(text)


def described(**values: object) -> tuple[JobSpec, JobSpec]:
    """Return a spec, and the one read back from the text of its picture."""
    spec = JobSpec.check({"prompt": "a cat", "seed": 5} | values)
    text = format_infotext(expand(spec, 0), Lock(checkpoint=checkpoint()))
    return spec, JobSpec.check(spec_values(read_infotext(text)))


PICTURES: list[dict[str, object]] = [
    {},
    {"prompt": "中文, a:b", "negative_prompt": "one\ntwo", "rng": "NV", "clip_skip": 2, "cfg_scale": 6.5},
    {"prompt": "a\nNegative prompt: inside", "negative_prompt": "b\nSteps: 3, Sampler: x, Seed: 1"},
    {"prompt": "  spaces  ", "negative_prompt": "\ttab"},
    {"prompt": '"quoted", (x:1.2)', "emphasis": "No norm", "tiling": True, "width": 64, "height": 256},
    {"variation_seed": 7, "variation_strength": 0.25, "seed_resize": (64, 128)},
    {"sampler": "Euler a", "ensd": 31337, "options": {"eta": 0.5, "s_churn": 1.5, "discard_penultimate": True}},
    {"sampler": "DPM++ 2M SDE Karras", "options": {"pad_conds": "v0", "zero_terminal_snr": True, "cfg_rescale": 0.7}},
    {"sampler": "UniPC", "options": {"uni_pc_variant": "bh2", "uni_pc_lower_order_final": False, "ngms": 2.5}},
    {"hires": {"scale": 1.5, "upscaler": "4x-UltraSharp", "steps": 9, "denoising_strength": 0.4}},
    {"hires": {"width": 256, "height": 192, "sampler": "DDIM", "prompt": "a, b: c\n中", "negative_prompt": "x"}},
    {"compat": ("old_prompt_timelines", "break_as_word")},
]


@pytest.mark.parametrize("values", PICTURES)
def test_picture_says_all_that_made_it(values: dict[str, object]) -> None:
    spec, read = described(**values)

    resolved = read.model_copy(update={"schedule": spec.schedule, "hires": spec.hires})
    assert resolved == spec.model_copy(update={"count": 1})
    assert effective_schedule(read.sampler, read.schedule) == effective_schedule(spec.sampler, spec.schedule)
    if spec.hires is not None:
        assert read.hires == spec.hires.model_copy(update={"schedule": read.hires and read.hires.schedule})


@given(st.text(max_size=60), st.text(max_size=60))
def test_prompts_of_any_kind_are_read_back(prompt: str, negative: str) -> None:
    assume("\0" not in prompt + negative and not any("\ud800" <= c <= "\udfff" for c in prompt + negative))
    spec, read = described(prompt=prompt, negative_prompt=negative)

    assert (read.prompt, read.negative_prompt) == (spec.prompt, spec.negative_prompt)


def test_request_in_a1111s_words_becomes_a_job() -> None:
    spec = spec_from_request(
        {
            "prompt": "a cat",
            "sampler_name": "DPM++ 2M SDE Exponential",
            "steps": 12,
            "batch_size": 2,
            "n_iter": 3,
            "subseed": 4,
            "enable_hr": True,
            "hr_resize_x": 192,
            "denoising_strength": 0.5,
            "override_settings": {"randn_source": "NV", "CLIP_stop_at_last_layers": 2, "pad_cond_uncond": True},
        }
    )

    assert (spec.sampler, spec.schedule, spec.count, spec.rng, spec.clip_skip) == (
        "DPM++ 2M SDE", "Exponential", 6, "NV", 2,
    )  # fmt: skip
    assert spec.hires is not None
    assert (spec.hires.width, spec.hires.denoising_strength, spec.options.pad_conds) == (192, 0.5, "empty")


def test_unknown_field_of_a_request_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidField, match="sampler_name"):
        spec_from_request({"prompt": "x", "sampler_nam": "Euler"})


@pytest.mark.parametrize(
    ("hires", "target", "crop"),
    [
        ({"scale": 1.5}, (96, 144), (0, 0)),
        ({"width": 128}, (128, 192), (0, 0)),
        ({"height": 160}, (106, 160), (0, 0)),
        ({"width": 128, "height": 128}, (128, 192), (0, 8)),
    ],
)
def test_hires_size_covers_what_was_asked_for(
    hires: dict[str, float], target: tuple[int, int], crop: tuple[int, int]
) -> None:
    fix = HiresFix.model_validate(hires)

    assert fix.target(64, 96) == target
    assert fix.crop(64, 96) == crop
