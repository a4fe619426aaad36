"""Upscaler models from a folder (ESRGAN, SwinIR, DAT … as `.pth` or `.safetensors`), loaded by spandrel when first used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import MissingExtra, UnreadableFile
from torch import Tensor

SUFFIXES = (".pth", ".safetensors", ".pt")


class UpscalerFolder(Mapping[str, Any]):
    """Upscaler models by file stem, in any case."""

    def __init__(self, folder: Path | None, device: str) -> None:
        """Look for models in `folder`, None for none."""
        self._device = device
        self._loaded: dict[str, Any] = {}
        files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
        self._paths = {path.stem.lower(): path for path in files if path.suffix.lower() in SUFFIXES}

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return (path.stem for path in self._paths.values())

    def __len__(self) -> int:
        """Count the models there are."""
        return len(self._paths)

    def __getitem__(self, name: str) -> Any:
        """Return a model, `[B, 3, h, w]` in, larger out.

        Raises:
            KeyError: there is none of that name.
            UnreadableFile: it is no upscaler of pictures with three channels.
            MissingExtra: spandrel is not installed.
        """
        path = self._paths[name.lower()]
        if name.lower() not in self._loaded:
            self._loaded[name.lower()] = self._load(path)
        return self._loaded[name.lower()]

    def _load(self, path: Path) -> Any:
        try:
            from spandrel import ImageModelDescriptor, ModelLoader  # noqa: PLC0415 - only where upscalers are used
        except ImportError as error:
            raise MissingExtra("upscalers", f"the upscaler {path.stem!r}") from error
        try:
            model = ModelLoader(device=self._device).load_from_file(path)
        except Exception as error:
            raise UnreadableFile(path.name, f"is no upscaler that spandrel knows ({type(error).__name__})") from error
        if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
            raise UnreadableFile(path.name, "does not turn a picture into a larger picture")
        model.eval()
        return _Described(model)


class _Described:
    """Calls a spandrel model on tiles of any size."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tiles: Tensor) -> Tensor:
        enlarged: Tensor = self._model(tiles.to(self._model.dtype))
        return enlarged
