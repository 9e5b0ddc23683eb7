"""What the default damping may follow: `python -m benchmarks.damping_laws` fits each workload and prints how far each law is from the best damping.

The LDS are those that `benchmarks.dampings` has measured. A law's constant is chosen on the workloads of three architectures and judged on those of the
fourth, so its mean distance to the best LDS is of workloads that it has not seen.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution_core.arrays import read_arrays
from attribution_core.curvature.ekfac import concentration
from attribution_core.method_spec import METHODS, FisherMethod
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from benchmarks.dampings import DEFAULT, KNOWN, read
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.workloads import Workload, prepare

# Sweeps whose default follows a law, and the method whose eigenvalues it is told by.
_SWEEPS = {"ekfac": "ekfac", "kfac": "kfac", "diagonal": "diagonal", "gauss_newton, shrinkage 0.8": "ekfac"}
_CONSTANTS = 10 ** np.linspace(-6, 2, 161)


@dataclass(frozen=True)
class Known:
    """What a law may use of a fit, and the LDS at each damping.

    Attributes:
        scarcity: attributed parameters per training target (example, or predicted token).
        concentration: of the fitted spectrum.
    """

    architecture: str
    scarcity: float
    concentration: float
    measured: dict[float, float]

    def short_of_best(self, damping: float) -> float:
        """Return by how much the LDS at a damping, interpolated between measured ones, is below the best."""
        dampings = sorted(self.measured)
        each = [self.measured[one] for one in dampings]
        return max(each) - float(np.interp(np.log(damping), np.log(dampings), each))


Law = Callable[[Known], float]
LAWS: dict[str, Law] = {
    "c": lambda known: 1.0,
    "c √r": lambda known: known.scarcity**0.5,
    "c r": lambda known: known.scarcity,
    "c r²": lambda known: known.scarcity**2,
    "c r³": lambda known: known.scarcity**3,
    "c √κ": lambda known: known.concentration**0.5,
    "c κ": lambda known: known.concentration,
    "c κ^1.5": lambda known: known.concentration**1.5,
    "c κ²": lambda known: known.concentration**2,
}


def told(workload: Workload, method: str) -> tuple[float, float]:
    """Fit a workload's first checkpoint and return its parameters per target and the concentration of its spectrum."""
    data = prepare(workload)
    spec = fit_spec(workload, dataset_of(workload, data), 1, method={"type": method}, shard_size=4096)
    inputs = data["train_inputs"]
    targets = len(inputs) * (inputs.shape[1] - 1 if workload.task == "causal_lm" else 1)
    with tempfile.TemporaryDirectory() as folder:
        fit(spec, Path(folder) / "work", Path(folder) / "index", NoProgress())
        parameters = LoadedIndex(Path(folder) / "index", spec).context.checkpoint(0).capture.num_parameters
        fitted = read_arrays(Path(folder) / "index" / FACTORS_FILE)
    found = concentration(value for name, value in fitted.items() if ".eigenvalues." in name)
    return parameters / targets, found


def distances(law: Law, known: list[Known], bound: float) -> tuple[list[float], float]:
    """Return each workload's distance by the constant of the other architectures, and the mean distance by that of all."""

    def mean(constant: float, among: list[Known]) -> float:
        return float(np.mean([one.short_of_best(_bounded(constant * law(one), bound)) for one in among]))

    found = []
    for architecture in sorted({one.architecture for one in known}):
        others = [one for one in known if one.architecture != architecture]
        chosen = min(_CONSTANTS, key=lambda constant: mean(constant, others))
        left = [one for one in known if one.architecture == architecture]
        found += [one.short_of_best(_bounded(chosen * law(one), bound)) for one in left]
    return found, min(mean(constant, known) for constant in _CONSTANTS)


def _bounded(damping: float, bound: float) -> float:
    return min(max(damping, 0.001), bound)


def main() -> None:
    """Print the table of laws for every method that has one."""
    set_up_processor(threads=1)
    of_fit = {(name, kind): told(workload, kind) for name, workload in KNOWN.items() for kind in set(_SWEEPS.values())}
    print("| method | law | mean distance, constant of other architectures | largest | mean, constant of all |")
    print("|---" * 5 + "|")
    for label, kind in _SWEEPS.items():
        method = METHODS[label.split(",")[0]]
        assert issubclass(method, FisherMethod)
        known = []
        for name, workload in KNOWN.items():
            rows = read(workload)[label]["1"]
            measured = {float(damping): row[0] for damping, row in rows.items() if damping != DEFAULT}
            known.append(Known(workload.architecture["name"], *of_fit[name, kind], measured))
        for law, each in LAWS.items():
            found, of_all = distances(each, known, method.max_default)
            print(f"| {label} | {law} | {np.mean(found):.4f} | {max(found):.4f} | {of_all:.4f} |")


if __name__ == "__main__":
    main()
