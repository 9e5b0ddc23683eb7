"""What `make bench` measures: our methods and every peer's, with the dampings that each is tried at."""

from dataclasses import dataclass, field
from typing import Any

Damping = float | None


@dataclass(frozen=True)
class Entry:
    """One method of one library.

    Attributes:
        module: what is run; modules of peers run in the peers' environment.
        dampings: the first, the method's own default, is what is timed; the best of all is reported beside it.
        workloads: where it can run; everywhere if empty.
        checkpoints: numbers of checkpoints it is run with.
    """

    peer: str
    label: str
    module: str
    method: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] | None = None
    dampings: tuple[Damping, ...] = (None,)
    workloads: tuple[str, ...] = ()
    checkpoints: tuple[int, ...] = (1, 5)

    @property
    def is_ours(self) -> bool:
        """Whether this is Headwater."""
        return self.peer == "headwater"


def _ours(label: str, method: dict[str, Any], dampings: tuple[Damping, ...] = (None,), **more: Any) -> Entry:
    return Entry("headwater", label, "benchmarks.ours", method, dampings=dampings, **more)


_GRID: tuple[Damping, ...] = (None, 0.001, 0.01, 0.03, 0.3, 1.0, 3.0, 10.0)
_SOLVE_GRID: tuple[Damping, ...] = (None, 0.01, 1.0, 10.0)
_TRAK_GRID: tuple[Damping, ...] = (None, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
# Those of peers go on past their best on every workload, on both sides, or to where nothing changes any more; the defaults are 1e-8 for kronfluence,
# 0 for both TRAKs and dattri's EK-FAC, 1e-5 for LoGra.
_KRONFLUENCE = (None, -1.0, 1e-10, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_TRAKER = (None, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
_DATTRI_TRAK = (None, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
_DATTRI_LOGRA = (None, 1e-2, 1e-1, 1.0, 3.0, 10.0, 100.0)
_DATTRI_EKFAC = (None, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ARNOLDI = (None, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TRAINED: dict[str, Any] = {"training": {}}
_NOT_LOGISTIC = ("mnist-mlp", "fashion-mlp", "mnist-cnn", "fashion-cnn", "austen-lm")

ENTRIES: tuple[Entry, ...] = (
    _ours("ekfac", {"type": "ekfac"}, _GRID),
    _ours("ekfac, one sampled label", {"type": "ekfac", "fisher": "sampled"}, _GRID),
    _ours("gauss_newton", {"type": "gauss_newton"}, _SOLVE_GRID),
    _ours("ekfac, 9 copies", {"type": "ekfac", "perturbation": {"copies": 9}}),
    _ours("gauss_newton, 9 copies", {"type": "gauss_newton", "perturbation": {"copies": 9}}, checkpoints=(1,)),
    _ours("gauss_newton, 4 copies", {"type": "gauss_newton", "perturbation": {"copies": 4}}, checkpoints=(5,)),
    _ours("ekfac, 9 trained copies", {"type": "ekfac", "perturbation": {"copies": 9, **_TRAINED}}, (None, 0.01, 1.0), checkpoints=(1,)),
    _ours("gauss_newton, 9 trained copies", {"type": "gauss_newton", "perturbation": {"copies": 9, **_TRAINED}}, checkpoints=(1,)),
    _ours("gauss_newton, 4 trained copies", {"type": "gauss_newton", "perturbation": {"copies": 4, **_TRAINED}}, checkpoints=(5,)),
    _ours("trak, kernel of all classes", {"type": "trak", "curvature": "fisher", "projection": {"dim": 2048}}, _TRAK_GRID),
    _ours("trak", {"type": "trak", "projection": {"dim": 2048}}, _TRAK_GRID),
    _ours("logra", {"type": "logra", "projection": {"type": "factored", "dim": 2048}}, _TRAK_GRID),
    _ours("grad_dot", {"type": "grad_dot"}),
    _ours("representation", {"type": "representation"}, workloads=_NOT_LOGISTIC),
    _ours("exact", {"type": "exact", "l2": 1e-3}, workloads=("letter-logistic",), checkpoints=(1,)),
    Entry("kronfluence", "EK-FAC", "benchmarks.peers.kronfluence_", dampings=_KRONFLUENCE),
    Entry("traker", "TRAK", "benchmarks.peers.traker_", {"dim": 2048}, dampings=_TRAKER),
    Entry("dattri", "TRAK", "benchmarks.peers.dattri_", {"type": "trak", "dim": 2048}, dampings=_DATTRI_TRAK),
    Entry("dattri", "LoGra", "benchmarks.peers.dattri_", {"type": "logra", "dim": 4096}, dampings=_DATTRI_LOGRA),
    Entry("dattri", "EK-FAC", "benchmarks.peers.dattri_", {"type": "ekfac"}, dampings=_DATTRI_EKFAC),
    Entry("captum", "Arnoldi", "benchmarks.peers.captum_", {"type": "arnoldi", "dim": 100, "rank": 50}, dampings=_ARNOLDI, checkpoints=(1,)),
    Entry("captum", "TracIn", "benchmarks.peers.captum_", {"type": "tracin"}),
)  # fmt: skip
