"""TRAK: `τ(z) = [mean_m φ_m(z)ᵀ (Φ_mᵀΦ_m + λ)⁻¹ Φ_mᵀ] ∘ [mean_m (1 - p_m)]`, with `φ = P ∇f` and `f = log p/(1-p)`.

The training side is always `f`, in which the loss is `log(1 + e^-f)` with slope `-(1 - p)` and curvature `p(1 - p)`; the query side is
the measurement, which is `f` itself for margins, so scores are changes of the measurement.

The kernel is a sum over examples, so there is no factor 1/n. With `curvature: gauss_newton` it weights each row by `p(1-p)`, which is the
Hessian of the linearised logistic model and puts scores in units of the measurement; the published kernel leaves that weight out and its
scores have another scale. For two classes and a projection that loses nothing the weighted kernel gives the exact Newton step; with more
classes `f` shows only one direction of an example's curvature, and scores come out larger than the change (1.6 times in a test with three).
For squared errors `f` is the prediction, the curvature is 1 and both kernels agree.

With `curvature: fisher` the kernel is the projected Gauss-Newton matrix itself, with rows for every class of every example (labels sampled
from the model where there are too many), and that limit is gone.

With a `residual_power` below 1 examples count by a power of `1 - p`, and the kernel stays as it is (docs/decisions/0023-tempered-residuals.md).

λ is a multiple of the kernel's mean eigenvalue and above 0 by default: with more dimensions than examples the published λ = 0 means nothing.

Source: Park et al. 2023, equations 13-17.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.base import unit_of_damping
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import Fisher, ShortfallSums, Tempering
from attribution_core.curvature.group import Group
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.gradients import Pass
from attribution_core.method_spec import TrakMethod
from attribution_core.methods import woodbury
from attribution_core.methods.base import Arrays, Checkpoint, FeatureMethod, QuerySide, TrainRows
from attribution_core.projection import Projection
from attribution_core.spec import RegressionTask, TaskSpec
from attribution_core.tasks.regression import Regression

# Measurements that are the linearised output f, so that training rows serve as their own query side.
_IS_LINEARISED_OUTPUT = ("margin", "prediction")
_SINGULAR = 1e-12


class Trak(FeatureMethod):
    """One member of the ensemble; `kernel` is known once all rows are."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        projection: Projection,
        kernel: Arrays | None,
        spec: TrakMethod,
        tempering: Tempering,
    ) -> None:
        super().__init__(checkpoint)
        self.spec = spec
        self.tempering = tempering
        self.projection = projection
        self._kernel = kernel

    @property
    def dim(self) -> int:
        """The projection's dimension."""
        return self.projection.dim

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return `φ_i` and the weights `1 - p_i`."""
        task, measurement = self.checkpoint.task, self.checkpoint.measurement
        run = self.checkpoint.run(batch)
        weights = task.residual(run.output, batch).detach()
        rows = self._projected(run, task.log_odds(run.output, batch), keep=True)
        if measurement in _IS_LINEARISED_OUTPUT:
            return TrainRows(rows, weights)
        return TrainRows(rows, weights, measured=self._projected(run, task.measure(run.output, batch, measurement)))

    def train_weights(self, batch: Batch) -> Tensor:
        """Return `1 - p_i`, tempered."""
        return self.counted(self.checkpoint.task.residual(self.checkpoint.output(batch), batch))

    def counted(self, weights: Tensor) -> Tensor:
        """Return `1 - p_i`, tempered: the kernel is of residuals as they are, and scores are not."""
        return weights if self.tempering.power == 1 else weights * self.tempering.weights(weights)

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `P ∇m_z`."""
        run = self.checkpoint.run(batch)
        measured = self.checkpoint.task.measure(run.output, batch, self.checkpoint.measurement)
        return QuerySide(run.output.detach(), self._projected(run, measured))

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Return `(ΦᵀWΦ + λ)⁻¹ P ∇m_z`.

        Raises:
            SingularCurvatureError: if λ is 0 and the kernel is singular.
        """
        assert self._kernel is not None
        solved = solve(self._kernel, query.rows.detach().cpu().numpy(), damping)
        return QuerySide(query.output, torch.from_numpy(solved).to(query.rows))

    def newton_effect(self, queries: Batch, group: Group, damping: float) -> Tensor:
        """Return `P∇m (K + λ - K_F)⁻¹ Σ_F w φ`, (queries,), for kernels whose rows are weighted as the loss bends.

        Raises:
            InvalidInputError: if scores have no scale, or are shrunk one by one.
        """
        assert self._kernel is not None
        if self.spec.soft_threshold is not None or (self.spec.curvature == "gradient" and not self._bends_evenly):
            raise InvalidInputError("the published kernel and soft thresholds have no newton estimator", "/estimator")
        encoded = [self.encode_train(batch) for batch in group.batches()]
        rows = np.concatenate([part.rows.double().cpu().numpy() for part in encoded])
        misfits = np.concatenate([part.weights.double().cpu().numpy() for part in encoded])
        kernel = woodbury.Kernel(self._kernel["values"], self._kernel["vectors"], damping)
        leaving = (
            (self._projected_draws(draws) for draws in group.draws())
            if self.spec.curvature == "fisher"
            else [rows if self._bends_evenly else bent(rows, misfits)]
        )
        query = self.encode_query(queries).rows
        solved = kernel.solve_without(leaving, group.weights @ rows)
        return torch.from_numpy(query.double().cpu().numpy() @ solved).to(query)

    @property
    def _bends_evenly(self) -> bool:
        """Whether the loss has curvature 1 in f, as squared errors do."""
        return isinstance(self.checkpoint.task, Regression)

    def _projected_draws(self, draws: Draws) -> np.ndarray:
        projected = [self.projection.project_gradients(draw).double().cpu().numpy() for draw in draws]
        return np.concatenate(projected) if projected else np.zeros((0, self.dim))

    def _projected(self, run: Pass, objective: Tensor, *, keep: bool = False) -> Tensor:
        return self.projection.project_gradients(run.gradients(objective, keep=keep))

    def fisher_sum(self, batch: Batch, fisher: Fisher) -> np.ndarray:
        """Return `Σ P g gᵀ Pᵀ` over a batch's pseudo-gradients, (k, k) float64."""
        draws = fisher.draws(self.checkpoint.run(batch), self.checkpoint.task, batch, self.checkpoint.run)
        rows = self._projected_draws(draws)
        return np.asarray(rows.T @ rows)


