"""The posterior datamodel: any methods' scores as prior, real retrainings as evidence, the posterior as scores with intervals.

1. Model, for each query z and subset j, in contrasts that leave the intercept out (`contrasts.py`):
   `f̃_z = X̃ β_z + ε̃_z`, `β_z = Σ_k w_k τ_z^(k) + δ_z`, `δ_z ~ N(0, D_z)`.
2. Prior variance (`effect_prior.py`): `D_z = c_own v_z diag|τ_z| / a_z + c_shared v_z Gᵀ diag(h_z) G / b_z`, where a_z and b_z make the mean variance that
   each part gives to a contrast 1, and v_z is the variance that the prior mean leaves unexplained.
3. Noise: `ε̃_z ~ N(0, v_z σ² I + s_z² I + v_z c_run Σ_p l_{zp} u_p u_pᵀ)`. s_z² is the variance between seeds, where a subset has several. With one seed
   each, u_p are the leading run factors: a retraining that happens to be worse is worse on many queries at once, which no attribution explains.
4. `w`, `c_own`, `c_shared`, `c_run` and `σ²` by marginal likelihood pooled over queries (`variance_components.py`). A climb's cost grows with the cube of
   the retrainings, and a handful of numbers needs only thousands of measurements: where there are more, a part of queries and subsets is enough.
5. Posterior, in its dual form (m × m for each query): `M_z = X̃ D_z X̃ᵀ + Cov(ε̃_z)`,
   `E[β_z] = Σ_k w_k τ^(k) + D_z X̃ᵀ M_z⁻¹ (f̃_z − X̃ Σ_k w_k τ^(k))`, `Cov(β_z) = D_z − D_z X̃ᵀ M_z⁻¹ X̃ D_z`.

Scores are in units of the measurement: prior scores of any scale are brought to it by w.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attribution_core.bank_methods.contrasts import Contrasts
from attribution_core.bank_methods.effect_prior import EffectPrior, unit_rows
from attribution_core.bank_methods.variance_components import Problem, generalised_least_squares, maximise
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.result import Result
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.sampling import evenly_spread

RUN_FACTORS = 2
# Of how many subsets, and of how many measurements (subsets × queries), hyper-parameters are learnt at most.
LEARNED_SUBSETS = 200
LEARNED_VALUES = 10_000
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

    def of(self, queries: slice) -> "PosteriorDatamodel":
        """Return the posterior of some of the queries."""
        prior = EffectPrior(self.prior.own[queries], self.prior.directions, self.prior.shared[queries])
        evidence = replace(self.contrasts, targets=self.contrasts.targets[queries], level=self.contrasts.level[queries])
        return PosteriorDatamodel(
            self.scores[queries],
            self.prior_mean[queries],
            prior,
            self.noise[queries],
            self.hyperparameters,
            evidence,
            self.inverses[queries],
        )

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


@dataclass(frozen=True)
class Learned:
    """What a pool of queries taught, by which any other query is conditioned on the same retrainings.

    Attributes:
        hyperparameters: as chosen.
        start: the methods' weights by least squares, by which both parts of D are shaped.
        floor: least v_z, in units of the measurement squared.
        directions: Σ w τ of every query of the pool, of unit norm, (pool, n).
        run: the leading run factors u_p, (factors, m − 1); None where seeds tell the noise.
    """

    hyperparameters: Hyperparameters
    start: tuple[float, ...]
    floor: float
    directions: np.ndarray
    run: np.ndarray | None


def fit_posterior(
    methods: Sequence[np.ndarray], retrainings: Retrainings, *, run_factors: int = RUN_FACTORS
) -> PosteriorDatamodel:
    """Condition methods' scores on retrainings, the queries being their own pool; see `learn` and `condition`."""
    return condition(learn(methods, retrainings, run_factors=run_factors), methods, retrainings)


