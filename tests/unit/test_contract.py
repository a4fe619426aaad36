import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentfarm_shared.errors import EmbeddingRefused, InvalidField, UnknownName
from latentfarm_shared.parameters import EmbeddingUse, HiresFix
from latentfarm_shared.prompts.contract import Contract, Settled, edit_distance, settle
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import EmbeddingRecord, Lock
from latentfarm_shared.specs import JobSpec
from latentfarm_shared.sweeps.axes import Point
from latentfarm_worker.prompts import PromptLayout

from tests.conftest import checkpoint, embedding

KNOWN = {
    record.name.lower(): record
    for record in (
        embedding("corneo_dva", 10),
        embedding("16-token-demo-neg", 16),
        embedding("EasyNegative", 8, 768),
        embedding("bad-artist"),
        embedding("bad-artist-anime"),
        embedding("girl (alt)"),
        embedding("gasai yuno-15200"),
    )
}


def settled(tokenizer: ClipTokenizer, prompt: str, negative: str = "", *uses: str) -> Settled:
    spec = JobSpec(prompt=prompt, negative_prompt=negative, embeddings=tuple(EmbeddingUse.parse(u) for u in uses))
    return settle(spec, checkpoint(), KNOWN, tokenizer)


def names(records: tuple[EmbeddingRecord, ...]) -> list[str]:
    return [record.name for record in records]


@pytest.mark.parametrize(
    "prompt",
    [
        "masterpiece, corneo_dva",
        "CORNEO_DVA",
        "(corneo_dva:1.2)",
        "[corneo_dva]",
        "a corneo_dva, b",
        "embedding:corneo_dva, b",
        "(embedding:corneo_dva:1.2)",
        "<corneo_dva>",
        "<Corneo_DVA> on the moon",
        "(corneo_dva, smile:1.1) xcorneo_dva",
        "a photo<corneo_dva>style",
        "<corneo_dva>BREAK a girl",
    ],
)
def test_name_in_the_prompt_is_the_embedding(demo_tokenizer: ClipTokenizer, prompt: str) -> None:
    assert names(settled(demo_tokenizer, prompt).embeddings) == ["corneo_dva"]


def test_name_with_a_space_is_no_misspelling_of_itself(demo_tokenizer: ClipTokenizer) -> None:
    assert names(settled(demo_tokenizer, "Gasai Yuno-15200, smile").embeddings) == ["gasai yuno-15200"]


def test_explicit_request_is_added_to_its_prompt(demo_tokenizer: ClipTokenizer) -> None:
    result = settled(demo_tokenizer, "masterpiece", "", "corneo_dva", "16-token-demo-neg:neg")

    assert result.spec.prompt == "masterpiece, corneo_dva"
    assert result.spec.negative_prompt == "16-token-demo-neg"
    assert names(result.embeddings) == ["corneo_dva", "16-token-demo-neg"]


def test_explicit_request_already_in_the_prompt_is_not_doubled(demo_tokenizer: ClipTokenizer) -> None:
    assert settled(demo_tokenizer, "a, corneo_dva", "", "corneo_dva").spec.prompt == "a, corneo_dva"


def test_name_with_brackets_is_escaped_when_added(demo_tokenizer: ClipTokenizer) -> None:
    result = settled(demo_tokenizer, "a", "", "girl (alt)")

    assert result.spec.prompt == r"a, girl \(alt\)"
    assert names(result.embeddings) == ["girl (alt)"]


def test_name_of_one_letter_makes_no_misspelling_of_others(demo_tokenizer: ClipTokenizer) -> None:
    known = KNOWN | {"a": embedding("a").model_copy(update={"allow_word": True})}
    spec = JobSpec(prompt="a girl, corneo_dva, a cat")
    assert names(settle(spec, checkpoint(), known, demo_tokenizer).embeddings) == ["a", "corneo_dva"]


def test_longest_name_wins(demo_tokenizer: ClipTokenizer) -> None:
    assert names(settled(demo_tokenizer, "bad-artist-anime").embeddings) == ["bad-artist-anime"]


@pytest.mark.parametrize("prompt", ["corneo_dv", "corneo-dva", "corneo_dvaa", "bad-artis"])
def test_misspelt_name_is_refused_with_a_suggestion(demo_tokenizer: ClipTokenizer, prompt: str) -> None:
    with pytest.raises(UnknownName) as caught:
        settled(demo_tokenizer, f"masterpiece, {prompt}, smile")

    assert caught.value.suggestions


@pytest.mark.parametrize("prompt", ["an astronaut riding a horse, 8k uhd", "1girl, sci-fi", "artist", "中文 提示", ""])
def test_plain_words_stay_text(demo_tokenizer: ClipTokenizer, prompt: str) -> None:
    assert settled(demo_tokenizer, prompt).embeddings == ()


