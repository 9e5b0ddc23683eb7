"""The posterior datamodel on real retrainings: LDS by the number of single-seed retrainings it is conditioned on.

`python -m benchmarks.posterior` prints the tables of `docs/studies/posterior.md`. Priors are the scores that `benchmarks.run` left in the cache.

* Without options it conditions on a part of the committed truth and judges on the rest of it.
* `--bank M …` retrains M random halves that are not in the truth and judges on all of the truth.
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import numpy as np

from attribution_core.bank_methods.datamodels import ridge_datamodel
from attribution_core.bank_methods.posterior import condition, fit_posterior, learn
from attribution_core.evaluate.calibration import fit_affine
from attribution_core.evaluate.conformal import coverage, fit_intervals, squared_scores_removed
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.processor import set_up_processor
from benchmarks.lds import Truth
from benchmarks.plan import ENTRIES
from benchmarks.run import folder_of
from benchmarks.workloads import WORKLOADS, Workload, prepare, retrained

# All but the logistic model, whose exact method needs no retraining.
NAMES = [name for name in WORKLOADS if name != "letter-logistic"]
PRIORS = ("gauss_newton", "ekfac", "trak")
SPLITS = 3
_BANK_SEED = 4242
_FIRST_SEED = 300_000
_AT_ONCE = 20


def prior_scores(workload: Workload) -> list[np.ndarray]:
    """Return each prior method's scores (queries, n) with five checkpoints at its default damping.

    Raises:
        FileNotFoundError: if `benchmarks.run` has not measured one of them here.
    """
    folders = [
        folder_of(entry, workload, 5) for name in PRIORS for entry in ENTRIES if entry.is_ours and entry.label == name
    ]
    return [np.load(folder / "scores-default.npy").astype(np.float64) for folder in folders]


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
            "prior": priors[0],
            "ridge": ridge_datamodel(bank).scores,
            "posterior": fit_posterior(priors[:1], bank).scores,
            "mixture": fit_posterior(priors, bank).scores,
            "all seeds": fit_posterior(priors, truth.of(chosen)).scores,
        }
        rows.append({name: float(left.correlations(scores).mean()) for name, scores in contenders.items()})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def bank_rows(workload: Workload, truth: Truth, priors: list[np.ndarray], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Yield, for each number of fresh retrainings, CPU seconds of these and of the posterior, LDS on all of the truth, and slope."""
    data, n = prepare(workload), truth.masks.shape[1]
    generator = np.random.default_rng(_BANK_SEED)
    subsets = [np.sort(generator.permutation(n)[: n // 2]) for _ in range(max(sizes))]
    began = time.process_time()
    values = retrained(workload, data, [(subset, _FIRST_SEED + place) for place, subset in enumerate(subsets)])
    each = (time.process_time() - began) / len(subsets)
    masks = np.zeros((len(subsets), n), bool)
    for number, subset in enumerate(subsets):
        masks[number, subset] = True
    for size in sizes:
        bank = Retrainings(masks[:size], values[:size, None].astype(np.float64))
        began = time.process_time()
        scores = posterior_scores(priors, bank)
        took = time.process_time() - began
        ridge = float(truth.correlations(ridge_datamodel(bank).scores).mean())
        lds = float(truth.correlations(scores).mean())
        numbers = f"{ridge:.3f}", f"{lds:.3f}", f"{truth.slope(scores):.2f}", f"{each * size:.3g}", f"{took:.3g}"
        yield [workload.name, str(size), *numbers]


def posterior_scores(priors: list[np.ndarray], bank: Retrainings) -> np.ndarray:
    """Return the posterior means, (queries, n), conditioning a few queries at a time: each has a matrix of subsets × subsets."""
    learned, found = learn(priors, bank), []
    for start in range(0, bank.values.shape[2], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        evidence = Retrainings(bank.masks, bank.values[:, :, part])
        found.append(condition(learned, [scores[part] for scores in priors], evidence).scores)
    return np.concatenate(found)


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


def _print(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--bank", nargs="*", type=int)
    arguments = parser.parse_args()
    set_up_processor(threads=1)
    for name in arguments.workload:
        workload = WORKLOADS[name]
        truth, priors = Truth.read(workload.truth), prior_scores(workload)
        if arguments.bank:
            for row in bank_rows(workload, truth, priors, arguments.bank):
                _print(row)
            continue
        for fitted in (10, 25, 50 if len(truth.masks) >= 100 else 40):
            found = lds_row(truth, priors, fitted)
            _print([name, str(fitted), *(f"{value:.3f}" for value in found.values())])
        for kind, shares in coverage_row(truth, priors, 25).items():
            _print([name, kind, *(f"{share:.3f}" for share in shares)])


if __name__ == "__main__":
    main()
