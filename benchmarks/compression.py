"""What is left of gradients that are stored in fewer numbers or bits: `python -m benchmarks.compression NAME …` prints a table per workload.

Designs that an index offers and designs that it does not, on the same gradients and queries (EK-FAC, one checkpoint, default damping): bases in which
gradients are rounded or sketched, truncated singular values, kernels of one projection or of one per layer. Nothing is re-scored. Whole gradients
of the training set are held in memory.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.ekfac import EkfacFactors
from attribution_core.curvature.whitening import Whitening
from attribution_core.method_spec import ProjectionSpec
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from attribution_core.projection import build_projection
from benchmarks.lds import Truth
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare

TOP, CANDIDATES = 10, 100
RANKS = (1, 2, 4, 8)
KERNELS = (1024, 4096)
_KERNEL_DAMPING = 3.0

# One tensor (examples, groups, d_out, d_in) per layer.
Layers = list[Tensor]


@dataclass(frozen=True)
class Given:
    """A workload's gradients and solved queries, and the curvature between them."""

    factors: EkfacFactors
    damping: float
    training: Layers
    queries: Layers
    measured: Layers

    @classmethod
    def of(cls, workload: Workload, folder: Path) -> "Given":
        """Fit EK-FAC, and differentiate every training example and query."""
        data = prepare(workload)
        spec = fit_spec(workload, dataset_of(workload, data), 1, method={"type": "ekfac"}, shard_size=4096)
        fit(spec, folder / "work", folder / "index", NoProgress())
        index, queries = LoadedIndex(folder / "index", spec), batch_of(data, "query")
        (method,) = index.members
        assert isinstance(method, GradientMethod)
        assert isinstance(method.curvature, EkfacFactors)
        side = index.query(queries, None).sides[0].gradients
        observed = [method.observe(batch).training for batch in index.context.batches(0)]
        training = [torch.cat([part.materialise() for part in parts]) for parts in zip(*observed, strict=True)]
        measured = [part.materialise() for part in method.encode_query(queries).measured]
        assert side is not None
        return cls(method.curvature, index.default_damping or 0.0, training, side, measured)

    def roots(self, number: int) -> Tensor:
        """Return `(K + λ)^½` of one layer."""
        return self.factors.damped(number, self.damping).sqrt().float()

    def in_basis(self, basis: str) -> tuple[Layers, Layers]:
        """Return training gradients and queries in the parameters' own basis, the eigenbasis, the whitened one, or as an index whitens them."""
        if basis == "own":
            return self.training, self.queries
        if basis == "whitened by sides":
            blocks = self.factors.whitening(self.damping)
            forward = [_by_sides(block, part) for part, block in zip(self.training, blocks, strict=True)]
            return forward, [block.against(part) for part, block in zip(self.queries, blocks, strict=True)]
        rotations = self.factors.basis.rotations
        turned = [[turn.forward(part) for part, turn in zip(side, rotations, strict=True)] for side in self.sides]
        if basis == "whitened":
            roots = [self.roots(number) for number in range(len(rotations))]
            turned[0] = [part / root for part, root in zip(turned[0], roots, strict=True)]
            turned[1] = [part * root for part, root in zip(turned[1], roots, strict=True)]
        return turned[0], turned[1]

    @property
    def sides(self) -> tuple[Layers, Layers]:
        """Training gradients and queries."""
        return self.training, self.queries


@dataclass(frozen=True)
class Compressed:
    """Scores (queries, n) of a design, and the bytes that it takes per example."""

    design: str
    bytes: float
    scores: Tensor


def designs(given: Given) -> Iterator[Compressed]:
    """Yield every design."""
    yield Compressed("whole, float32", 4 * _numbers(given.training), _inner(given.queries, given.training))
    for basis in ("own", "eigenbasis", "whitened"):
        yield from _rounded(given, basis)
    for basis in ("own", "whitened", "whitened by sides"):
        yield from _sketched(given, basis)
    for whitened in (False, True):
        yield from _truncated(given, whitened)
    yield from _kernels(given)


def _rounded(given: Given, basis: str) -> Iterator[Compressed]:
    """Whole gradients in few bits per number, with one scale per layer and example."""
    training, queries = given.in_basis(basis)
    scales = 4 * len(training)
    for name, bits, rounded in (("int8", 8, _int8), ("2 bits", 2, _two_bits), ("1 bit", 1, _one_bit)):
        stored = [rounded(part) for part in training]
        yield Compressed(f"whole, {basis}, {name}", _numbers(training) * bits / 8 + scales, _inner(queries, stored))