@pytest.mark.parametrize("prompt", ["embedding:nosuch", "<nosuch>"])
def test_explicit_form_must_exist(demo_tokenizer: ClipTokenizer, prompt: str) -> None:
    with pytest.raises(UnknownName, match="nosuch"):
        settled(demo_tokenizer, prompt)


def test_wrong_family_is_refused_with_both_widths(demo_tokenizer: ClipTokenizer) -> None:
    with pytest.raises(EmbeddingRefused, match=r"768.*128"):
        settled(demo_tokenizer, "a, EasyNegative")


def test_lora_is_refused_by_name(demo_tokenizer: ClipTokenizer) -> None:
    with pytest.raises(InvalidField, match="lora"):
        settled(demo_tokenizer, "a <lora:x:1>")


@pytest.mark.parametrize(("left", "right", "distance"), [("", "ab", 2), ("kitten", "sitting", 3), ("a", "a", 0)])
def test_edit_distance(left: str, right: str, distance: int) -> None:
    assert edit_distance(left, right) == distance


def test_prompt_that_would_keep_a_device_busy_is_refused(demo_tokenizer: ClipTokenizer) -> None:
    many = "|".join(f"cat{number}" for number in range(120))
    for prompt in ("a AND " * 200 + "a", f"[{many}] " + "word " * 3000, "[a|b]" + " BREAK" * 3300):
        with pytest.raises(InvalidField, match="prompt"):
            settle(JobSpec(prompt=prompt, steps=150), checkpoint(), {}, demo_tokenizer)


@pytest.mark.parametrize("prompt", ["[" * 20_000, "[a|" * 5_000, "(" * 9_000 + ")" * 9_000, "[[a:b:1]" * 2_000])
def test_hostile_brackets_are_read_in_no_time(demo_tokenizer: ClipTokenizer, prompt: str) -> None:
    began = time.monotonic()

    settle(JobSpec(prompt=prompt, steps=20), checkpoint(), {}, demo_tokenizer)

    assert time.monotonic() - began < 10


def test_embeddings_of_every_text_and_pass_are_found(demo_tokenizer: ClipTokenizer) -> None:
    known = {name: embedding(name) for name in ("first-1", "second-2", "third-3")}
    spec = JobSpec(
        prompt="a [first-1:cat:0.5] AND dog # third-3",
        hires=HiresFix(prompt="a [cat|second-2]"),
    )

    settled = settle(spec, checkpoint(), known, demo_tokenizer)

    assert {record.name for record in settled.embeddings} == {"first-1", "second-2"}
    assert settled.spec.hires is not None
    assert "#" not in settled.spec.prompt


@pytest.mark.parametrize(
    ("prompt", "values", "found"),
    [
        ("[cat:late-1:25]", {}, False),
        ("[cat:late-1:1.5]", {}, False),
        ("[cat:late-1:25]", {"hires": {}}, True),
        ("[cat:late-1:60]", {"hires": {"steps": 50}}, True),
        ("[cat:late-1:30]", {"hires": {"steps": 5}}, False),
        ("[cat:late-1:35]", {"sampler": "Heun"}, True),
        ("[a|b|late-1]", {"sampler": "Heun", "steps": 2}, True),
        ("[a|b|late-1]", {"steps": 2}, False),
        ("[cat:late-1:5.5]", {"compat": ("old_prompt_timelines",)}, True),
    ],
)
def test_embedding_is_locked_exactly_if_a_pass_reaches_it(
    demo_tokenizer: ClipTokenizer, prompt: str, values: dict[str, Any], found: bool
) -> None:
    spec = JobSpec.check({"prompt": prompt} | values)

    settled = settle(spec, checkpoint(), {"late-1": embedding("late-1")}, demo_tokenizer)

    assert bool(settled.embeddings) is found
    layout = PromptLayout(
        settled.spec, Lock(checkpoint=checkpoint(), embeddings=(embedding("late-1"),)), demo_tokenizer
    )
    passes = [layout.first_pass(), *([layout.hires_pass()] if spec.hires else [])]
    placed = [c.placements for laid in passes for part in laid.positive for text in part.texts for c in text]
    assert any(placed) is found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", "a cat, x-1"),
        ("cat AND dog:0.5", "x-1, cat AND dog:0.5"),
        ("plain:0.5", "x-1, plain:0.5"),
        ("(cat", "x-1, (cat"),
        ("", "x-1"),
    ],
)
def test_added_embedding_takes_nothing_from_the_prompt(
    demo_tokenizer: ClipTokenizer, prompt: str, expected: str
) -> None:
    spec = JobSpec(prompt=prompt, embeddings=(EmbeddingUse(name="x-1"),))

    assert settle(spec, checkpoint(), {"x-1": embedding("x-1")}, demo_tokenizer).spec.prompt == expected


