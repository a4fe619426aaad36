"""What a render asks of the device, and what it comes to. A render yields operations and is sent their results.

Knows tensors by name only, so that a simulated device needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from latentfarm_shared.names import EmphasisMode
from latentfarm_shared.prompts.chunks import Chunk

if TYPE_CHECKING:
    from torch import Tensor

    from latentfarm_worker.sampling.noise_model import Scaling


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One encoded text: `tokens: [77 * chunks, width]`, and `pooled: [width]` where the family has it.

    `applied` are the content ids of the embeddings whose vectors were found in the tensor that entered the encoder.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    applied: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Encode:
    """Encode the distinct texts of one timetable, laid out with equally many chunks. Answered with a `Conditioning` each.

    The mean that Original emphasis restores runs over the whole timetable, as in A1111, in which each text stands
    `counts` times. `zero` asks for zeros in place of the
    encoding, which SDXL wants for an empty negative prompt.
    """

    texts: tuple[tuple[Chunk, ...], ...]
    counts: tuple[int, ...] = ()
    clip_skip: int = 1
    emphasis: EmphasisMode = "Original"
    zero: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that decides the answer on one checkpoint."""
        texts = tuple(tuple(chunk.key for chunk in text) for text in self.texts)
        return texts, self.counts, self.clip_skip, self.emphasis, self.zero


@dataclass(frozen=True, eq=False)
class Side:
    """One text that guides a step, and the share of its answer in the whole."""

    conditioning: Conditioning
    share: float


@dataclass(frozen=True, eq=False)
class Denoise:
    """Ask the UNet about `latent: [4, H/8, W/8]` with every side, and mix the answers.

    Each side's answer is `keep * latent + gain * unet(...)`; the mix is the last side's plus, for every other, its share
    of its difference to the last. Answered with a tensor of the latent's shape; if `keeps_last`, with that and the last
    side's own answer, stacked. `rescale` pulls the spread of the mix back to that of the first side.
    """

    latent: Tensor
    scaling: Scaling
    sides: tuple[Side, ...]
    rescale: float = 0.0
    keeps_last: bool = False
    tiling: bool = False
    precise: bool = False


@dataclass(frozen=True, eq=False)
class Decode:
    """Turn `latent: [4, H/8, W/8]` into a `Picture`."""

    latent: Tensor
    tiling: bool = False
    precise: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """`pixels: [H, W, 3]`, uint8 on the CPU, and whether everything that led to them was finite."""

    pixels: Tensor
    finite: bool = True


@dataclass(frozen=True, eq=False)
class EncodePixels:
    """Turn `pixels: [H, W, 3]`, uint8, into a latent; `noise: [4, H/8, W/8]` picks the sample from the posterior."""

    pixels: Tensor
    noise: Tensor
    tiling: bool = False
    precise: bool = False


@dataclass(frozen=True, eq=False)
class Enlarge:
    """Enlarge a tile `[3, h, w]`, float in 0 to 1, with an upscaler model; answered with `[3, h * scale, w * scale]`."""

    tile: Tensor
    upscaler: str


@dataclass(frozen=True, eq=False)
class Tune:
    """Do one short piece of work on the checkpoint, such as a step of training; answered with what it returns."""

    work: Callable[[], object]


Operation = Encode | Denoise | Decode | EncodePixels | Enlarge | Tune


def group_key(operation: Operation) -> tuple[object, ...]:
    """Return what two operations must share to run in one batch of one checkpoint."""
    match operation:
        case Encode():
            return ("encode",)
        case Denoise():
            return "denoise", tuple(operation.latent.shape), operation.tiling, operation.precise
        case Decode():
            return "decode", tuple(operation.latent.shape), operation.tiling, operation.precise
        case EncodePixels():
            return "encode pixels", tuple(operation.pixels.shape), operation.tiling, operation.precise
        case Enlarge():
            return "enlarge", tuple(operation.tile.shape), operation.upscaler
        case Tune():
            return "tune", id(operation)


@dataclass(eq=False)
class Progress:
    """How far a render is; written by the engine's thread, read by anyone."""

    stage: str = "waiting"
    step: int = 0
    steps: int = 0
    latent: Tensor | None = None
    score: float | None = None

    def begin(self, stage: str, steps: int) -> None:
        """Enter a stage of so many model calls."""
        self.stage, self.step, self.steps = stage, 0, steps

    def advance(self, latent: Tensor) -> None:
        """Count a model call and keep what there is to see after it, for previews."""
        self.step, self.latent = self.step + 1, latent


@dataclass(frozen=True, eq=False)
class Rendered:
    """A finished picture, `pixels: [H, W, 3]` uint8 on the CPU, and the content ids of the embeddings that went in.

    `promised` are those that its prompts mean.
    """

    pixels: Tensor
    applied: frozenset[str] = frozenset()
    promised: frozenset[str] = frozenset()


Render = Generator[Operation, Any, Rendered]


class Model(Protocol):
    """What the engine needs of a checkpoint; the tests hand in a smaller one."""

    name: str

    def encode(self, batch: Sequence[Encode]) -> Sequence[tuple[Conditioning, ...]]:
        """Encode texts."""
        ...

    def denoise(self, batch: Sequence[Denoise]) -> Sequence[Tensor]:
        """Ask the UNet."""
        ...

    def decode(self, batch: Sequence[Decode]) -> Sequence[Picture]:
        """Turn latents into pixels."""
        ...

    def encode_pixels(self, batch: Sequence[EncodePixels]) -> Sequence[Tensor]:
        """Turn pixels into latents."""
        ...

    def enlarge(self, batch: Sequence[Enlarge]) -> Sequence[Tensor]:
        """Enlarge tiles."""
        ...
