"""TRAK: `τ(z) = [mean_m φ_m(z)ᵀ (Φ_mᵀΦ_m + λ)⁻¹ Φ_mᵀ] ∘ [mean_m (1 - p_m)]`, with `φ = P ∇f` and `f = log p/(1-p)`.

The kernel is a sum over examples, so there is no factor 1/n. With `curvature: gauss_newton` the kernel weights each row by
`p(1-p)`, which is the Hessian of the linearised logistic model and puts scores in units of the measurement; the published
kernel leaves that weight out and so scores come out smaller. Default λ is above 0: with more dimensions than examples the published λ = 0 means nothing.

Source: Park et al. 2023, equations 13-17.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.errors import SingularCurvatureError
from attribution_core.methods.base import Arrays, Checkpoint, FeatureMethod, QuerySide, TrainRows
from attribution_core.projection import Projection


class Trak(FeatureMethod):
    """One member of the ensemble; `kernel` holds the eigendecomposition of `Φᵀ W Φ` once all rows are known."""

    exact_rows = True

    def __init__(self, checkpoint: Checkpoint, projection: Projection, kernel: Arrays | None) -> None:
        super().__init__(checkpoint)
        self.projection = projection
        self._kernel = kernel

    @property
    def dim(self) -> int:
        """The projection's dimension."""
        return self.projection.dim

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return `φ_i` and the weights `1 - p_i`."""
        rows, output = self._features(batch)
        return TrainRows(rows, self.checkpoint.task.residual(output, batch).detach())

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `φ(z)`."""
        rows, output = self._features(batch)
        return QuerySide(output, rows)

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Return `(ΦᵀWΦ + λ)⁻¹ φ(z)`, λ a multiple of the kernel's mean eigenvalue.

        Raises:
            SingularCurvatureError: if λ is 0 and the kernel is singular.
        """
        assert self._kernel is not None
        vectors = torch.from_numpy(self._kernel["vectors"]).to(query.rows)
        values = torch.from_numpy(self._kernel["values"]).to(query.rows)
        damped = values + damping * values.mean()
        if float(damped.min()) <= float(values.max()) * 1e-12:
            raise SingularCurvatureError("TRAK's kernel is singular: use a damping above 0", "/damping")
        return QuerySide(query.output, (query.rows @ vectors / damped) @ vectors.T)

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        run = self.checkpoint.capture.run(batch.forward)
        odds = self.checkpoint.task.log_odds(run.output, batch)
        gradients = [gradient.materialise().flatten(1) for gradient in run.gradients(odds)]
        return self.projection.project(gradients), run.output.detach()

    @staticmethod
    def kernel(rows: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> Arrays:
        """Return eigenvectors and eigenvalues of `Σ φφᵀ`, or of `Σ p(1-p) φφᵀ` for non-empty weights `1 - p`."""
        total = np.zeros((rows[0].shape[1],) * 2)
        for number, part in enumerate(rows):
            block = part.astype(np.float64)
            if weights:
                misfit = weights[number].astype(np.float64)
                block = block * np.sqrt(misfit * (1 - misfit))[:, None]
            total += block.T @ block
        values, vectors = np.linalg.eigh(total)
        return {"values": values.clip(min=0).astype(np.float32), "vectors": vectors.astype(np.float32)}
