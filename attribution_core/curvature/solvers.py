"""Solvers of `(H + λ) x = v` that only need products with H; all vectors of a batch are solved together, each on its own.

Vectors are rows (batch, P).
"""

import torch
from torch import Tensor

from attribution_core.curvature.vectors import Product
from attribution_core.errors import SingularCurvatureError


def conjugate_gradients(
    product: Product, vectors: Tensor, precondition: Product, iterations: int, tolerance: float
) -> Tensor:
    """Return `H⁻¹ v` for a positive definite H; a vector that is solved takes part in no further step.

    Args:
        product: multiplies by H, damping included.
        vectors: right-hand sides (batch, P).
        precondition: multiplies by an approximation of `H⁻¹`.
        iterations: steps at most.
        tolerance: relative residual at which a vector is solved.

    Raises:
        SingularCurvatureError: if H has a direction of negative curvature.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.3.
    """
    solution = torch.zeros_like(vectors)
    target = tolerance * vectors.norm(dim=1)
    open_rows = torch.arange(len(vectors), device=vectors.device)
    residual, partial = vectors.clone(), torch.zeros_like(vectors)
    direction = precondition(residual).clone()
    alignment = _dot(residual, direction)
    for _ in range(iterations):
        wanting = residual.norm(dim=1) > target[open_rows]
        if not bool(wanting.all()):
            solution[open_rows[~wanting]] = _known(partial, residual)[~wanting]
            state = (open_rows, residual, partial, direction, alignment)
            open_rows, residual, partial, direction, alignment = (part[wanting] for part in state)
            if not len(open_rows):
                return solution
        moved = product(direction)
        bend = _dot(direction, moved)
        if bool((bend < 0).any()):
            raise SingularCurvatureError(
                "the curvature is not positive definite: use a larger damping, or curvature gauss_newton", "/damping"
            )
        step = torch.where(bend > 0, alignment / bend.clamp(min=torch.finfo(bend.dtype).tiny), 0)
        partial.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
        z = precondition(residual)
        following = _dot(residual, z)
        direction.mul_(torch.where(alignment > 0, following / alignment, 0)).add_(z)
        alignment = following
    solution[open_rows] = _known(partial, residual)
    return solution


def _known(solution: Tensor, residual: Tensor) -> Tensor:
    """Return solutions, but what is no number where the residual is none: a start at 0 must not look solved."""
    return torch.addcmul(solution, residual.norm(dim=1, keepdim=True), solution.new_zeros(()))


def lissa(products: list[Product], vectors: Tensor, damping: float, scale: float) -> Tensor:
    """Return `(H + λ)⁻¹ v` by the truncated Neumann series, with one stochastic product per term.

    `x ← v + x - (H_t + λ) x / σ`, and the answer is `x / σ`.

    Args:
        products: multiplies by `H_t`, one per term.
        vectors: right-hand sides (batch, P).
        damping: λ.
        scale: σ, at least the largest eigenvalue of every `H_t + λ`.

    Raises:
        SingularCurvatureError: if the series diverges.

    Source: Agarwal et al. 2017; Koh & Liang 2017, section 3.
    """
    total = vectors.clone()
    for product in products:
        total = vectors + total - (product(total) + damping * total) / scale
    # With positive curvature below 2σ no term is longer than v; what grows beyond that has met negative or greater curvature.
    bound = 1.001 * (len(products) + 1) * vectors.norm(dim=1)
    if not bool((total.norm(dim=1) <= bound).all()):
        raise SingularCurvatureError(
            "the series diverges, as the curvature has a negative direction or is steeper on some mini-batch than on all examples: "
            "use a larger damping, larger batches, or curvature gauss_newton",
            "/damping",
        )
    return total / scale


def arnoldi(product: Product, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (r,), by falling magnitude, and eigenvectors (P, r) of H in the Krylov space of `start` (P,).

    H is symmetric, so the projected matrix is symmetrised; every new vector is made orthogonal twice.

    Source: Schioppa et al. 2022, algorithm 1.
    """
    basis = [start / start.norm()]
    projected = start.new_zeros(iterations, iterations)
    for step in range(iterations):
        vector = product(basis[-1].unsqueeze(0))[0]
        known = torch.stack(basis)  # (step + 1, P)
        for _ in range(2):
            coefficients = known @ vector
            projected[: step + 1, step] += coefficients
            vector = vector - coefficients @ known
        length = vector.norm()
        if step + 1 == iterations or length <= 1e-6 * projected[: step + 1, : step + 1].abs().max():
            break
        projected[step + 1, step] = length
        basis.append(vector / length)
    size = len(basis)
    square = projected[:size, :size]
    values, vectors = torch.linalg.eigh((square + square.T).double() / 2)
    order = values.abs().argsort(descending=True)
    return values[order], torch.stack(basis).T.double() @ vectors[:, order]


def largest_eigenvalue(product: Product, size: int, like: Tensor, steps: int = 12) -> float:
    """Return the largest absolute eigenvalue of H by power iteration from a seeded start."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, size, generator=generator).to(like)
    value = torch.zeros(())
    for _ in range(steps):
        vector = vector / vector.norm()
        vector = product(vector)
        value = vector.norm()
    return float(value)


def mean_eigenvalue(product: Product, size: int, like: Tensor, probes: int = 8) -> float:
    """Return an estimate of `trace(H)/P` from seeded random signs. Source: Hutchinson 1989."""
    generator = torch.Generator().manual_seed(1)
    signs = (torch.randint(0, 2, (probes, size), generator=generator) * 2 - 1).to(like)
    return float(_dot(signs, product(signs)).mean() / size)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(1, keepdim=True)
