import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentfarm_shared.embeddings.refusals import Caps
from latentfarm_shared.embeddings.sandbox import Sandbox, read_embedding
from latentfarm_shared.errors import UnreadableFile
from safetensors.numpy import save as save_safetensors

from tests.conftest import SANDBOX, parse_embedding, reference

ROWS = torch.arange(3 * 8, dtype=torch.float32).reshape(3, 8) / 7


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def a1111(rows: torch.Tensor) -> dict[str, object]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "inner", "step": 7}


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (torch_bytes(a1111(ROWS)), "a1111"),
        (torch_bytes(a1111(torch.nn.Parameter(ROWS))), "a1111"),
        (torch_bytes(a1111(ROWS.T.contiguous().T)), "a1111"),
        (torch_bytes({"<my-cat>": ROWS}), "diffusers"),
        (torch_bytes({"emb_params": ROWS}), "kohya"),
        (save_safetensors({"emb_params": ROWS.numpy()}), "kohya"),
        (save_safetensors({"<my-cat>": ROWS.numpy()}), "diffusers"),
        (save_safetensors({"clip_l": ROWS.numpy(), "clip_l_out": ROWS.numpy()}), "onetrainer"),
    ],
)
def test_same_tensors_in_any_container_are_one_embedding(content: bytes, layout: str) -> None:
    expected = parse_embedding(save_safetensors({"emb_params": ROWS.numpy()}), "x.safetensors")

    found = parse_embedding(content, "some name.pt")

    assert found.layout == layout
    assert found.stem == "some name"
    assert found.content_id == expected.content_id
    assert np.array_equal(found.tensors["clip_l"], ROWS.numpy())


def test_half_and_bfloat16_are_widened() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        found = parse_embedding(torch_bytes({"emb_params": ROWS.to(dtype)}), "x.pt")
        assert np.array_equal(found.tensors["clip_l"], ROWS.to(dtype).float().numpy())


def test_original_layout_with_a_parameter_dict_is_read() -> None:
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": ROWS})}

    assert parse_embedding(torch_bytes(content), "old.pt").vectors == 3


def test_order_of_bytes_is_honoured_and_harmless_extras_are_passed_over() -> None:
    little = torch_bytes({"emb_params": ROWS})
    source, target = io.BytesIO(little), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("byteorder"):
                data = b"big"
            elif "/data/" in member.filename:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            new.writestr(member.filename, data)

    assert np.array_equal(parse_embedding(target.getvalue(), "x.pt").tensors["clip_l"], ROWS.numpy())
    extras = a1111(ROWS) | {"step": np.int64(7), "dtype": torch.float32}
    assert parse_embedding(torch_bytes(extras), "x.pt").vectors == 3


