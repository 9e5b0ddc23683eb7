"""Which combinations of examples' pseudo-gradients are kept as rows, and in what basis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.block_rows import Drawn
from attribution_core.curvature.ekfac import EkfacFactors
from attribution_core.gradients import AnyRotation


class Chosen(NamedTuple):
    """Rows of a batch.

    Attributes:
        owners: whose each row is, as a place in the batch, (rows,), ascending.
        bases: what its example's draws are multiplied with, (rows, draws).
        size: the batch's examples.
    """

    owners: Tensor
    bases: Tensor
    size: int


@dataclass(frozen=True)
class Selection:
    """Which rows are kept.

    Attributes:
        examples: the row numbers of all examples whose curvature counts, (n,), ascending.
        owners: whose each row is, as a place among these, (rows,), ascending.
        bases: what its example's draws are multiplied with, (rows, draws).
    """

    examples: np.ndarray
    owners: np.ndarray
    bases: np.ndarray

    @classmethod
    def joined(
        cls, chosen: Sequence[Chosen], examples: np.ndarray | None = None, drawn: np.ndarray | None = None
    ) -> "Selection":
        """Return what was chosen of consecutive batches.

        Args:
            chosen: of every batch.
            examples: all row numbers; counted from 0 by default.
            drawn: the places among these of the examples in the batches; all by default.
        """
        ends = np.cumsum([0, *(batch.size for batch in chosen)])
        owners = [batch.owners.cpu().numpy() + start for batch, start in zip(chosen, ends, strict=False)]
        bases = [batch.bases.cpu().numpy() for batch in chosen]
        places = np.arange(ends[-1]) if drawn is None else drawn
        return cls(places if examples is None else examples, places[np.concatenate(owners)], np.concatenate(bases))

    def __len__(self) -> int:
        return len(self.owners)

    def of_batch(self, start: int, drawn: Sequence[Drawn]) -> Chosen:
        """Return the rows of a batch of the examples that have one; `start` of these came before."""
        outputs, size = drawn[0].outputs, len(drawn[0].outputs)
        places = np.unique(self.owners, return_inverse=True)[1]
        part = slice(*np.searchsorted(places, [start, start + size]))
        owners = torch.from_numpy(places[part] - start).to(outputs.device)
        return Chosen(owners, torch.from_numpy(self.bases[part]).to(outputs), size)

    @property
    def used(self) -> np.ndarray:
        """The row numbers of examples with a row, ascending."""
        chosen: np.ndarray = self.examples[np.unique(self.owners)]
        return chosen

    def arrays(self) -> dict[str, np.ndarray]:
        """Return it by name."""
        return {f"rows.{name}": value for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Selection":
        """Return it from stored arrays."""
        return cls(*(arrays[f"rows.{name}"] for name in ("examples", "owners", "bases")))


@dataclass(frozen=True)
class Frame:
    """The basis that rows are kept in, and which are worth keeping.

    An example's draws are turned among themselves, which their second moment does not see, so that the first ones have as much of it as can be.
    A row's part of H̄ is `‖g‖²/trace`, averaged over layers. Rows with less than `negligible` times the average part are left out, and so
    never more than that part of the trace.

    Attributes:
        rotations: of every block, to the basis.
        traces: of every block's H̄.
        negligible: from 0, where all rows are kept, to 1.
    """

    rotations: Sequence[AnyRotation]
    traces: Sequence[float]
    negligible: float

    @classmethod
    def of(cls, factors: EkfacFactors, negligible: float = 0.0) -> "Frame":
        """Return the basis of EK-FAC, whose traces are those of H̄ itself."""
        return cls(factors.basis.rotations, [float(values.sum()) for values in factors.eigenvalues], negligible)

    def chosen(self, drawn: Sequence[Drawn]) -> Chosen:
        """Return the owners (rows,) and bases (rows, draws) of a batch's principal rows that are worth keeping."""
        shares = [part.grams() / trace for part, trace in zip(drawn, self.traces, strict=True) if trace > 0]
        grams = torch.stack(shares or [drawn[0].grams()]).mean(0)
        parts, bases = torch.linalg.eigh(grams.double())  # (n, draws), (n, draws, draws)
        # Of layers that are all dead no row has a part; without any rows there would be nothing to multiply with.
        owners, slots = (parts * parts.shape[1] >= (self.negligible if shares else 0)).nonzero().T
        return Chosen(owners, bases.mT[owners, slots].to(grams), len(grams))


def every_draw(drawn: Sequence[Drawn]) -> Chosen:
    """Return every draw as a row of its own."""
    outputs = drawn[0].outputs
    n, draws = outputs.shape[:2]
    owners = torch.arange(n, device=outputs.device).repeat_interleave(draws)
    return Chosen(owners, torch.eye(draws).repeat(n, 1).to(outputs), n)
