"""A1111 v1.10.1's own numbers: attention, chunks, timetables, sigmas, infotext."""

import pytest
import torch
from latentfarm_shared.infotext import quote, read_infotext, unquote
from latentfarm_shared.parameters import SamplingOptions
from latentfarm_shared.prompts.attention import parse_attention
from latentfarm_shared.prompts.chunks import Reading, chunk_prompt
from latentfarm_shared.prompts.editing import Timeline, timetable
from latentfarm_shared.prompts.language import split_and
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_worker.sampling.noise import ImageNoise, NoiseRecipe
from latentfarm_worker.sampling.noise_model import NoiseModel
from latentfarm_worker.sampling.schedules import sigmas_for

from tests.conftest import embedding, vectors

RAISES = "(a:1..2)"  # A1111 raises on a number it cannot read; here it is text
EXACT = Reading(break_as_word=True, leave_vectors_behind=True)


def weighted_text(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Drop the empty segments that surround breaks."""
    return [(text, round(weight, 6)) for text, weight in pairs if text]


def test_attention_agrees_with_every_case() -> None:
    for case in vectors("a1111_attention.json"):
        if case["in"] == RAISES:
            continue
        parsed = parse_attention(case["in"], break_as_word=True)
        found = [("BREAK", -1.0) if s.is_break else (s.text, s.weight) for s in parsed]

        assert weighted_text(found) == weighted_text([(t, w) for t, w in case["out"]]), case["in"]


def test_chunks_agree_with_every_case(clip_tokenizer: ClipTokenizer) -> None:
    table = vectors("a1111_chunks.json")
    matcher = NameMatcher(clip_tokenizer, [embedding(name, n, 768) for name, n in table["embeddings"].items()])
    for case in table["cases"]:
        if case["in"] == RAISES:
            continue
        chunks = chunk_prompt(case["in"], clip_tokenizer, matcher, EXACT)

        assert [list(c.tokens) for c in chunks] == [c["tokens"] for c in case["chunks"]], case["in"]
        assert [list(c.weights) for c in chunks] == [pytest.approx(c["multipliers"]) for c in case["chunks"]]
        placed = [[[p.position - 1, p.embedding.name] for p in c.placements] for c in chunks]
        assert placed == [c["fixes"] for c in case["chunks"]], case["in"]


def test_backtracking_takes_an_embedding_along(clip_tokenizer: ClipTokenizer) -> None:
    matcher = NameMatcher(clip_tokenizer, [embedding("badhandv4", 6, 768)])
    prompt = "cat " * 60 + ", dog badhandv4 " + "cat " * 12

    first, second = chunk_prompt(prompt, clip_tokenizer, matcher)

    assert first.placements == ()
    assert [(p.position, p.rows) for p in second.placements] == [(2, 6)]


def test_timetables_agree_with_every_case() -> None:
    for case in vectors("a1111_schedule.json"):
        hires = case["hires_steps"]
        timeline = Timeline(hires or case["steps"], case["steps"] if hires else None, case["old"])

        found = [[entry.end_at_step, entry.text] for entry in timetable(case["in"], timeline)]

        assert found == case["out"], case


def test_parts_of_and_agree_with_every_case() -> None:
    for case in vectors("a1111_multicond.json"):
        assert split_and(case["in"]) == [(case["flat"][at], weight) for at, weight in case["indexes"][0]]


@pytest.fixture(scope="module")
def noise_model() -> NoiseModel:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseModel((1 - betas).cumprod(0).float())


def test_sigmas_agree(noise_model: NoiseModel) -> None:
    for steps, expected in vectors("a1111_sigmas.json")["schedules"].items():
        for schedule, sigmas in expected.items():
            name, _, family = schedule.partition(" (")
            family = "sdxl" if family.startswith("SDXL") else "sd1"
            found = sigmas_for("Euler", name, noise_model, int(steps), SamplingOptions(), family)

            assert found == pytest.approx(sigmas, rel=2e-4), schedule


def test_training_step_is_the_inverse_of_sigma(noise_model: NoiseModel) -> None:
    for step in (0.0, 0.5, 353.25, 998.9, 999.0):
        sigma = float(noise_model.sigma_at(torch.tensor([step])))
        assert noise_model.step_at(sigma) == pytest.approx(step, abs=1e-2)


def test_noise_of_every_source_agrees() -> None:
    checked = 0
    for case in vectors("a1111_rng.json"):
        if len(case["seeds"]) != 1 or "subseeds" in case or len(case) > 8:
            continue
        noise = ImageNoise(NoiseRecipe(case["seeds"][0], case["source"], ensd=case["ensd"]), tuple(case["shape"]))
        first, second = noise.initial(), noise.fresh()
        assert first.flatten()[:8].tolist() == pytest.approx(case["first8"], abs=1e-5)
        assert second.flatten()[:8].tolist() == pytest.approx(case["second8"], abs=1e-5)
        checked += 1

    assert checked > 4


def test_quoting_agrees() -> None:
    table = vectors("a1111_infotext.json")
    for case in table["quote"]:
        assert quote(case["in"]) == str(case["out"])
    for case in table["unquote"]:
        assert unquote(case["in"]) == case["out"]


def test_reading_agrees_with_every_case() -> None:
    for case in vectors("a1111_infotext.json")["parse"]:
        found = read_infotext(case["in"])

        expected = {key: str(value) for key, value in case["out"].items()}
        assert (found.prompt, found.negative_prompt) == (expected.pop("Prompt"), expected.pop("Negative prompt"))
        for key, value in found.fields.items():
            if key != "Hashes":  # Civitai's raw JSON, which A1111 breaks at its first comma
                assert value == expected[key], case["in"]
