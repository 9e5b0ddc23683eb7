"""Extending a fitted index by the rows that a new version of its data set adds: factors are kept, stored rows reused as they are.

Only new rows are run: once for how far the kept factors are from them (`drift`), where the method has factors, and once for their
features. Scores are shares of the larger training set. The result equals a fit of all rows with the same factors.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature.covariances import is_summary
from attribution_core.curvature.ekfac import kronecker_eigenvalues
from attribution_core.errors import FingerprintMismatchError
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.method_spec import KfacMethod, LograMethod, TrakMethod
from attribution_core.methods import trak
from attribution_core.methods.artifact import (
    APPENDED_FILE,
    FACTORS_FILE,
    FEATURES_FOLDER,
    GRADIENTS_FOLDER,
    read_description,
)
from attribution_core.methods.drift import drift_of
from attribution_core.methods.fit import AnyPipeline, Arrays, FitPipeline, build_pipeline, run
from attribution_core.methods.fitted import of_checkpoint
from attribution_core.methods.kept import KeptGradients
from attribution_core.methods.layout import write_features, write_search
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.logra import Logra
from attribution_core.methods.sums import summed_arrays
from attribution_core.progress import Progress, watched
from attribution_core.sharding import Shard, Stage

_HALVES = (0, 1)


class ExtensionPipeline(FitPipeline):
    """Runs the parts of one extension; `spec.base` names what is extended.

    Raises:
        CorruptArtifactError: if a file of the index that is extended is missing or damaged.
        FingerprintMismatchError: if that index was fitted from something else.
    """

    def __init__(self, spec: FitSpec, work: Path, device: str = "cpu") -> None:
        super().__init__(spec, work, device)
        assert spec.base is not None
        self._base = spec.base.folder
        self._before = read_description(self._base)
        if self._before["fingerprint"] != spec.base.fingerprint:
            raise FingerprintMismatchError("the index to extend was fitted to other weights, data or parameters")
        self._factors = read_arrays(self._base / FACTORS_FILE)
        self._kept = KeptGradients(self.context, limit=0)  # shards of the two passes are cut in different ways

    def stages(self) -> list[Stage]:
        """Return the last pass over the data that the factors come from, by which drift is told, and that for features."""
        return [Stage(name, self._shards(name)) for name in self.spec.method.passes[-2:]]

    def assemble(self, into: Path, feature_files: Sequence[Path], progress: Progress) -> FitSummary:
        """Lay out the artifact: old files as they are, then the new rows' shards.

        Raises:
            Cancelled: if the work should stop.
        """
        _link(self._base / FACTORS_FILE, into / FACTORS_FILE)
        for folder in (FEATURES_FOLDER, GRADIENTS_FOLDER):
            for path in sorted((self._base / folder).glob("*.safetensors")):
                _link(path, into / folder / path.name)
        before = len(list((into / FEATURES_FOLDER).glob("*.safetensors")))
        write_features(self.context, self._members(), into, feature_files, progress, before)
        write_search(self.context, into, progress)
        appended = self._appended()
        write_arrays(into / APPENDED_FILE, appended)
        # Of the fit: an exact scan for the recall of all rows would run the old ones again.
        recall = self._before["recall"]
        self._describe(into, recall=recall, before=self._before["segments"])
        summary = self._summary(into, LoadedIndex(into, self.spec, self.context), recall)
        return FitSummary(**{**vars(summary), "drift": self._drift(appended)})

    def _settled(self, stage: str, reduced: Arrays, progress: Progress) -> Arrays:
        """Return nothing: the factors are kept."""
        return {}

    def _fitted(self, stages: Sequence[str]) -> Arrays:
        """Return the kept factors, whatever stages made them."""
        return self._factors

    def _shards(self, stage: str) -> tuple[Shard, ...]:
        """Return a stage's shards; where drift is told, each as two halves that share no row."""
        shards = super()._shards(stage)
        if stage == "features":
            return shards
        return tuple(
            Shard(2 * shard.ordinal + half, shard.checkpoint, shard.start + half, shard.stop, step=2)
            for shard in shards
            for half in _HALVES
        )

    def _reduction(self, stage: str, group: tuple[int, ...], files: Sequence[Path], progress: Progress) -> Arrays:
        """Return the sums by which drift is told as `<half>.<name>`, of the first stage; the other needs no reduction."""
        (number,) = group  # nothing that shares a curvature is extended
        if stage != self.stages()[0].name:
            return {}
        found: Arrays = {}
        shards = super()._shards(stage)
        for half in _HALVES:
            count = sum(len(range(s.start + half, s.stop, 2)) for s in shards if s.checkpoint == number)
            if stage == "features":
                sums = self._row_moments(number, watched(files, progress), half)
            elif count:
                summed = summed_arrays(watched(files[half::2], progress))
                sums = self._moments(stage, number, summed, progress)
            else:
                sums = {}
            found |= {f"{half}.{name}": value for name, value in sums.items()}
            found[f"{half}.count"] = np.array([float(count)])
        return found

    def _moments(self, stage: str, number: int, sums: Arrays, progress: Progress) -> Arrays:
        """Return a stage's sums along the kept eigenvectors."""
        factors = of_checkpoint(self._factors, number)
        match stage:
            case "covariance":
                kept = {name: value for name, value in sums.items() if is_summary(name)}
                along = watched([item for item in sums.items() if item[0] not in kept], progress)
                return kept | {f"spectrum.{name}": _along(value, factors[name]) for name, value in along}
            case "kernel":
                return {"values": _along(sums["kernel"], factors["vectors"])}
            case _:
                return sums

    def _row_moments(self, number: int, files: Iterable[Path], half: int) -> Arrays:
        """Return the sums of squared rows along the kept eigenvectors, for methods whose factors are made from rows."""
        method, factors = self.spec.method, of_checkpoint(self._factors, number)
        found: Arrays = {}
        if not isinstance(method, TrakMethod | LograMethod):
            return found
        for shard, path in zip(super()._shards("features"), files, strict=False):
            stored = {name: self._of_half(shard, value, half) for name, value in read_arrays(path).items()}
            if isinstance(method, TrakMethod):
                parts = {"": trak.kernel_rows(stored, weighted=trak.weighs_rows(method, self.spec.task))}
            else:
                member = self.context.method(number, self._factors)
                assert isinstance(member, Logra)
                parts = {f".{n}": stored["rows"][:, part] for n, part in enumerate(member.projection.slices)}
            for suffix, rows in parts.items():
                squares = np.square(rows.astype(np.float64) @ factors[f"vectors{suffix}"]).sum(0)
                found[f"values{suffix}"] = found.get(f"values{suffix}", 0.0) + squares
        return found

    def _of_half(self, shard: Shard, stored: np.ndarray, half: int) -> np.ndarray:
        first = self.rows[shard.start] if shard.start else self.spec.num_covered
        chosen: np.ndarray = stored[self.rows[shard.start + half : shard.stop : 2] - first]
        return chosen

    def _appended(self) -> Arrays:
        """Return the sums over all rows that were added since the factors were fitted."""
        found = dict(self._reduced(self.stages()[0].name))
        if (self._base / APPENDED_FILE).exists():
            for name, value in read_arrays(self._base / APPENDED_FILE).items():
                found[name] = found[name] + value if name in found else value
        return found

    def _drift(self, appended: Arrays) -> dict[str, object]:
        members, layers = [], dict[str, str]()
        for number in range(len(self.spec.members)):
            kept = self._kept_means(number)
            sums = [of_checkpoint(of_checkpoint(appended, number), half) for half in _HALVES]
            halves = [self._means(number, part) for part in sums if part["count"][0] > 0]
            members.append((kept, halves[0], halves[-1]))
            blocks = self.context.checkpoint(number).capture.blocks
            layers |= {name: blocks[int(name.rpartition(".")[2])].name for name in kept if "." in name}
        return drift_of(members, layers)

    def _kept_means(self, number: int) -> Arrays:
        # TRAK's kernel is a sum over examples, all else a mean.
        count = self.spec.fitted_examples if isinstance(self.spec.method, TrakMethod) else 1
        own = of_checkpoint(self._factors, number)
        return {name: value / count for name, value in own.items() if name.startswith(("eigenvalues", "values"))}

    def _means(self, number: int, sums: Arrays) -> Arrays:
        count = float(sums["count"][0])
        if isinstance(self.spec.method, KfacMethod):
            blocks = self.context.checkpoint(number).capture.blocks
            return kronecker_eigenvalues(blocks, sums, count)
        return {name: value / count for name, value in sums.items() if name != "count"}


def extend(spec: FitSpec, work: Path, into: Path, progress: Progress, device: str = "cpu") -> FitSummary:
    """Run a whole extension in this process; the service runs the same parts as jobs."""
    return run(ExtensionPipeline(spec, work, device), into, progress)


def pipeline_of(spec: FitSpec, work: Path, device: str = "cpu") -> AnyPipeline:
    """Return what fits or extends an index."""
    return build_pipeline(spec, work, device) if spec.base is None else ExtensionPipeline(spec, work, device)


def _along(moment: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return `vᵀMv` of each column `v`, for matrices (…, d, d): (…, d)."""
    along: np.ndarray = ((moment @ vectors) * vectors).sum(-2)
    return along


def _link(source: Path, target: Path) -> None:
    """Make a file appear at another place too; published files never change, so one copy on disk is enough."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