class _SavedOnMps:
    """Pickles as PyTorch pickles tensors of devices whose storages it cannot write."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        rebuild = torch._utils._rebuild_device_tensor_from_numpy
        return rebuild, (ROWS.numpy(), torch.float32, "cpu", False)


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensor_saved_through_numpy_is_read(protocol: int) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"emb_params": _SavedOnMps()}, protocol))

    assert np.array_equal(parse_embedding(target.getvalue(), "mps.pt").tensors["clip_l"], ROWS.numpy())


def test_format_of_pytorch_before_zip_is_read() -> None:
    buffer = io.BytesIO()
    torch.save(a1111(ROWS), buffer, _use_new_zipfile_serialization=False)

    found = parse_embedding(buffer.getvalue(), "old.pt")

    assert (found.layout, found.internal_name) == ("a1111", "inner")
    assert np.array_equal(found.tensors["clip_l"], ROWS.numpy())
    with pytest.raises(UnreadableFile, match=r"damaged|more values|claims"):
        parse_embedding(buffer.getvalue()[:-20], "cut.pt")


@pytest.mark.parametrize(
    ("content", "layout", "names"),
    [
        ({"bundle_emb.cat.string_to_param.*": np.ones((2, 768), np.float32), "lora_a": np.ones(4, np.float32)}, "bundled", ["cat"]),
        (
            {
                "bundle_emb.a.b.clip_l": np.ones((2, 768), np.float32), "bundle_emb.a.b.clip_g": np.ones((2, 1280), np.float32),
                "bundle_emb.猫.clip_l": np.ones((1, 768), np.float32), "bundle_emb.猫.clip_g": np.ones((1, 1280), np.float32),
            },
            "bundled", ["a.b", "猫"],
        ),
        ({"emb_params": np.ones((2, 768), np.float32), "emp_params_out": np.ones((2, 768), np.float32)}, "onetrainer", ["x"]),
        ({"clip_l": np.ones((2, 768), np.float32), "t5": np.ones((2, 4096), np.float32)}, "by encoder", ["x"]),
        ({"text_encoders_0": np.ones((2, 768), np.float32)}, "pivotal", ["x"]),
    ],
)  # fmt: skip
def test_layouts_of_trainers(
    content: dict[str, np.ndarray[Any, Any]], layout: str, names: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save_safetensors(content))

    found = SANDBOX.read(path)

    assert sorted(f.stem for f in found) == sorted(names)
    assert {f.layout for f in found} == {layout}


def test_size_of_the_lora_around_a_bundle_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(save_safetensors({
        "bundle_emb.cat.string_to_param.*": np.ones((2, 768), np.float32), "lora_up": np.ones((1024, 1024), np.float32),
    }))  # fmt: skip

    with Sandbox(Caps(file_mb=1)) as small:
        assert [f.stem for f in small.read(path)] == ["cat"]


def test_lists_of_vectors_and_bare_tensors() -> None:
    rows = [{"emb": torch.ones(768) * n, "emb2": torch.ones(1280) * n} for n in range(3)]

    found = parse_embedding(torch_bytes(rows), "xl.pt")

    assert (found.vectors, found.widths) == (3, {"clip_g": 1280, "clip_l": 768})
    assert found.tensors["clip_g"][2, 0] == 2
    assert parse_embedding(torch_bytes(rows[0]), "one.pt").vectors == 1
    assert parse_embedding(torch_bytes(torch.ones(4096)), "t5.pt").needs_name


def test_sdxl_pair_has_both_encoders() -> None:
    pair = {"clip_l": np.ones((2, 768), np.float32), "clip_g": np.ones((2, 1280), np.float32)}

    assert parse_embedding(save_safetensors(pair), "xl.safetensors").widths == {"clip_l": 768, "clip_g": 1280}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!doctype html><html>", "web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (b"PK\x03\x04 broken", "damaged"),
        (b"random \xff bytes that are no tensor file", "neither"),
        (b"a note about embeddings", "a text file"),
        (save_safetensors({}), "without a tensor"),
        (save_safetensors({"emb_params": np.full((1, 8), np.nan, np.float32)}), "finite"),
        (save_safetensors({"a": np.ones((1, 8), np.float32), "b": np.ones((1, 8), np.float32)}), "2 tensors"),
        (save_safetensors({"emb_params": np.ones((600, 8), np.float32)}), "600 vectors"),
        (torch_bytes({}), "holds no tensors"),
    ],
)
def test_junk_is_refused_with_what_it_is(data: bytes, says: str) -> None:
    with pytest.raises(UnreadableFile, match=says):
        parse_embedding(data, "junk.pt")


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never appear",)


def test_pickle_with_code_is_refused_and_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnreadableFile, match="print"):
        parse_embedding(torch_bytes({"string_to_param": _Runs()}), "evil.pt")

    assert "never appear" not in capsys.readouterr().out


def test_tensor_that_claims_more_than_the_file_holds_is_refused() -> None:
    stretched = torch.zeros(1).expand(100_000, 768)

    with pytest.raises(UnreadableFile):
        parse_embedding(torch_bytes({"emb_params": stretched}), "stride-bomb.pt")


def test_zip_bomb_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(64 * 2**20))

    with pytest.raises(UnreadableFile, match="unpacks"):
        parse_embedding(buffer.getvalue(), "bomb.pt")


def test_safetensors_header_that_lies_is_refused() -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()

    with pytest.raises(UnreadableFile, match=r"no sense|more values"):
        parse_embedding(struct.pack("<Q", len(header)) + header + bytes(8), "short.safetensors")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"none\.pt"):
        read_embedding(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("name", "vectors", "width", "ti_hash"),
    [
        ("EasyNegative.safetensors", 8, 768, "c74b4e810b03"),
        ("EasyNegative.pt", 8, 768, "66a7279a88dd"),
        ("badhandv4.pt", 6, 768, "5e40d722fc3d"),
        ("ng_deepnegative_v1_75t.pt", 75, 768, "54e7e4826d53"),
        ("bad-image-v2-39000.pt", 4, 768, None),
        ("gasai yuno-15200.pt", 8, 768, None),
        ("learned_embeds.cat-toy.bin", 1, 768, None),
        ("nfixer.pt", 15, 1024, None),
    ],
)
def test_real_file_is_read(name: str, vectors: int, width: int, ti_hash: str | None) -> None:
    found = read_embedding(reference("embeddings", name))

    assert found.vectors == vectors
    assert set(found.widths.values()) == {width}
    assert ti_hash in (None, found.record().ti_hash)