def _sketched(given: Given, basis: str) -> Iterator[Compressed]:
    """One random projection (SJLT) of the whole gradient."""
    training, queries = given.in_basis(basis)
    for dim, name, bits, rounded in (
        (1024, "float32", 32, lambda rows: rows),
        (8192, "float32", 32, lambda rows: rows),
        (1024, "int8", 8, _int8),
        (8192, "int8", 8, _int8),
        (8192, "1 bit", 1, _one_bit),
        (16_384, "1 bit", 1, _one_bit),
        (65_536, "1 bit", 1, _one_bit),
    ):
        projection = build_projection(ProjectionSpec(dim=dim))
        rows, asked = projection.project(training), projection.project(queries)
        yield Compressed(f"SJLT to {dim:,}, {basis}, {name}", dim * bits / 8 + 4, asked @ rounded(rows).T)


def _truncated(given: Given, whitened: bool) -> Iterator[Compressed]:
    """The largest singular values of every layer's gradient, in int8; or as many in all, each layer having those that are longest."""
    scaled = [_separable(given, number) if whitened else None for number in range(len(given.training))]
    parts = []
    for number, gradient in enumerate(given.training):
        turn, scale = given.factors.basis.rotations[number], scaled[number]
        parts.append(_Truncation.of(gradient if scale is None else turn.forward(gradient) * scale))
    name = "whitened" if whitened else "own"
    for rank in RANKS:
        for mixed in (False, True):
            ranks = _mixed(parts, rank) if mixed else [rank] * len(parts)
            stored, size = [], 0.0
            for number, (part, own) in enumerate(zip(parts, ranks, strict=True)):
                found, cost = part.kept(own)
                scale = scaled[number]
                stored.append(found if scale is None else given.factors.basis.rotations[number].back(found / scale))
                size += cost + 4
            kind = "mean rank" if mixed else "rank"
            yield Compressed(f"{kind} {rank}, {name}, int8", size, _inner(given.queries, stored))


def _kernels(given: Given) -> Iterator[Compressed]:
    """TRAK's kernel of one projection, and one per layer: block-diagonal."""
    for dim in KERNELS:
        groups: Sequence[tuple[str, list[list[int]]]] = (
            ("one kernel", [list(range(len(given.training)))]),
            ("a kernel per layer", [[number] for number in range(len(given.training))]),
        )
        for name, parts in groups:
            sizes = _shares(dim, [_numbers([given.training[n] for n in part]) for part in parts])
            scores = torch.zeros(len(given.queries[0]), len(given.training[0]), dtype=torch.float64)
            for part, size in zip(parts, sizes, strict=True):
                projection = build_projection(ProjectionSpec(dim=max(8, size)))
                rows = projection.project([given.training[n] for n in part]).double()
                asked = projection.project([given.measured[n] for n in part]).double()
                kernel = rows.T @ rows
                kernel += _KERNEL_DAMPING * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
                scores += asked @ torch.linalg.solve(kernel, rows.T)
            yield Compressed(f"{name}, {sum(sizes):,} numbers, float32", 4 * sum(sizes), scores)


@dataclass(frozen=True)
class _Truncation:
    """Singular values of one layer's gradients, (examples, groups, …)."""

    whole: Tensor
    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, gradients: Tensor) -> "_Truncation":
        return cls(gradients, *torch.linalg.svd(gradients, full_matrices=False))

    @property
    def cost(self) -> int:
        groups, d_out, d_in = self.whole.shape[1:]
        return groups * (d_out + d_in)

    def kept(self, rank: int) -> tuple[Tensor, int]:
        """Return the gradients of a rank in int8 and their bytes; whole ones where these are fewer."""
        numel = self.whole[0].numel()
        if rank == 0:
            return torch.zeros_like(self.whole), 0
        if rank * self.cost >= numel:
            return _int8(self.whole), numel
        root = self.values[..., :rank].sqrt()
        return _int8(self.left[..., :rank] * root.unsqueeze(-2)) @ _int8(
            root.unsqueeze(-1) * self.right[..., :rank, :]
        ), (rank * self.cost)


