"""The posterior datamodel: any methods' scores as prior, real retrainings as evidence, the posterior as scores with intervals.

1. Model, for each query z and subset j, in contrasts that leave the intercept out (`contrasts.py`):
   `f̃_z = X̃ β_z + ε̃_z`, `β_z = Σ_k w_k τ_z^(k) + δ_z`, `δ_z ~ N(0, D_z)`.
2. Prior variance (`effect_prior.py`): `D_z = c_own v_z diag|τ_z| / a_z + c_shared v_z Gᵀ diag(h_z) G / b_z`, where a_z and b_z make the mean variance that
   each part gives to a contrast 1, and v_z is the variance that the prior mean leaves unexplained.
3. Noise: `ε̃_z ~ N(0, v_z σ² I + s_z² I + v_z c_run Σ_p l_{zp} u_p u_pᵀ)`. s_z² is the variance between seeds, where a subset has several. With one seed
   each, u_p are the leading run factors: a retraining that happens to be worse is worse on many queries at once, which no attribution explains.
4. `w`, `c_own`, `c_shared`, `c_run` and `σ²` by marginal likelihood pooled over queries (`variance_components.py`).
5. Posterior, in its dual form (m × m for each query): `M_z = X̃ D_z X̃ᵀ + Cov(ε̃_z)`,
   `E[β_z] = Σ_k w_k τ^(k) + D_z X̃ᵀ M_z⁻¹ (f̃_z − X̃ Σ_k w_k τ^(k))`, `Cov(β_z) = D_z − D_z X̃ᵀ M_z⁻¹ X̃ D_z`.

Scores are in units of the measurement: prior scores of any scale are brought to it by w.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attribution_core.bank_methods.contrasts import Contrasts
from attribution_core.bank_methods.effect_prior import EffectPrior
from attribution_core.bank_methods.variance_components import Components, Problem, generalised_least_squares, maximise
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.result import Result
from attribution_core.evaluate.retrainings import Retrainings

RUN_FACTORS = 2
_EXPLAINED = 1e-10
_STARTS = {"noise": 0.6, "own": 0.2, "shared": 0.1, "run": 0.5}


@dataclass(frozen=True)
class Hyperparameters(Result):
    """What the marginal likelihood chose.

    Attributes:
        weights: w, one for each prior method.
        noise: σ², own noise and misfit, in units of v_z.
        own: c_own, in units of v_z.
        shared: c_shared, in units of v_z.
        run: c_run; None where seeds tell the noise.
        log_likelihood: mean over queries and contrasts.
        subsets: subsets conditioned on.
        trainings: finished retrainings in them.
    """

    weights: tuple[float, ...]
    noise: float
    own: float
    shared: float
    run: float | None
    log_likelihood: float
    subsets: int
    trainings: int


@dataclass(frozen=True)
class PosteriorDatamodel:
    """A posterior over the effects of every training example on every query.

    Attributes:
        scores: posterior mean, (queries, n), in units of the measurement.
        prior_mean: Σ w τ, (queries, n).
        prior: D, before retraining.
        noise: variance of one retraining around its expected output, (queries,).
        hyperparameters: as chosen.
        contrasts: the evidence.
        inverses: M⁻¹, (queries, m − 1, m − 1).
    """

    scores: np.ndarray
    prior_mean: np.ndarray
    prior: EffectPrior
    noise: np.ndarray
    hyperparameters: Hyperparameters
    contrasts: Contrasts
    inverses: np.ndarray

    def covariance(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the posterior covariance of sums of effects `L β_z` and `R β_z`, L (a, n), R (b, n): (queries, a, b)."""
        design = self.contrasts.design
        known_left, known_right = self.prior.between(left, design), self.prior.between(right, design)
        explained = known_left @ self.inverses @ known_right.swapaxes(1, 2)
        return np.asarray(self.prior.between(left, right) - explained)

    def variances(self, contrasts: np.ndarray) -> np.ndarray:
        """Return the posterior variances of sums of effects, rows of (a, n): (queries, a)."""
        known = self.prior.between(contrasts, self.contrasts.design)  # (queries, a, m - 1)
        explained = ((known @ self.inverses) * known).sum(2)
        return np.asarray((self.prior.variances(contrasts) - explained).clip(min=0))

    def changes(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of `f(S_j) − f(S)`, both (queries, subsets), for masks (subsets, n) of what is kept.

        The variance is that of the expected change; one retraining adds `noise`.
        """
        removed = (~masks).astype(np.float64)
        return -self.scores @ removed.T, self.variances(removed)

    def outputs(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the expected output `f(S_j)`, both (queries, subsets), anchored at the bank's mean."""
        moved = masks - self.contrasts.center
        anchor = self.noise / self.contrasts.trainings
        return self.contrasts.level[:, None] + self.scores @ moved.T, self.variances(moved) + anchor[:, None]


def fit_posterior(
    methods: Sequence[np.ndarray], retrainings: Retrainings, *, run_factors: int = RUN_FACTORS
) -> PosteriorDatamodel:
    """Condition methods' scores on retrainings.

    Args:
        methods: scores of each prior method, (queries, n); one or more, of any scale.
        retrainings: the evidence; diverged ones are left out.
        run_factors: how many directions of noise common to queries are allowed for, where no subset has two seeds.

    Raises:
        InvalidInputError: if shapes disagree, scores are not finite, fewer than three subsets finished, or no measurement varies.
    """
    stacked = [np.asarray(scores, np.float64) for scores in methods]
    _check(stacked, retrainings)
    evidence = Contrasts.of(retrainings)
    if np.abs(evidence.targets).max() <= 1e-12 * np.abs(evidence.level).max():
        raise InvalidInputError("no measurement differs between subsets: there is nothing to condition on")
    seen = np.stack([scores @ evidence.design.T for scores in stacked], axis=-1)  # (queries, m - 1, methods)
    weights = _least_squares(seen, evidence.targets)
    residuals = evidence.targets - seen @ weights
    spread = (residuals**2).mean(1)
    spread = spread.clip(min=_EXPLAINED * float((evidence.targets**2).mean()))  # v, (queries,)
    own, shared = _prior_shapes(stacked, weights, evidence.design, spread)
    between_seeds = retrainings.usable.seed_variance()
    shapes = {
        "own": own.between(evidence.design, evidence.design),
        "shared": shared.between(evidence.design, evidence.design),
        "noise": np.eye(residuals.shape[1]) * spread[:, None, None],
    }
    if between_seeds is None and run_factors > 0:
        shapes["run"] = _run_noise(residuals, spread, run_factors)
    known = np.zeros(len(spread)) if between_seeds is None else between_seeds
    problem = Problem(list(shapes.values()), evidence.targets, seen, known)
    found = maximise(np.array([_STARTS[name] for name in shapes]), problem)
    return _conditioned(stacked, evidence, (own, shared), found, shapes, known)


def _conditioned(
    methods: list[np.ndarray],
    evidence: Contrasts,
    parts: tuple[EffectPrior, EffectPrior],
    found: Components,
    shapes: dict[str, np.ndarray],
    known: np.ndarray,
) -> PosteriorDatamodel:
    chosen = dict(zip(shapes, found.variances.tolist(), strict=True))
    own, shared = parts
    prior = own.scaled(np.full(len(known), chosen["own"])).plus(shared.scaled(np.full(len(known), chosen["shared"])))
    mean = np.tensordot(found.weights, np.stack(methods), axes=1)
    unknown = [chosen[name] * np.trace(shapes[name], axis1=1, axis2=2) for name in ("noise", "run") if name in shapes]
    noise = known + np.sum(unknown, axis=0) / evidence.targets.shape[1]
    hyperparameters = Hyperparameters(
        weights=tuple(found.weights.tolist()),
        noise=chosen["noise"],
        own=chosen["own"],
        shared=chosen["shared"],
        run=chosen.get("run"),
        log_likelihood=found.log_likelihood / evidence.targets.size,
        subsets=len(evidence.design) + 1,
        trainings=evidence.trainings,
    )
    scores = mean + prior.apply(found.alphas @ evidence.design)
    return PosteriorDatamodel(scores, mean, prior, noise, hyperparameters, evidence, found.inverses)


def _check(methods: list[np.ndarray], retrainings: Retrainings) -> None:
    expected = (retrainings.values.shape[2], retrainings.masks.shape[1])
    if not methods:
        raise InvalidInputError("a posterior needs the scores of at least one method as its prior")
    if any(scores.shape != expected for scores in methods):
        raise InvalidInputError(f"prior scores must be (queries, n) = {expected}, like the retrainings")
    if not all(np.isfinite(scores).all() for scores in methods):
        raise InvalidInputError("prior scores must be finite")
    if len(retrainings.usable.masks) < 3:
        raise InvalidInputError("a posterior needs at least three subsets with a finished retraining")


def _least_squares(seen: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return w by least squares with each query weighed by its spread, before any variance is known."""
    spread = (targets**2).mean(1)
    precision = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    unit = np.broadcast_to(np.eye(targets.shape[1]), (len(targets), targets.shape[1], targets.shape[1]))
    return generalised_least_squares(seen, unit * precision[:, None, None], targets)


def _prior_shapes(
    methods: list[np.ndarray], weights: np.ndarray, design: np.ndarray, spread: np.ndarray
) -> tuple[EffectPrior, EffectPrior]:
    """Return both parts of D, scaled so that a contrast's mean prior variance is each query's spread."""
    magnitudes = sum(abs(weight) * np.abs(scores) for weight, scores in zip(weights, methods, strict=True))
    mean = sum(weight * scores for weight, scores in zip(weights, methods, strict=True))
    parts = []
    for part in (EffectPrior.of_magnitudes(np.asarray(magnitudes)), EffectPrior.of_neighbours(np.asarray(mean))):
        size = part.variances(design).mean(1)
        parts.append(part.scaled(np.divide(spread, size, out=np.zeros_like(size), where=size > 0)))
    return parts[0], parts[1]


def _run_noise(residuals: np.ndarray, spread: np.ndarray, factors: int) -> np.ndarray:
    """Return `Σ_p l_{zp} u_p u_pᵀ`, (queries, m − 1, m − 1), from what standardised residuals have in common: l is the squared loading."""
    standardised = residuals / np.sqrt(spread)[:, None]
    _, _, directions = np.linalg.svd(standardised, full_matrices=False)
    leading = directions[:factors]  # u, (factors, m - 1)
    loadings = (residuals @ leading.T) ** 2  # (queries, factors)
    return np.asarray((leading.T[None] * loadings[:, None]) @ leading)
