"""Opening a fitted index, of whichever kind its method makes."""

from pathlib import Path

from attribution_core.fit_spec import FitSpec
from attribution_core.methods.bank import BankIndex
from attribution_core.methods.context import FitContext
from attribution_core.methods.dense import DenseIndex
from attribution_core.methods.loaded import LoadedIndex

AnyIndex = LoadedIndex | DenseIndex | BankIndex


def open_index(folder: Path, spec: FitSpec, context: FitContext | None = None, device: str = "cpu") -> AnyIndex:
    """Return a fitted index of whichever kind its method makes.

    Raises:
        FingerprintMismatchError: if the artifact was fitted from something else.
        CorruptArtifactError: if a file is missing, damaged or inconsistent.
    """
    match spec.method.keeps:
        case "scores":
            return DenseIndex(folder, spec, context, device)
        case "bank":
            return BankIndex(
                folder, spec, context, device, [open_index(p.folder, p.fit, None, device) for p in spec.priors]
            )
    return LoadedIndex(folder, spec, context, device)


def opened_priors(spec: FitSpec, device: str = "cpu") -> list[AnyIndex]:
    """Return the indexes that a method begins with.

    Raises:
        FingerprintMismatchError: if one was fitted from something else.
        CorruptArtifactError: if a file is missing, damaged or inconsistent.
    """
    return [open_index(prior.folder, prior.fit, None, device) for prior in spec.priors]