def weighs_rows(method: TrakMethod, task: TaskSpec) -> bool:
    """Return whether the kernel weights rows by the loss's curvature in the output; for squared errors that curvature is 1."""
    return method.curvature == "gauss_newton" and not isinstance(task, RegressionTask)


def reduced(
    method: TrakMethod, task: TaskSpec, shards: Iterable[Arrays], misfits: ShortfallSums
) -> dict[str, np.ndarray]:
    """Return the kernel of all shards' rows, unless it has a stage of its own, and count their `1 - p` on the way."""

    def counted() -> Iterator[Arrays]:
        for shard in shards:
            misfits.add_shortfalls(torch.from_numpy(shard["weights"]))
            yield shard

    left = counted()
    found = {} if method.curvature == "fisher" else kernel_of(left, weighted=weighs_rows(method, task))
    for _ in left:
        pass
    return found


def kernel_of(shards: Iterable[Arrays], *, weighted: bool) -> dict[str, np.ndarray]:
    """Return eigenvalues (k,) and eigenvectors (k, k) of `Σ φφᵀ`, or of `Σ p(1-p) φφᵀ`.

    Args:
        shards: arrays `rows` (count, k) and `weights` (count,) with `1 - p`.
        weighted: whether rows are weighted by p(1-p).
    """
    total: np.ndarray | float = 0.0
    for shard in shards:
        rows = kernel_rows(shard, weighted=weighted)
        total = total + rows.T @ rows
    return eigen(np.asarray(total))


def kernel_rows(shard: Arrays, *, weighted: bool) -> np.ndarray:
    """Return a shard's rows (count, k) as they enter the kernel, float64."""
    rows: np.ndarray = shard["rows"].astype(np.float64)
    return bent(rows, shard["weights"].astype(np.float64)) if weighted else rows


def bent(rows: np.ndarray, misfits: np.ndarray) -> np.ndarray:
    """Return rows (count, k) times `√(p(1-p))` for misfits `1 - p` (count,)."""
    return np.asarray(rows * np.sqrt(misfits * (1 - misfits))[:, None])


def eigen(kernel: np.ndarray) -> dict[str, np.ndarray]:
    """Return eigenvalues (k,) and eigenvectors (k, k) of a kernel."""
    values, vectors = np.linalg.eigh(kernel)
    return {"values": values.clip(min=0).astype(np.float32), "vectors": vectors.astype(np.float32)}


def resized(kernel: Arrays, ratio: float) -> dict[str, np.ndarray]:
    """Return the kernel of `ratio` times as many examples of the same kind: it is a sum over them."""
    return {**kernel, "values": kernel["values"] if ratio == 1 else (kernel["values"] * ratio).astype(np.float32)}


def solve(kernel: Arrays, rows: np.ndarray, damping: float) -> np.ndarray:
    """Return `(K + λ)⁻¹ row` of each row (count, k), float32; λ a multiple of K's mean eigenvalue.

    Raises:
        SingularCurvatureError: if λ is 0 and K is singular.
    """
    values, vectors = kernel["values"].astype(np.float64), kernel["vectors"]
    damped = values + damping * unit_of_damping(values.mean())
    if damped.min() <= _SINGULAR * values.max():
        raise SingularCurvatureError("TRAK's kernel is singular: use a damping above 0", "/damping")
    solved: np.ndarray = (((rows @ vectors) / damped) @ vectors.T).astype(np.float32)
    return solved
