"""Tiny random checkpoints of SD2's and SDXL's architecture, held against diffusers' own pipelines."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.checkpoints import describe_folder
from latentfarm_shared.errors import EmbeddingRefused
from latentfarm_worker import Renderer
from latentfarm_worker.sampling.noise import ImageNoise, NoiseRecipe
from safetensors.torch import save
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.conftest import parse_embedding

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

VOCABULARY = json.loads((CHECKPOINT / "tokenizer" / "vocab.json").read_text())
START, END = VOCABULARY["<|startoftext|>"], VOCABULARY["<|endoftext|>"]
PROMPT, NEGATIVE = "a girl with blue hair", "blurry"


def encoder_config(width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, hidden_act=act, projection_dim=width, bos_token_id=START, eos_token_id=END,
        pad_token_id=END if act == "quick_gelu" else 0,
    )  # fmt: skip


def unet(width: int, **extra: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, **extra,
    )  # fmt: skip


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def tokenizer(folder: Path, pad: str) -> Path:
    shutil.copytree(CHECKPOINT / "tokenizer", folder)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.exists() else {"tokenizer_class": "CLIPTokenizer"}
    config.write_text(json.dumps(values | {"pad_token": pad, "model_max_length": 77}))
    return folder


def with_vocabulary(folder: Path) -> Path:
    """Add the two files that published checkpoints have and newer transformers does not write."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(CHECKPOINT / "tokenizer" / name, folder / "tokenizer" / name)
    return folder


def scheduler(**extra: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        steps_offset=1,
        **extra,
    )


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD2 with velocity prediction, as diffusers keeps it: OpenCLIP's encoder without its last layer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("sd2")
    words = CLIPTokenizer.from_pretrained(tokenizer(folder / "words", "!"))
    diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(encoder_config(64, 3, "gelu")), tokenizer=words, unet=unet(64),
        scheduler=scheduler(prediction_type="v_prediction"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "tiny2")  # fmt: skip
    return with_vocabulary(folder / "tiny2")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("sdxl")
    first = CLIPTokenizer.from_pretrained(tokenizer(folder / "first", "<|endoftext|>"))
    second = CLIPTokenizer.from_pretrained(tokenizer(folder / "second", "!"))
    diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=CLIPTextModel(encoder_config(32, 3, "quick_gelu")), tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(encoder_config(64, 3, "gelu")), tokenizer_2=second,
        unet=unet(
            96, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=112
        ),
        scheduler=scheduler(),
    ).save_pretrained(folder / "tinyxl")  # fmt: skip
    return with_vocabulary(folder / "tinyxl")


def by_pipeline(pipeline: Any) -> torch.Tensor:
    """Render with diffusers from the noise that seed 7 has here."""
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise(NoiseRecipe(7), (4, 8, 12)).initial()[None]
    found: torch.Tensor = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=5.0, width=96, height=64, latents=noise,
        output_type="pt",
    ).images[0]  # fmt: skip
    return (found * 255).permute(1, 2, 0)


def test_sd2_renders_as_diffusers_does(sd2: Path) -> None:
    expected = by_pipeline(diffusers.StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None))
    with Renderer(sd2) as renderer:
        assert (renderer.record.architecture, renderer.record.prediction_type) == ("sd2", "v_prediction")

        (found,) = renderer.render(
            PROMPT, negative_prompt=NEGATIVE, steps=4, cfg_scale=5.0, seed=7, width=96, height=64, schedule="Uniform"
        )

    assert float((found.float() - expected).abs().max()) <= 2


def test_sdxl_renders_as_diffusers_does(sdxl: Path) -> None:
    expected = by_pipeline(diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl))
    with Renderer(sdxl) as renderer:
        assert renderer.record.widths == {"clip_l": 32, "clip_g": 64}

        (found,) = renderer.render(
            PROMPT, negative_prompt=NEGATIVE, steps=4, cfg_scale=5.0, seed=7, width=96, height=64, schedule="Uniform"
        )

    assert float((found.float() - expected).abs().max()) <= 2


def test_sdxl_applies_both_halves_of_an_embedding(sdxl: Path) -> None:
    data = save({"clip_l": torch.randn(3, 32), "clip_g": torch.randn(3, 64)})
    with Renderer(sdxl) as renderer:
        record = renderer.add_embedding(parse_embedding(data, "xl-style.safetensors"))
        values = {"steps": 2, "seed": 7, "width": 64, "height": 64}

        spec, lock = renderer.freeze(renderer.spec(f"a {record.name} girl", **values))
        rendered = renderer.submit(spec, lock).result()

        assert rendered.applied == {record.content_id}
        (plain,) = renderer.render("a girl", **values)
        assert not torch.equal(rendered.pixels, plain)


def test_embedding_of_another_architecture_is_refused(sdxl: Path, sd2: Path) -> None:
    data = save({"emb_params": torch.randn(3, 32)})
    for folder in (sdxl, sd2):
        with Renderer(folder) as renderer:
            renderer.add_embedding(parse_embedding(data, "sd1-style.safetensors"))
            with pytest.raises(EmbeddingRefused, match="takes"):
                renderer.render("a sd1-style girl", steps=1, width=64, height=64)


def test_hires_pass_and_empty_negative_prompt_work_on_sdxl(sdxl: Path) -> None:
    with Renderer(sdxl) as renderer:
        (found,) = renderer.render("a girl", steps=2, width=64, height=64, hires={"scale": 2, "upscaler": "Lanczos"})

    assert found.shape == (128, 128, 3)


def test_architectures_are_told_from_their_configuration(sd2: Path, sdxl: Path) -> None:
    assert [describe_folder(folder, "x").architecture for folder in (CHECKPOINT, sd2, sdxl)] == ["sd1", "sd2", "sdxl"]
