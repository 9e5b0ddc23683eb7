"""What the passes before the last add up over a training set's pseudo-gradients, and what becomes of it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from attribution_core.arrays import read_arrays
from attribution_core.curvature import CovarianceSums, Eigenbasis, EigenvalueSums
from attribution_core.curvature.covariances import whole_blocks
from attribution_core.curvature.ekfac import kronecker_eigenvalues
from attribution_core.curvature.fisher import ShortfallSums, Tempering
from attribution_core.method_spec import EigenvalueCorrected, GaussNewtonMethod, KfacMethod
from attribution_core.methods.context import FitContext
from attribution_core.methods.fitted import DEFAULT_DAMPING, TEMPERING, TURNED, WHITENED, of_checkpoint
from attribution_core.progress import Progress, watched

Arrays = dict[str, np.ndarray]
Sums = CovarianceSums | EigenvalueSums | ShortfallSums


def empty_sums(context: FitContext, stage: str, number: int, basis: Callable[[int], Eigenbasis]) -> list[Sums]:
    """Return empty sums of all that a stage adds up under one checkpoint; `basis` gives the eigenvectors of an earlier one."""
    own: Sums = _covariances(context, number) if stage == "covariance" else EigenvalueSums(basis(number))
    first = stage == context.spec.method.passes[0]
    return (
        [own, ShortfallSums(context.defaults.residual_power)]
        if first and context.defaults.residual_power != 1
        else [own]
    )


def by_name(sums: Iterable[Sums]) -> Arrays:
    """Return the arrays of several sums together."""
    return {name: value for each in sums for name, value in each.arrays().items()}


def summed(shards: Iterable[Mapping[str, np.ndarray]]) -> Arrays:
    """Return the sums over shards of arrays of the same name."""
    total: Arrays = {}
    for found in shards:
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
    return total


def summed_arrays(files: Iterable[Path]) -> Arrays:
    """Return the same of shards' files."""
    return summed(read_arrays(path) for path in files)


def eigenvectors(context: FitContext, group: tuple[int, ...], sums: Arrays, progress: Progress) -> Arrays:
    """Return what is kept of the summed covariances of checkpoints that share them: eigenvectors, and K-FAC's eigenvalues.

    Raises:
        Cancelled: if the work should stop; progress is asked before each decomposition.
    """
    solved: Arrays = {}
    for name, value in watched(sums.items(), progress):
        solved |= Eigenbasis.solve({name: value})
    if isinstance(context.spec.method, KfacMethod):
        blocks = context.checkpoint(group[0]).capture.blocks
        solved |= kronecker_eigenvalues(blocks, solved, context.spec.num_training * len(group))
    return {name: value for name, value in solved.items() if not name.startswith("spectrum.")}


def defaults(context: FitContext, fitted: Arrays, progress: Progress) -> Arrays:
    """Return what an index keeps of its fit's defaults, once the curvature is known that they follow from: its damping, and what is made at it.

    Raises:
        Cancelled: if the work should stop.
    """
    damping, found = context.defaults.damping(fitted) or 0.0, Arrays()
    for number in range(len(context.spec.members)):
        known = of_checkpoint(fitted, number)
        own = {DEFAULT_DAMPING: np.array([damping], np.float32)}
        if ShortfallSums.NAME in known:
            own |= tempering(context, known[ShortfallSums.NAME])
        if context.turns:
            own[TURNED] = np.ones(1, np.float32)
        if context.whitens:
            own[WHITENED] = own[DEFAULT_DAMPING]
        if isinstance(context.spec.method, GaussNewtonMethod):
            own |= context.curvatures.factorised(number, known, damping, progress)
        found |= {f"{number}.{name}": value for name, value in own.items()}
    return found


def tempering(context: FitContext, shortfalls: np.ndarray) -> Arrays:
    """Return what is kept of the residuals' power and scale, from `ShortfallSums`."""
    found = Tempering.of(context.defaults.residual_power, shortfalls)
    return {TEMPERING: np.array([found.power, found.scale], np.float32)}


def _covariances(context: FitContext, number: int) -> CovarianceSums:
    method, blocks = context.spec.method, context.checkpoint(number).capture.blocks
    if not isinstance(method, EigenvalueCorrected):
        return CovarianceSums(blocks, for_kfac=isinstance(method, KfacMethod))
    whole = whole_blocks(blocks, method.whole_layers, context.spec.num_training)
    return CovarianceSums(blocks, whole=whole, by_example=method.axes == "examples")
