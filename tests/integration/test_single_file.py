"""A checkpoint of one file in the original Stable Diffusion layout, made here from the demo checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.checkpoints import describe_single_file
from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.prompts.chunks import chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.records import CheckpointRecord
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.fetch import fetch_checkpoint
from latentfarm_worker.loading import load_checkpoint
from latentfarm_worker.operations import Decode, Denoise, Encode, Side
from latentfarm_worker.runtime import Runtime
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_key(key: str) -> str:
    """Return the original name of a UNet weight, for three levels of one layer."""
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    down, level, kind, number, rest = re.fullmatch(r"(\w+?)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.+)", key).groups()  # type: ignore[union-attr]
    if kind == "resnets":
        name, _, end = rest.partition(".")
        rest = f"{RESNET[name]}.{end}"
    if down == "mid":
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{rest}"
    at = int(level) * 2 + (1 if down == "down" else 0)
    if kind == "downsamplers":
        return f"input_blocks.{at + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{at + 1}.{2 if int(level) < 2 else 1}.{rest}"
    side = "input_blocks" if down == "down" else "output_blocks"
    return f"{side}.{at + int(number)}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_key(key: str) -> str:
    """Return the original name of an autoencoder weight, for four levels."""
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    return re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "old style.safetensors"
    write_single_file(path)
    return path


def write_single_file(path: Path) -> None:
    """Write the demo checkpoint in the original layout."""
    unet = load_file(CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(CHECKPOINT / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(CHECKPOINT / "text_encoder" / "model.safetensors")
    weights = {f"model.diffusion_model.{unet_key(k)}": v for k, v in unet.items()}
    weights |= {f"first_stage_model.{vae_key(k)}": v for k, v in vae.items()}
    weights |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    save_file(weights, path)


def render(checkpoint: Checkpoint) -> torch.Tensor:
    """Run each part once."""
    chunks = chunk_prompt("a girl", checkpoint.tokenizer, NameMatcher(checkpoint.tokenizer, ()))
    ((prompt,),) = checkpoint.encode([Encode((chunks,))])
    latent = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1))
    (denoised,) = checkpoint.denoise([Denoise(latent * 5, checkpoint.noise.at_sigma(5.0), (Side(prompt, 1.0),))])
    return checkpoint.decode([Decode(denoised)])[0].pixels


def load(servers: DirectFarm, record: CheckpointRecord, cache: Path) -> Checkpoint:
    folder = fetch_checkpoint(record, servers.registry, cache)
    return load_checkpoint(record, folder, EmbeddingBank(servers.library), Runtime())


def test_single_file_renders_as_its_folder_does(servers: DirectFarm, single_file: Path, tmp_path: Path) -> None:
    folder = servers.models.add(CHECKPOINT, "demo")
    single = servers.models.add(single_file, config=CHECKPOINT)

    assert (single.name, single.layout, single.widths) == ("old style", "single_file", {"clip_l": 128})
    assert torch.equal(render(load(servers, single, tmp_path)), render(load(servers, folder, tmp_path)))


def test_single_file_without_configuration_says_what_to_give(single_file: Path) -> None:
    with pytest.raises(UnreadableFile, match="--config"):
        describe_single_file(single_file, "x", None)


def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"not safetensors at all, no")):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UnreadableFile):
            describe_single_file(path, "x", CHECKPOINT)
