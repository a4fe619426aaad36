"""Textual inversion on a small random CLIP text encoder."""

import pytest
import torch
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.errors import EmbeddingNotApplied, RenderError
from latentfarm_shared.prompts.chunks import Placement, chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import EmbeddingRecord
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.injection import Injection, injected
from safetensors.numpy import save
from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import parse_embedding

WIDTH = 32
FILE = parse_embedding(save({"emb_params": torch.randn(5, WIDTH).numpy()}), "five.safetensors")


class OneFile:
    """A source of tensors that holds one file."""

    def __init__(self, file: EmbeddingFile) -> None:
        self.file = file

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        return self.file.normalised()


@pytest.fixture
def encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=600, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    encoder = CLIPTextModel(config)
    encoder.eval()
    return encoder


@pytest.fixture
def bank() -> EmbeddingBank:
    bank = EmbeddingBank(OneFile(FILE))
    bank.hold(FILE.record())
    return bank


IDS = torch.randint(1, 500, (2, 77), generator=torch.Generator().manual_seed(1))
PLACED = (Placement(3, FILE.record(), 0, 5),)


@torch.inference_mode()
def encode(encoder: CLIPTextModel, injection: Injection) -> torch.Tensor:
    with injected(encoder.get_input_embeddings(), injection):
        states: torch.Tensor = encoder(input_ids=IDS).last_hidden_state
    return states


def test_vectors_enter_their_rows_and_nothing_else_changes(encoder: CLIPTextModel, bank: EmbeddingBank) -> None:
    injection = Injection([PLACED, ()], bank, "clip_l")
    with torch.inference_mode():
        plain = encoder(input_ids=IDS).last_hidden_state

    states = encode(encoder, injection)
    injection.prove()

    assert injection.entered is not None
    assert torch.equal(injection.entered[0, 3:8], torch.from_numpy(FILE.tensors["clip_l"].copy()))
    assert torch.equal(states[1], plain[1])
    assert torch.equal(states[0, :3], plain[0, :3])
    assert not torch.allclose(states[0, 8:], plain[0, 8:])


def test_encoder_is_as_it_was_after_ejection(encoder: CLIPTextModel, bank: EmbeddingBank) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        plain = encoder(input_ids=IDS).last_hidden_state

    encode(encoder, Injection([PLACED, ()], bank, "clip_l"))

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(encoder(input_ids=IDS).last_hidden_state, plain)


class _ForgetsToWrite(Injection):
    def write(self, _module: object, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        return embedded


def test_proof_fails_when_the_write_is_disabled(encoder: CLIPTextModel, bank: EmbeddingBank) -> None:
    injection = _ForgetsToWrite([PLACED, ()], bank, "clip_l")

    encode(encoder, injection)

    with pytest.raises(EmbeddingNotApplied, match="five"):
        injection.prove()


def test_proof_fails_when_nothing_was_encoded(bank: EmbeddingBank) -> None:
    with pytest.raises(EmbeddingNotApplied):
        Injection([PLACED], bank, "clip_l").prove()


def test_bank_names_what_it_does_not_hold() -> None:
    with pytest.raises(RenderError, match="five"):
        EmbeddingBank(OneFile(FILE)).rows(FILE.record(), "clip_l")


def test_long_embedding_is_laid_out_over_chunks(demo_tokenizer: ClipTokenizer) -> None:
    record = FILE.record("many").model_copy(update={"vectors": 100})
    chunks = chunk_prompt("a girl, many, smile", demo_tokenizer, NameMatcher(demo_tokenizer, [record]))

    placed = [(p.position, p.first_row, p.rows) for chunk in chunks for p in chunk.placements]

    assert [rows for _, _, rows in placed] == [75, 25]
    assert [first for _, first, _ in placed] == [0, 75]
    assert all(len(chunk.tokens) == len(chunk.weights) == 77 for chunk in chunks)


def test_short_embedding_is_never_torn(demo_tokenizer: ClipTokenizer) -> None:
    record = FILE.record("five")
    matcher = NameMatcher(demo_tokenizer, [record])
    for words in range(66, 76):
        chunks = chunk_prompt("girl " * words + "five", demo_tokenizer, matcher)
        placed = [p for chunk in chunks for p in chunk.placements]
        assert [(p.first_row, p.rows) for p in placed] == [(0, 5)]
