"""Training gradients without loss: per layer `a` and `g` where these are smaller than `g aᵀ`, else the gradient itself.

A shard file `NNNNN.safetensors` holds, for checkpoint C and block B, `C.B.inputs` (count, groups, d_in) and `C.B.outputs` (count, groups, d_out),
or `C.B.whole` (count, groups, d_out, d_in); `C.B.turned.…` where inputs lie along the axes of a curvature. Each is divided by its largest entry per
example, and the product of these is kept in `C.B.scale` (count,) as float32: gradients of well-fitted examples are far below the smallest float16.
As int8, entries are rounded to 127ths.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attribution_core.arrays import mapped_arrays, write_arrays
from attribution_core.errors import CorruptArtifactError
from attribution_core.gradients import AnyRotation, Block, DenseGradient, LayerGradient, Rotation, turned

Arrays = dict[str, np.ndarray]
FactorType = Literal["float32", "float16", "int8"]
_LEVELS = 127
_TURNED = ".turned"
# Rows decoded together: enough for fast products, some megabytes.
_ROWS_AT_ONCE = 512


def numbers_kept(gradients: Sequence[LayerGradient]) -> int:
    """Return how many numbers an example's gradient takes."""
    return sum(_factored_size(part.block) if _factored(part) else part.block.numel for part in gradients)


def encoded(
    gradients: Sequence[LayerGradient], dtype: FactorType, rotations: Sequence[AnyRotation] | None = None
) -> Arrays:
    """Return a batch's gradients as named arrays, without the checkpoint's number; with inputs along the rotations' axes, if given."""
    found: Arrays = {}
    for number, each in enumerate(gradients):
        gradient, place = each, f"{number}"
        if rotations is not None and isinstance(rotations[number], Rotation):
            gradient, place = turned(each, rotations[number]), f"{number}{_TURNED}"
        if _factored(gradient):
            parts = {"inputs": gradient.inputs[:, :, 0], "outputs": gradient.outputs[:, :, 0]}
        else:
            parts = {"whole": torch.cat([rows for _, rows in gradient.materialised()])}
        scale = gradient.inputs.new_ones(len(gradient))
        for name, values in parts.items():
            largest = values.flatten(1).abs().amax(1)
            found[f"{place}.{name}"] = _array(values / _shaped(largest.where(largest > 0, 1), values), dtype)
            scale = scale * largest
        found[f"{place}.scale"] = _array(scale, "float32")
    return found


class GradientStore:
    """The gradients of one index; rows stay on disk until asked for.

    Args:
        folder: where the shards are.
        starts: first row of each shard, and the end.
        blocks: the layers.

    Raises:
        CorruptArtifactError: if a shard is missing or damaged.
    """

    def __init__(self, folder: Path, starts: np.ndarray, blocks: Sequence[Block], device: str = "cpu") -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != len(starts) - 1:
            raise CorruptArtifactError(f"the index has {len(paths)} gradient shards instead of {len(starts) - 1}")
        self._shards = [mapped_arrays(path) for path in paths]
        self._starts = starts
        self._blocks = list(blocks)
        self._device = device
        self.bytes = sum(path.stat().st_size for path in paths)

    @property
    def numbers(self) -> int:
        """Numbers per example, scales left out."""
        return sum(
            int(np.prod(value.shape[1:])) for name, value in self._shards[0].items() if not name.endswith(".scale")
        )

    def read(
        self, checkpoint: int, rows: np.ndarray, rotations: Sequence[AnyRotation] | None = None
    ) -> Iterator[tuple[np.ndarray, list[LayerGradient]]]:
        """Yield `(places in rows, gradients)` shard by shard, some rows at a time.

        Args:
            checkpoint: whose gradients.
            rows: numbers of examples.
            rotations: along whose axes inputs are to lie; those of shards that an older version wrote are turned here.
        """
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of):
            of_shard = np.flatnonzero(shard_of == number)
            for start in range(0, len(of_shard), _ROWS_AT_ONCE):
                places = of_shard[start : start + _ROWS_AT_ONCE]
                inside = rows[places] - self._starts[number]
                if inside[-1] - inside[0] + 1 == len(inside) and (np.diff(inside) == 1).all():
                    inside = slice(inside[0], inside[-1] + 1)
                yield places, self._decoded(self._shards[number], checkpoint, inside, rotations)

    def _decoded(
        self,
        shard: Mapping[str, np.ndarray],
        checkpoint: int,
        rows: np.ndarray | slice,
        rotations: Sequence[AnyRotation] | None,
    ) -> list[LayerGradient]:
        gradients: list[LayerGradient] = []
        for number, block in enumerate(self._blocks):
            name = f"{checkpoint}.{number}"
            along = f"{name}{_TURNED}.scale" in shard
            name += _TURNED if along else ""
            scale = self._tensor(shard[f"{name}.scale"][rows])
            if f"{name}.whole" in shard:
                values = self._tensor(shard[f"{name}.whole"][rows]) * scale.view(-1, 1, 1, 1)
                gradients.append(DenseGradient(block, values, values[:0]))
            else:
                outputs = self._tensor(shard[f"{name}.outputs"][rows]) * scale.view(-1, 1, 1)
                inputs = self._tensor(shard[f"{name}.inputs"][rows])
                gradients.append(LayerGradient(block, inputs.unsqueeze(2), outputs.unsqueeze(2)))
            if rotations is not None and not along:
                gradients[-1] = turned(gradients[-1], rotations[number])
        return gradients

    def _tensor(self, values: np.ndarray) -> Tensor:
        found = torch.from_numpy(np.array(values, np.float32)).to(self._device)
        return found / _LEVELS if values.dtype == np.int8 else found


def write_gradients(folder: Path, number: int, members: Sequence[Arrays]) -> None:
    """Write one shard from the encoded arrays of every checkpoint."""
    named = {
        f"{checkpoint}.{name}": value for checkpoint, arrays in enumerate(members) for name, value in arrays.items()
    }
    write_arrays(folder / f"{number:05d}.safetensors", named)


def _factored(gradient: LayerGradient) -> bool:
    return gradient.rank_one and _factored_size(gradient.block) < gradient.block.numel


def _factored_size(block: Block) -> int:
    return block.groups * (block.d_in + block.d_out)


def _shaped(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))


def _array(values: Tensor, dtype: FactorType) -> np.ndarray:
    if dtype == "int8":
        values = (_LEVELS * values).round()
    found: np.ndarray = values.detach().to(getattr(torch, dtype)).cpu().numpy()
    return found
