import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentfarm_shared.errors import FarmError, InvalidField, UnknownName
from latentfarm_shared.specs import MAX_SEED, EmbeddingUse, JobSpec, expand, read_jsonl


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
    ("text", "side"), [("a-b", "positive"), ("a-b:neg", "negative"), ("gasai yuno-15200:pos", "positive")]
)
def test_embedding_use_reads_its_side(text: str, side: str) -> None:
    assert EmbeddingUse.parse(text).side == side


@pytest.mark.parametrize("text", ["name:left", "", ":neg", " ", "x" * 201])
def test_embedding_use_refuses_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidField):
        EmbeddingUse.parse(text)


def test_jsonl_reads_rows_and_passes_over_comments() -> None:
    specs = read_jsonl('\ufeff{"prompt": "a", "embeddings": ["x:neg"]}\n\n# note\n{"prompt": "b", "count": 2}\n')

    assert [s.prompt for s in specs] == ["a", "b"]
    assert specs[0].embeddings[0].side == "negative"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"prompt": "a"}\n{"prompt": ', 2),
        ('{"prompt": "a"}\n\n{"steps": 999}', 3),
        ('["a"]', 1),
        ('{"prompt": "a", "sampler": "nope"}', 1),
        ('{"prompt": "a", "embeddings": ["x:up"]}', 1),
        ('{"prompt": "a", "embeddings": [""]}', 1),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", 1),
        ("[" * 100_000, 1),
    ],
)
def test_jsonl_error_names_the_line(text: str, line: int) -> None:
    with pytest.raises(InvalidField) as caught:
        read_jsonl(text)

    assert caught.value.line == line
    assert f"line {line}" in str(caught.value)


def test_empty_file_is_refused() -> None:
    with pytest.raises(FarmError, match="no job"):
        read_jsonl("\n# nothing\n")
