"""The posterior datamodel on real retrainings: LDS on held-out subsets by the number of single-seed retrainings it is conditioned on.

`python -m benchmarks.posterior --scores FOLDER` reads the committed truth, and prior scores as `benchmarks.ours` writes them
(`FOLDER/WORKLOAD/METHOD/scores-DAMPING.npy`), and prints the tables of `docs/studies/posterior.md`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attribution_core.bank_methods.datamodels import ridge_datamodel
from attribution_core.bank_methods.posterior import fit_posterior
from attribution_core.evaluate.calibration import fit_affine
from attribution_core.evaluate.conformal import coverage, fit_intervals, squared_scores_removed
from attribution_core.evaluate.retrainings import Retrainings
from benchmarks.lds import Truth
from benchmarks.workloads import WORKLOADS

MIXTURE = ("ekfac5/scores-0.1", "ekfac5/scores-1.0", "dot5/scores-default")
SPLITS = 3


def splits(truth: Truth, fitted: int) -> Iterator[tuple[Retrainings, np.ndarray, np.ndarray, np.random.Generator]]:
    """Yield a bank of one seed per subset, its subsets and the held-out ones; the held-out are the same for every size."""
    subsets = len(truth.masks)
    for split in range(SPLITS):
        generator = np.random.default_rng(split)
        order = generator.permutation(subsets)
        held = order[-(subsets // 2 if subsets >= 100 else 10) :]
        yield truth.of(order[:fitted]).single_seed(generator), order[:fitted], held, generator


def lds_row(truth: Truth, priors: list[np.ndarray], fitted: int) -> dict[str, float]:
    """Return each contender's LDS on held-out subsets, mean over splits."""
    rows = []
    for bank, chosen, held, _ in splits(truth, fitted):
        left = Truth(truth.masks[held], truth.values[held])
        contenders = {
            "best prior": max(priors, key=lambda scores: float(truth.correlations(scores).mean())),
            "prior": priors[0],
            "ridge": ridge_datamodel(bank).scores,
            "posterior": fit_posterior(priors[:1], bank).scores,
            "mixture": fit_posterior(priors, bank).scores,
            "all seeds": fit_posterior(priors, truth.of(chosen)).scores,
        }
        rows.append({name: float(left.correlations(scores).mean()) for name, scores in contenders.items()})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def coverage_row(truth: Truth, priors: list[np.ndarray], fitted: int) -> dict[str, list[float]]:
    """Return coverages of held-out retrainings by 90 % intervals, one per split."""
    found: dict[str, list[float]] = {"posterior": [], "posterior, single seed": [], "prior": []}
    for bank, chosen, _, generator in splits(truth, fitted):
        posterior = fit_posterior(priors, bank)
        rest = generator.permutation(np.setdiff1d(np.arange(len(truth.masks)), chosen))
        calibrating, held = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        mean, variance = posterior.outputs(truth.masks)
        # The scale is fitted on subsets that the posterior has seen, whose residuals are too small; the quantile makes up for it.
        for name, realised in (("posterior", "mean"), ("posterior, single seed", "single_seed")):
            fit = fit_intervals(mean, variance, truth, chosen, calibrating, realised=realised)
            found[name].append(coverage(fit, mean, variance, truth, held))
        plain = affine_outputs(priors[0], truth, chosen)
        spread = squared_scores_removed(priors[0], truth.masks)
        fit = fit_intervals(plain, spread, truth, chosen, calibrating)
        found["prior"].append(coverage(fit, plain, spread, truth, held))
    return found


def affine_outputs(scores: np.ndarray, truth: Retrainings, chosen: np.ndarray) -> np.ndarray:
    """Return outputs of all subsets by a prior's scores, calibrated on some: level of the query plus slope times the summed scores."""
    summed = scores.astype(np.float64) @ truth.masks.T
    means = truth.means.T
    center, level = (values[:, chosen].mean(1, keepdims=True) for values in (summed, means))
    line = fit_affine(summed[:, chosen] - center, means[:, chosen] - level)
    return np.asarray(level + line.apply(summed - center))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--workload", nargs="*", default=list(WORKLOADS), choices=WORKLOADS)
    arguments = parser.parse_args()
    for name in arguments.workload:
        truth = Truth.read(WORKLOADS[name].truth)
        priors = [np.load(arguments.scores / name / f"{method}.npy").astype(np.float64) for method in MIXTURE]
        most = 50 if len(truth.masks) >= 100 else 40
        for fitted in (10, 25, most):
            row = lds_row(truth, priors, fitted)
            print(f"| {name} | {fitted} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |", flush=True)
        covered = coverage_row(truth, priors, 25)
        for kind, shares in covered.items():
            print(f"|c {name} | {kind} | " + " | ".join(f"{share:.3f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
