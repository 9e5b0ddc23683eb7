"""LoGra: influence functions in the space of a factored projection, with that space's empirical Fisher matrix, layer by layer.

`τ_i(z) = (1/n) Σ_l q_l(z)ᵀ (F_l + λ_l)⁻¹ φ_{i,l}`, with `F_l = mean_i φ_{i,l} φ_{i,l}ᵀ`.

Source: Choe et al. 2024, section 3.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.base import unit_of_damping
from attribution_core.curvature.fisher import observe
from attribution_core.curvature.group import Group
from attribution_core.data.batch import Batch
from attribution_core.errors import SingularCurvatureError
from attribution_core.methods import woodbury
from attribution_core.methods.base import Arrays, Checkpoint, FeatureMethod, QuerySide, TrainRows
from attribution_core.progress import Progress, watched
from attribution_core.projection import FactoredProjection


class Logra(FeatureMethod):
    """One member of the ensemble; the Fisher matrix is known once all rows are."""

    def __init__(self, checkpoint: Checkpoint, projection: FactoredProjection, fisher: Arrays | None) -> None:
        super().__init__(checkpoint)
        self.projection = projection
        self._fisher = fisher

    @property
    def dim(self) -> int:
        """The projection's dimension."""
        return self.projection.dim

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return projected `φ_i`."""
        run, task = self.checkpoint.run(batch), self.checkpoint.task
        observed = observe(run, task, batch, self.checkpoint.measurement, None)
        own, slope = self.projection.project_gradients(observed.measured), observed.slope
        rows = self.projection.project_gradients(observed.training) if slope is None else own * -slope.unsqueeze(1)
        return TrainRows(rows, torch.ones_like(rows[:, 0]), measured=own)

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return projected `∇m_z`."""
        run = self.checkpoint.run(batch)
        measured = self.checkpoint.task.measure(run.output, batch, self.checkpoint.measurement)
        return QuerySide(run.output.detach(), self.projection.project_gradients(run.gradients(measured)))

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Return `(1/n)(F + λ)⁻¹ P ∇m_z`."""
        assert self._fisher is not None
        solved = solve(self._fisher, query.rows.detach().cpu().numpy(), damping) / self.checkpoint.num_examples
        return QuerySide(query.output, torch.from_numpy(solved).to(query.rows))

    def newton_effect(self, queries: Batch, group: Group, damping: float) -> Tensor:
        """Return `qᵀ (nF - Σ_F φφᵀ + nλ)⁻¹ Σ_F φ`, layer by layer, (queries,)."""
        assert self._fisher is not None
        query = self.encode_query(queries).rows
        rows = np.concatenate([self.encode_train(batch).rows.double().cpu().numpy() for batch in group.batches()])
        effect = np.zeros(len(query))
        for part, values, vectors in _layers(self._fisher):
            known = woodbury.Kernel(group.num_examples * values, vectors, damping)
            asked = query[:, part].double().cpu().numpy()
            effect += asked @ known.solve_without([rows[:, part]], rows[:, part].sum(0))
        return torch.from_numpy(effect).to(query)


def fisher_of(
    shards: Iterable[Arrays], projection: FactoredProjection, count: int, progress: Progress
) -> dict[str, np.ndarray]:
    """Return each layer's eigenvalues `values.N` and eigenvectors `vectors.N` of `mean φφᵀ` over `count` training examples.

    Raises:
        Cancelled: if the work should stop; progress is asked before each layer.
    """
    totals: list[np.ndarray | float] = [0.0] * len(projection.slices)
    for shard in shards:
        rows = shard["rows"].astype(np.float64)
        for number, part in enumerate(projection.slices):
            totals[number] = totals[number] + rows[:, part].T @ rows[:, part]
    found: dict[str, np.ndarray] = {}
    for number, total in enumerate(watched(totals, progress)):
        values, vectors = np.linalg.eigh(np.asarray(total) / count)
        found[f"values.{number}"] = values.clip(min=0).astype(np.float32)
        found[f"vectors.{number}"] = vectors.astype(np.float32)
    return found


def solve(fisher: Arrays, rows: np.ndarray, damping: float) -> np.ndarray:
    """Return `(F + λ)⁻¹ row` of each row (count, k), float32; λ a multiple of each layer's mean eigenvalue.

    Raises:
        SingularCurvatureError: if λ is 0 and a layer's matrix is singular.
    """
    solved = np.empty_like(rows, dtype=np.float32)
    for part, values, vectors in _layers(fisher):
        damped = values + damping * unit_of_damping(values.mean())
        if damped.min() <= 0:
            raise SingularCurvatureError("the projected Fisher matrix is singular: use a damping above 0", "/damping")
        solved[:, part] = ((rows[:, part] @ vectors) / damped) @ vectors.T
    return solved


def _layers(fisher: Arrays) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield each layer's place in a row, its eigenvalues (float64) and eigenvectors."""
    start, number = 0, 0
    while f"values.{number}" in fisher:
        values = fisher[f"values.{number}"].astype(np.float64)
        yield slice(start, start + len(values)), values, fisher[f"vectors.{number}"]
        start, number = start + len(values), number + 1
