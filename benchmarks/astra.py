"""Stochastic iterations preconditioned by EK-FAC (ASTRA) beside conjugate gradients: `python -m benchmarks.astra` prints the table of decision 0017.

Both solve `((1 − ρ) H + ρ K + λ) x = ∇m` for the same queries in K's eigenbasis. Products are counted in passes over the training set, errors are in the
norm of the matrix, `‖x − x*‖/‖x*‖`, median over queries. ASTRA steps by `x ← x − η (K + λ)⁻¹ (A_B x − ∇m)`, `A_B` with the H of a random batch B, from
EK-FAC's solution, with constant or falling η; of all that are tried the best is shown, chosen with x* known.

Source: Wang et al. 2025, Better Training Data Attribution via Better Inverse Hessian-Vector Products, algorithm 1.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature import EkfacFactors
from attribution_core.curvature.fisher import Fisher
from attribution_core.curvature.solvers import conjugate_gradients
from attribution_core.curvature.vectors import flattened
from attribution_core.gradients import LayerGradient
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare

WORKLOAD, LAYERS = "mnist-mlp", ["hidden_1", "output"]
BATCH, QUERIES = 50, 10
PASSES = (1, 2, 4, 8)
STEPS = (0.01, 0.03, 0.1, 0.3)
SHRINKAGE, DAMPING = 0.8, 0.1


@dataclass(frozen=True)
class System:
    """`(1 − ρ) H + ρ K + λ` in K's eigenbasis.

    Attributes:
        batches: pseudo-gradients of equally many examples each, (rows, P).
        share: 1 − ρ.
        diagonal: all but H, (P,).
        preconditioner: `K + λ`, (P,).
    """

    batches: Sequence[Tensor]
    share: float
    diagonal: Tensor
    preconditioner: Tensor

    def of_batch(self, number: int, vectors: Tensor) -> Tensor:
        """Multiply (queries, P) by the matrix with one batch's H."""
        rows = self.batches[number]
        return self.share * (vectors @ rows.T) @ rows / BATCH + self.diagonal * vectors

    def product(self, vectors: Tensor) -> Tensor:
        """Multiply by the matrix."""
        return torch.stack([self.of_batch(number, vectors) for number in range(len(self.batches))]).mean(0)

    def conjugate_gradients(self, vectors: Tensor, passes: int, tolerance: float = 1e-12) -> Tensor:
        """Return the solution after so many passes."""
        return conjugate_gradients(self.product, vectors, lambda part: part / self.preconditioner, passes, tolerance)

    def astra(self, vectors: Tensor, passes: int, step: float, *, falling: bool) -> Tensor:
        """Return the solution after so many passes."""
        generator = np.random.default_rng(0)
        solution, total = vectors / self.preconditioner, passes * len(self.batches)
        for count in range(total):
            number = int(generator.integers(len(self.batches)))
            rate = step * (1 - count / total) if falling else step
            solution = solution - rate * (self.of_batch(number, solution) - vectors) / self.preconditioner
        return solution


def errors(system: System, vectors: Tensor) -> Iterator[tuple[int, float, float, str]]:
    """Yield passes, the error of conjugate gradients, that of the best ASTRA, and which one that was; for 0 passes, that of K."""
    exact = system.conjugate_gradients(vectors, 1000, 1e-6)
    size = (exact * system.product(exact)).sum(1)

    def error(found: Tensor) -> float:
        off = found - exact
        value = float(((off * system.product(off)).sum(1) / size).clamp(min=0).sqrt().median())
        return value if np.isfinite(value) else np.inf

    yield 0, error(vectors / system.preconditioner), error(vectors / system.preconditioner), "EK-FAC"
    for passes in PASSES:
        tried = {
            f"η = {step:g}{', falling' if falling else ''}": error(system.astra(vectors, passes, step, falling=falling))
            for step in STEPS
            for falling in (False, True)
        }
        best = min(tried, key=lambda name: tried[name])
        yield passes, error(system.conjugate_gradients(vectors, passes)), tried[best], best


def system_of(workload: Workload) -> tuple[System, Tensor]:
    """Return a workload's system, and queries' right-hand sides."""
    data, method = prepare(workload), {"type": "gauss_newton", "fisher": "exact"}
    spec = fit_spec(workload, dataset_of(workload, data), 1, method=method, layers=LAYERS, shard_size=4096)
    with tempfile.TemporaryDirectory() as folder:
        fit(spec, Path(folder) / "work", Path(folder) / "index", NoProgress())
        index = LoadedIndex(Path(folder) / "index", spec)
    (member,) = index.members
    assert isinstance(member, GradientMethod)
    factors: EkfacFactors = member.curvature._factors  # type: ignore[attr-defined]

    def turned(gradients: Sequence[LayerGradient]) -> Tensor:
        return flattened([turn.of(part) for part, turn in zip(gradients, factors.basis.rotations, strict=True)])

    order = np.random.default_rng(0).permutation(index.num_examples).reshape(-1, BATCH)
    draw, exact = index.context.pseudo_gradients.draws, Fisher("exact", 1, 0)
    batches = [torch.cat([turned(part) for draws in draw(0, exact, np.sort(rows)) for part in draws]) for rows in order]
    vectors = turned(member.encode_query(batch_of(data, "query")[torch.arange(QUERIES)]).measured)
    damped = flattened([factors.damped(n, DAMPING).unsqueeze(0) for n in range(len(factors.eigenvalues))])[0]
    kept = flattened([part.unsqueeze(0) for part in factors.eigenvalues])[0]
    system = System(batches, 1 - SHRINKAGE, damped - (1 - SHRINKAGE) * kept, damped)
    return system, vectors / vectors.norm(dim=1, keepdim=True)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for passes, ours, theirs, which in errors(*system_of(WORKLOADS[WORKLOAD])):
        print(f"| {passes} | {ours:.2g} | {theirs:.2g} ({which}) |", flush=True)


if __name__ == "__main__":
    main()