@pytest.mark.parametrize("prompt", [" " * 19_000 + "x", "x" + "\n" * 19_000 + "y", ": " * 9_000, "BREAK " * 3_000])
def test_blank_space_is_read_in_no_time(demo_tokenizer: ClipTokenizer, prompt: str) -> None:
    began = time.monotonic()

    try:
        settle(JobSpec(prompt=prompt, steps=20), checkpoint(), {}, demo_tokenizer)
    except InvalidField:
        assert "BREAK" in prompt

    assert time.monotonic() - began < 5


READ_QUICKLY = ("corneo_dva", "easynegative", "!!!", "bad-hands-5", "foo bar", "art")
LOOSE_TEXT = st.lists(
    st.sampled_from(
        [*READ_QUICKLY, "photo-easynegative", "no_easynegative", "2023easynegative", "a cat", "party", "it's", "wow", "foo",
         "bar", "EasyNegative", "bad-hand-5", "'xad-hands-5'", "x", ",", " ", "-", "_", "!", "!!!!", ".", "1girl", "ART"]
    ), max_size=8)  # fmt: skip


@given(LOOSE_TEXT, st.sampled_from(["", " ", ", "]))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_prompt_that_is_read_quickly_says_nothing_to_the_contract(
    demo_tokenizer: ClipTokenizer, parts: list[str], between: str
) -> None:
    contract = Contract(checkpoint(), {name: embedding(name) for name in READ_QUICKLY}, demo_tokenizer)
    prompt = between.join(parts)
    if contract.says_nothing(prompt):
        assert contract.mentions(prompt, "prompt", JobSpec(prompt=prompt)) == []
        contract.settle(JobSpec(prompt=prompt))


def test_plain_prompts_are_read_quickly(demo_tokenizer: ClipTokenizer) -> None:
    contract = Contract(checkpoint(), {"corneo_dva": embedding("corneo_dva")}, demo_tokenizer)

    assert contract.says_nothing("a girl, masterpiece, high quality, picture 17 of many, it's late")


class Table:
    """Rows in memory."""

    def __init__(self, *rows: Point) -> None:
        self.rows = rows

    def row(self, number: int) -> Point:
        return self.rows[number]

    def wildcard(self, name: str) -> list[str]:
        raise KeyError(name)


def of_rows(*rows: Point, **values: object) -> tuple[JobSpec, Table]:
    table = {"total": len(rows), "chunk": 10, "index": "0" * 64}
    return JobSpec.check({"prompt": "a", "seed": 1, "rows": table} | values), Table(*rows)


def used_by(tokenizer: ClipTokenizer, spec: JobSpec, table: Table) -> set[str]:
    contract = Contract(checkpoint(), {name: embedding(name) for name in READ_QUICKLY}, tokenizer)
    return {record.name for record in contract.settle(spec, table).embeddings}


def test_row_that_names_an_embedding_is_never_passed_over(demo_tokenizer: ClipTokenizer) -> None:
    for text in ("photo-easynegative", "no_easynegative", "2023easynegative", "wow !!!"):
        spec, table = of_rows({"prompt": "a cat"}, {"prompt": text})
        assert len(used_by(demo_tokenizer, spec, table)) == 1, text


def test_steps_of_a_row_reach_what_changes_in_the_prompt(demo_tokenizer: ClipTokenizer) -> None:
    spec, table = of_rows({"steps": 10}, {"steps": 30}, steps=10, negative_prompt="[:easynegative:15]")

    assert used_by(demo_tokenizer, spec, table) == {"easynegative"}


def test_rows_are_read_with_every_value_of_the_axes(demo_tokenizer: ClipTokenizer) -> None:
    colours = [*(f"c{n}" for n in range(25)), "easynegative"]
    spec, table = of_rows(
        *(Point(prompt=f"COLOUR {n}") for n in range(30)), axes=[{"field": "replace:COLOUR", "values": colours}]
    )

    assert used_by(demo_tokenizer, spec, table) == {"easynegative"}
    assert spec.text_variants == 30 * 26


def test_embeddings_of_a_job_with_rows_are_refused() -> None:
    with pytest.raises(InvalidField, match="rows' own prompts"):
        of_rows({"prompt": "a"}, embeddings=[{"name": "art"}])


def test_clip_skip_of_a_row_is_checked(demo_tokenizer: ClipTokenizer) -> None:
    spec, table = of_rows({"clip_skip": 1}, {"clip_skip": 12})
    contract = Contract(checkpoint().model_copy(update={"layers": 4}), {}, demo_tokenizer)

    with pytest.raises(InvalidField, match="takes 1 to 4"):
        contract.settle(spec, table)
