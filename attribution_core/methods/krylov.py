"""The one stage of a fit by Arnoldi's iteration: the ends of a curvature's spectrum, from products with it."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.iterative import product_over
from attribution_core.curvature.solvers import arnoldi, mean_eigenvalue
from attribution_core.method_spec import ArnoldiMethod
from attribution_core.methods.context import FitContext
from attribution_core.progress import Progress


def krylov(context: FitContext, number: int, progress: Progress) -> dict[str, np.ndarray]:
    """Return what is kept of one checkpoint's curvature: eigenvalues (rank,), eigenvectors (parameters, rank) and the mean eigenvalue (1,).

    Raises:
        Cancelled: if the work should stop; progress is asked before each product, and counts every example once.
    """
    method, products = context.spec.method, context.curvatures.products(number)
    assert isinstance(method, ArnoldiMethod)
    blocks = context.checkpoint(number).capture.blocks
    size = sum(block.numel for block in blocks)
    over = product_over(products, partial(context.batches, number), blocks)

    def product(vectors: Tensor) -> Tensor:
        progress.advance(0)
        return over(vectors)

    generator = torch.Generator().manual_seed(method.seed)
    start = torch.randn(size, generator=generator).to(next(products.capture.module.parameters()))
    values, vectors = arnoldi(product, start, min(method.iterations, size))
    mean = mean_eigenvalue(product, size, start)
    progress.advance(context.spec.num_training)
    keep = slice(None, method.rank)
    return {
        "values": values[keep].cpu().numpy(),
        "vectors": vectors[:, keep].cpu().numpy(),
        "mean": np.array([abs(mean)]),
    }
