"""Banks of retrainings: groups of subsets are trained and stored together, and read as what the queries measure under each.

A group's number decides which subsets it holds, whatever the number of subsets asked for, so that a bank grows by adding groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from attribution_core.arrays import mapped_arrays
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.progress import Progress
from attribution_core.tasks import build_task
from attribution_core.training.network import Network
from attribution_core.training.optimizers import Tensors
from attribution_core.training.spec import Protocol, Semantics, TrainSpec, subset_mask
from attribution_core.training.trainer import Run, Trainer

WEIGHTS, DIVERGED = "weights.", "diverged"
_OUTPUT_BYTES = 64 << 20


def group_runs(protocol: Protocol, n: int, group: int, num_parameters: int, left_out: Sequence[int] = ()) -> list[Run]:
    """Return the runs of one group, subset by subset and within a subset seed by seed."""
    size = protocol.subsets_per_group(num_parameters)
    masks = [subset_mask(protocol, n, subset, left_out) for subset in range(group * size, (group + 1) * size)]
    return [Run(mask, seed) for mask in masks for seed in protocol.training_seeds()]


def train_group(
    trainer: Trainer, protocol: Protocol, group: int, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Train one group and return its arrays for `write_arrays`; the same bytes whoever does it, on one kind of machine.

    Returns:
        `weights.<name>` (subsets, seeds, *shape) float32 and `diverged` (subsets, seeds) uint8.

    Raises:
        Cancelled: from progress.
    """
    n, size = len(trainer.data), trainer.network.num_parameters
    runs = group_runs(protocol, n, group, size, trainer.spec.left_out)
    shape = (-1, protocol.seeds)
    found = train_runs(trainer, runs, protocol.semantics, progress)
    return {name: value.reshape(*shape, *value.shape[1:]) for name, value in found.items()}


def train_runs(
    trainer: Trainer, runs: Sequence[Run], semantics: Semantics, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Train runs and return `weights.<name>` (runs, *shape) float32 and `diverged` (runs,) uint8.

    Raises:
        Cancelled: from progress.
    """
    trained = trainer.train(runs, semantics, progress)
    arrays = {WEIGHTS + name: value.float().cpu().numpy() for name, value in trained.parameters.items()}
    return {**arrays, DIVERGED: trained.diverged.astype(np.uint8)}


class Retrained:
    """Models that were trained together and written as `weights.<name>` and `diverged`, asked for what queries measure under them.

    Args:
        network: what the weights are of.
        files: groups in order; within a group the leading dimensions are those of `diverged`.
    """

    def __init__(self, network: Network, files: Sequence[Path]) -> None:
        self.network, self.files = network, list(files)

    @cached_property
    def diverged(self) -> np.ndarray:
        """Which models' weights are not finite, (models,) bool."""
        return np.concatenate([arrays[DIVERGED].ravel() for arrays in self._groups()]).astype(bool)

    @torch.no_grad()
    def values(self, batch: Batch, measurement: str) -> np.ndarray:
        """Return what a batch of queries measures under each model, (models, queries) float64; NaN where it diverged.

        Raises:
            InvalidInputError: if the queries do not fit the model, or the task has no such measurement.
        """
        self.network.task.check(self.network.probe(batch), batch)
        values = np.concatenate([self._measured(arrays, batch, measurement) for arrays in self._groups()])
        values[self.diverged] = np.nan
        return values

    def _groups(self) -> Iterator[dict[str, np.ndarray]]:
        for path in self.files:
            yield mapped_arrays(path)

    def _measured(self, arrays: Mapping[str, np.ndarray], batch: Batch, measurement: str) -> np.ndarray:
        """Return (models, queries) of one group, as many models at once as their outputs leave room for."""
        lead = arrays[DIVERGED].ndim
        flat = {name: value.reshape(-1, *value.shape[lead:]) for name, value in arrays.items() if name != DIVERGED}
        room = 4 * (batch.inputs.nbytes + self.network.activation_bytes(batch))
        at_once = max(1, _OUTPUT_BYTES // room)
        parts = []
        for start in range(0, arrays[DIVERGED].size, at_once):
            outputs = self.network.outputs(self._loaded(flat, start, start + at_once), batch)
            parts += [self.network.task.measure(output, batch, measurement).double().cpu() for output in outputs]
        return torch.stack(parts).numpy()

    def _loaded(self, flat: Mapping[str, np.ndarray], start: int, stop: int) -> Tensors:
        device = self.network.device
        return {
            name.removeprefix(WEIGHTS): torch.from_numpy(np.array(value[start:stop])).to(device)
            for name, value in flat.items()
        }


class Bank:
    """The retrainings of a protocol.

    Args:
        spec: what was trained.
        protocol: which subsets; files may hold more of them.
        files: one per group, in order.

    Raises:
        InvalidInputError: if there are too few files for the protocol.
    """

    def __init__(self, spec: TrainSpec, protocol: Protocol, files: Sequence[Path], device: str = "cpu") -> None:
        self.spec, self.protocol = spec, protocol
        self.network = Network(spec.architecture, build_task(spec.task), device)
        groups = protocol.num_groups(self.network.num_parameters)
        if len(files) < groups:
            raise InvalidInputError(f"{protocol.subsets} subsets are in {groups} groups, and {len(files)} are there")
        self._retrained = Retrained(self.network, files[:groups])

    @property
    def key(self) -> str:
        """The hash shared by all banks of these retrainings, however many."""
        return self.protocol.bank_key(self.spec)

    @cached_property
    def masks(self) -> np.ndarray:
        """Which examples each subset keeps, (subsets, n) bool; those left out of every training are in none."""
        n, left_out = self.spec.dataset.num_examples, self.spec.left_out
        return np.stack([subset_mask(self.protocol, n, subset, left_out) for subset in range(self.protocol.subsets)])

    @cached_property
    def diverged(self) -> np.ndarray:
        """Which retrainings failed, (subsets, seeds) bool."""
        return self._retrained.diverged.reshape(-1, self.protocol.seeds)[: self.protocol.subsets]

    def values(self, batch: Batch, measurement: str) -> np.ndarray:
        """Return what a batch of queries measures under each retraining, (subsets, seeds, queries) float64; NaN where it diverged.

        Raises:
            InvalidInputError: if the queries do not fit the model, or the task has no such measurement.
        """
        values = self._retrained.values(batch, measurement)
        return values.reshape(-1, self.protocol.seeds, len(batch))[: self.protocol.subsets]