def learn(methods: Sequence[np.ndarray], retrainings: Retrainings, *, run_factors: int = RUN_FACTORS) -> Learned:
    """Choose the hyper-parameters by the marginal likelihood pooled over queries.

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
    start = _least_squares(_seen(stacked, evidence), evidence.targets)
    floor = _EXPLAINED * float((evidence.targets**2).mean())
    directions = unit_rows(np.tensordot(start, np.stack(stacked), axes=1))
    some, few = _spread_out(stacked, retrainings)
    sample = Contrasts.of(few)
    run, run_sample = None, None
    if retrainings.usable.seed_variance() is None and run_factors > 0:
        run = _run_directions(*_residuals(stacked, evidence, start, floor), run_factors)
        run_sample = _run_directions(*_residuals(some, sample, start, floor), run_factors)
    given = _Given.of(some, few, sample, start, floor, directions, run_sample)
    shapes = given.shapes()
    problem = Problem(list(shapes.values()), sample.targets, _seen(some, sample), given.known)
    found = maximise(np.array([_STARTS[name] for name in shapes]), problem)
    chosen = dict(zip(shapes, found.variances.tolist(), strict=True))
    hyperparameters = Hyperparameters(
        weights=tuple(found.weights.tolist()),
        noise=chosen["noise"],
        own=chosen["own"],
        shared=chosen["shared"],
        run=chosen.get("run"),
        log_likelihood=found.log_likelihood / sample.targets.size,
        subsets=len(evidence.design) + 1,
        trainings=evidence.trainings,
    )
    return Learned(hyperparameters, tuple(start.tolist()), floor, directions, run)


def condition(learned: Learned, methods: Sequence[np.ndarray], retrainings: Retrainings) -> PosteriorDatamodel:
    """Condition methods' scores on the retrainings that hyper-parameters were learned from.

    A query's posterior does not depend on the queries beside it. One of the pool gets what the pool's own fit gives it.

    Args:
        learned: from a pool of queries.
        methods: scores of each prior method, (queries, n), on the scales they had for the pool.
        retrainings: the same ones, as these queries measure them.

    Raises:
        InvalidInputError: if shapes disagree, scores are not finite, or other retrainings finished.
    """
    stacked = [np.asarray(scores, np.float64) for scores in methods]
    _check(stacked, retrainings)
    evidence, chosen = Contrasts.of(retrainings), learned.hyperparameters
    if (len(evidence.design) + 1, evidence.trainings) != (chosen.subsets, chosen.trainings):
        raise InvalidInputError("a query has no finite measurement under some of the retrainings conditioned on")
    start, weights = np.array(learned.start), np.array(chosen.weights)
    given = _Given.of(stacked, retrainings, evidence, start, learned.floor, learned.directions, learned.run)
    prior = given.prior(chosen)
    inverses = np.linalg.inv(given.covariance(chosen))
    unexplained = evidence.targets - _seen(stacked, evidence) @ weights
    alphas = (inverses @ unexplained[:, :, None])[:, :, 0]
    mean = np.tensordot(weights, np.stack(stacked), axes=1)
    scores = mean + prior.apply(alphas @ evidence.design)
    return PosteriorDatamodel(scores, mean, prior, given.noise(chosen), chosen, evidence, inverses)


@dataclass(frozen=True)
class _Given:
    """What queries' contrasts vary by.

    Attributes:
        design: X̃, (m − 1, n).
        own: each query's own part of D, of unit size.
        shared: the part that queries share.
        spread: v, (queries,).
        known: s², the variance between seeds, (queries,); 0 where it is not known.
        run: u, (factors, m − 1); None where seeds tell the noise.
        loadings: l, (queries, factors).
    """

    design: np.ndarray
    own: EffectPrior
    shared: EffectPrior
    spread: np.ndarray
    known: np.ndarray
    run: np.ndarray | None
    loadings: np.ndarray

    @classmethod
    def of(
        cls,
        methods: list[np.ndarray],
        retrainings: Retrainings,
        evidence: Contrasts,
        start: np.ndarray,
        floor: float,
        directions: np.ndarray,
        run: np.ndarray | None,
    ) -> "_Given":
        residuals, spread = _residuals(methods, evidence, start, floor)
        own, shared = _prior_shapes(methods, start, evidence.design, spread, directions)
        between_seeds = retrainings.usable.seed_variance()
        known = np.zeros(len(spread)) if between_seeds is None else between_seeds
        loadings = np.zeros((len(spread), 0)) if run is None else (residuals @ run.T) ** 2
        return cls(evidence.design, own, shared, spread, known, run, loadings)

    def shapes(self) -> dict[str, np.ndarray]:
        """Return what each variance multiplies, (queries, m − 1, m − 1)."""
        size = len(self.design)
        found = {
            "own": self.own.between(self.design, self.design),
            "shared": self.shared.between(self.design, self.design),
            "noise": np.eye(size) * self.spread[:, None, None],
        }
        if self.run is not None:
            found["run"] = self._common_noise(self.run, 1.0)
        return found

    def prior(self, chosen: Hyperparameters) -> EffectPrior:
        """Return D."""
        ones = np.ones(len(self.spread))
        return self.own.scaled(chosen.own * ones).plus(self.shared.scaled(chosen.shared * ones))

    def covariance(self, chosen: Hyperparameters) -> np.ndarray:
        """Return M, (queries, m − 1, m − 1), without a copy of its parts."""
        total = self.prior(chosen).between(self.design, self.design)
        places = np.arange(len(self.design))
        total[:, places, places] += (self.known + chosen.noise * self.spread)[:, None]
        if self.run is not None and chosen.run is not None:
            total += self._common_noise(self.run, chosen.run)
        return total

    def noise(self, chosen: Hyperparameters) -> np.ndarray:
        """Return the variance of one retraining around its expected output, (queries,)."""
        common = (chosen.run or 0.0) * self.loadings.sum(1) / len(self.design)
        return np.asarray(self.known + chosen.noise * self.spread + common)

    def _common_noise(self, run: np.ndarray, variance: float) -> np.ndarray:
        """Return `c_run Σ_p l_{zp} u_p u_pᵀ`, (queries, m − 1, m − 1)."""
        return np.asarray((run.T[None] * (variance * self.loadings)[:, None]) @ run)


def _spread_out(methods: list[np.ndarray], retrainings: Retrainings) -> tuple[list[np.ndarray], Retrainings]:
    """Return scores and retrainings of evenly spread queries and subsets, no more than a handful of numbers is learnt from."""
    bank = retrainings.usable
    subsets = evenly_spread(len(bank.masks), LEARNED_SUBSETS)
    queries = evenly_spread(bank.values.shape[2], LEARNED_VALUES // len(subsets))
    values = np.where(bank.finished[:, :, None], bank.values, np.nan)[subsets][:, :, queries]
    return [scores[queries] for scores in methods], Retrainings(bank.masks[subsets], values)


def _seen(methods: list[np.ndarray], evidence: Contrasts) -> np.ndarray:
    """Return what each method predicts of the contrasts, (queries, m − 1, methods)."""
    return np.stack([scores @ evidence.design.T for scores in methods], axis=-1)


def _residuals(
    methods: list[np.ndarray], evidence: Contrasts, start: np.ndarray, floor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return what least squares leaves of the contrasts, (queries, m − 1), and its variance v, (queries,)."""
    residuals = evidence.targets - _seen(methods, evidence) @ start
    return residuals, (residuals**2).mean(1).clip(min=floor)


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
    methods: list[np.ndarray], weights: np.ndarray, design: np.ndarray, spread: np.ndarray, directions: np.ndarray
) -> tuple[EffectPrior, EffectPrior]:
    """Return both parts of D, scaled so that a contrast's mean prior variance is each query's spread."""
    magnitudes = sum(abs(weight) * np.abs(scores) for weight, scores in zip(weights, methods, strict=True))
    mean = sum(weight * scores for weight, scores in zip(weights, methods, strict=True))
    parts = []
    for part in (
        EffectPrior.of_magnitudes(np.asarray(magnitudes)),
        EffectPrior.of_neighbours(np.asarray(mean), directions),
    ):
        size = part.variances(design).mean(1)
        parts.append(part.scaled(np.divide(spread, size, out=np.zeros_like(size), where=size > 0)))
    return parts[0], parts[1]


def _run_directions(residuals: np.ndarray, spread: np.ndarray, factors: int) -> np.ndarray:
    """Return what standardised residuals of queries have in common, u (factors, m − 1)."""
    _, _, directions = np.linalg.svd(residuals / np.sqrt(spread)[:, None], full_matrices=False)
    return np.asarray(directions[:factors])