def _mixed(parts: Sequence[_Truncation], mean: int) -> list[int]:
    """Return ranks that cost what the same rank for all costs, given to the layers by the length that the next singular value adds per byte."""
    budget = sum(min(mean * part.cost, part.whole[0].numel()) for part in parts)
    gains = [part.values.square().mean(0).sum(0) / part.cost for part in parts]
    order = sorted(((float(g), n, r) for n, gain in enumerate(gains) for r, g in enumerate(gain)), reverse=True)
    ranks = [0] * len(parts)
    for _, number, rank in order:
        part = parts[number]
        cost = min((rank + 1) * part.cost, part.whole[0].numel()) - min(rank * part.cost, part.whole[0].numel())
        if ranks[number] == rank and cost <= budget:
            ranks[number], budget = rank + 1, budget - cost
    return ranks


def _by_sides(block: Whitening, matrices: Tensor) -> Tensor:
    """Return `W φ` of whole gradients as an index whitens them."""
    turned = block.sides.forward(matrices)
    return turned if block.scale is None else turned * block.scale


def _separable(given: Given, number: int) -> Tensor:
    """Return `(K + λ)^-½` as a product of one number per row and one per column, which keeps the rank of what it multiplies."""
    logs = -given.roots(number).log()
    return (logs.mean(-1, keepdim=True) + logs.mean(-2, keepdim=True) - logs.mean((-2, -1), keepdim=True)).exp()


def _shares(dim: int, sizes: Sequence[int]) -> list[int]:
    """Return how many of `dim` numbers each part has, in proportion to the root of its parameters and no more than these."""
    roots = np.sqrt(sizes)
    return [int(min(size, max(8, round(dim * root / roots.sum())))) for size, root in zip(sizes, roots, strict=True)]


def _int8(values: Tensor) -> Tensor:
    scale = values.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, *[1] * (values.dim() - 1)) / 127
    return (values / scale).round() * scale


def _two_bits(values: Tensor) -> Tensor:
    """Round to the four values that lose least of a normal distribution (Max 1960), scaled as one bit is."""
    size = values.flatten(1).square().mean(1).sqrt().clamp(min=1e-30).view(-1, *[1] * (values.dim() - 1))
    return _rescaled(torch.where(values.abs() < 0.9816 * size, 0.4528, 1.510) * values.sign(), values)


def _one_bit(values: Tensor) -> Tensor:
    return _rescaled(values.sign(), values)


def _rescaled(levels: Tensor, values: Tensor) -> Tensor:
    """Scale what values were rounded to so that its inner product with them is their squared length."""
    ratio = values.square().flatten(1).sum(1) / (levels * values).flatten(1).sum(1).clamp(min=1e-30)
    return levels * ratio.view(-1, *[1] * (values.dim() - 1))


def _numbers(layers: Sequence[Tensor]) -> int:
    return sum(part[0].numel() for part in layers)


def _inner(queries: Sequence[Tensor], training: Sequence[Tensor]) -> Tensor:
    return torch.stack([q.flatten(1) @ t.flatten(1).T for q, t in zip(queries, training, strict=True)]).sum(0)


def found_of(exact: np.ndarray, scores: np.ndarray) -> float:
    """Return the share of the exact top of both signs that is among each query's candidates."""
    shares = [
        np.isin(np.argsort(-sign * row)[:TOP], np.argsort(-sign * other)[:CANDIDATES]).mean()
        for row, other in zip(exact, scores, strict=True)
        for sign in (1, -1)
    ]
    return float(np.mean(shares))


def main() -> None:
    """Print a table per workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    arguments = parser.parse_args()
    set_up_processor(threads=1)
    for name in arguments.workloads:
        truth = Truth.read(WORKLOADS[name].truth)
        print(f"\n{name}\n\n| stored | bytes per example | LDS | top {TOP} among {CANDIDATES} |\n|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            given = Given.of(WORKLOADS[name], Path(folder))
        exact = None
        for found in designs(given):
            scores = found.scores.numpy()
            exact = scores if exact is None else exact
            lds = truth.correlations(scores).mean()
            print(f"| {found.design} | {found.bytes:,.0f} | {lds:.3f} | {found_of(exact, scores):.3f} |", flush=True)


if __name__ == "__main__":
    main()
