"""Extending an index: only new rows are run, old bytes stay, and scores are those of one fit of all rows with the same factors."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.data.importer import import_dataset
from attribution_core.data.reader import DatasetReader
from attribution_core.errors import FingerprintMismatchError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import BaseRef, DatasetRef, FitSpec, FitSummary
from attribution_core.method_spec import METHODS
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.extend import extend
from attribution_core.methods.fit import FitPipeline, fit, run
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from tests.core.methods.problems import SMALL, N, Problem, shortfall

FIRST, SECOND = 27, 44  # neither ends a shard of 16
METHODS_EXTENDED: list[dict[str, Any]] = [
    {"type": "ekfac", "damping": 0.1},
    {"type": "ekfac", "damping": 0.1, "perturbation": {"copies": 2}},
    {"type": "kfac", "damping": 0.1, "perturbation": {"copies": 1, "training": {"epochs": 1}}},
    {"type": "diagonal", "damping": 0.1},
    {"type": "gauss_newton", "damping": 0.1},
    {"type": "grad_dot", "perturbation": {"copies": 1, "training": {"epochs": 1}}},
    {"type": "grad_cos"},
    {"type": "representation"},
    {"type": "logra", "projection": {"type": "factored", "dim": 64}},
    {"type": "trak", "projection": {"type": "sjlt", "dim": 16}},
    {"type": "trak", "curvature": "fisher", "projection": {"type": "sjlt", "dim": 16}},
]


class Counted(NoProgress):
    done = 0

    def advance(self, done: int) -> None:
        self.done += done


def part(problem: Problem, folder: Path, stop: int, parent: DatasetRef | None = None, start: int = 0) -> DatasetRef:
    """Rows `start … stop - 1` of a problem, appended to a parent."""
    folder.mkdir()
    inputs = problem.inputs[start:stop].float().numpy()
    np.savez(folder / "rows.npz", input=inputs, target=problem.targets[start:stop].numpy())
    spec = problem.spec.dataset.spec
    before = None if parent is None else DatasetReader(parent.folder, spec)
    summary = import_dataset(folder / "rows.npz", spec, folder, NoProgress(), before)
    return DatasetRef(id=folder.name, folder=folder, spec=spec, sha256=summary.sha256, num_examples=stop)


def based_on(folder: Path, spec: FitSpec) -> BaseRef:
    return BaseRef(
        folder=folder,
        fingerprint=spec.fingerprint(),
        num_examples=spec.dataset.num_examples,
        fitted_examples=spec.fitted_examples,
    )


def of(problem: Problem, dataset: DatasetRef, method: dict[str, Any], **more: Any) -> FitSpec:
    projected = method if method["type"] == "representation" else {"projection": SMALL, **method}
    return problem.with_(dataset=dataset, method=projected, **more)


class GivenFactors(FitPipeline):
    """A fit of all rows whose factors are another fit's: what an extension must agree with."""

    def __init__(self, spec: FitSpec, work: Path, factors: Path) -> None:
        super().__init__(spec, work)
        self.factors = factors

    def assemble(self, into: Path, files: Any, progress: Any) -> FitSummary:
        summary = super().assemble(into, files, progress)
        write_arrays(into / FACTORS_FILE, read_arrays(self.factors))
        self._describe(into, recall=summary.recall)
        return summary

    def _fitted(self, stages: Any) -> Any:
        return read_arrays(self.factors)


def extended(problem: Problem, folder: Path, method: dict[str, Any], **more: Any) -> tuple[FitSpec, Counted]:
    """Fit to the first rows and extend twice; returns the last spec, its progress, and leaves artifacts 0, 1, 2 in a folder."""
    first = part(problem, folder / "first", FIRST)
    second = part(problem, folder / "second", SECOND, first, FIRST)
    third = part(problem, folder / "third", N, second, SECOND)
    spec, counted = of(problem, first, method, **more), Counted()
    fit(spec, folder / "work", folder / "0", NoProgress())
    for number, dataset in enumerate((second, third)):
        spec = of(problem, dataset, method, base=based_on(folder / str(number), spec), **more)
        counted = Counted()
        extend(spec, folder / "work", folder / str(number + 1), counted)
    return spec, counted


def test_an_extension_keeps_the_damping_and_the_tempering_of_its_fit(problem: Problem, tmp_path: Path) -> None:
    """Self-influence is stored at it, and would be of two dampings else."""
    spec, _ = extended(problem, tmp_path, {"type": "ekfac"})
    found, kept = LoadedIndex(tmp_path / "2", spec), read_arrays(tmp_path / "0" / FACTORS_FILE)["0.default_damping"]
    assert found.default_damping == pytest.approx(kept[0], rel=1e-6)
    assert kept[0] > 0.001
    member = found.members[0]
    assert isinstance(member, GradientMethod)
    first = read_arrays(tmp_path / "0" / FACTORS_FILE)["0.tempering"]
    assert [member.tempering.power, member.tempering.scale] == first.tolist()
    each = shortfall(problem)
    assert member.tempering.scale != pytest.approx((each**0.6).mean() / each.mean(), rel=1e-6)
    assert found.query(problem.queries(), None).damping == found.default_damping


@pytest.mark.parametrize(
    ("method", "layout"),
    [*[(method, "vectors") for method in METHODS_EXTENDED], ({"type": "ekfac", "damping": 0.1}, "factors")],
    ids=lambda value: value if isinstance(value, str) else "-".join([value["type"], *list(value)[1:2]]),
)
def test_an_extension_equals_one_fit_with_the_same_factors(
    method: dict[str, Any], layout: str, problem: Problem, tmp_path: Path
) -> None:
    store = {"layout": layout}
    spec, counted = extended(problem, tmp_path, method, store=store)
    assert counted.done == (N - SECOND) * min(2, len(spec.method.passes)) * len(spec.members)
    found = LoadedIndex(tmp_path / "2", spec)
    whole = of(problem, spec.dataset, method, store=store)
    if method["type"] == "trak":  # its kernel is a sum: the kept one stands for as many examples as there are now
        factors = read_arrays(tmp_path / "0" / FACTORS_FILE)
        write_arrays(tmp_path / "resized", {**factors, "0.values": factors["0.values"] * np.float32(N / FIRST)})
    else:
        shutil.copy(tmp_path / "0" / FACTORS_FILE, tmp_path / "resized")
    run(GivenFactors(whole, tmp_path / "work", tmp_path / "resized"), tmp_path / "whole", NoProgress())
    expected = LoadedIndex(tmp_path / "whole", whole)
    rows, queries = np.arange(N), problem.queries()
    for rescore in (False, True):
        scores = [index.scores(index.query(queries, None), rows, rescore=rescore) for index in (found, expected)]
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-6 * np.abs(scores[1]).max())
    np.testing.assert_allclose(found.self_influence(), expected.self_influence(), rtol=1e-4, atol=1e-9)
    tops = [index.attribute(index.query(queries, None), 5, None, rescore=True) for index in (found, expected)]
    for one, other in zip(*tops, strict=True):
        assert one.positive.rows.tolist() == other.positive.rows.tolist()
        assert one.negative.rows.tolist() == other.negative.rows.tolist()


def test_every_method_that_says_so_is_tested() -> None:
    assert {method["type"] for method in METHODS_EXTENDED} == {n for n, method in METHODS.items() if method.extends}


def test_old_shards_stay_as_they_are_and_bytes_depend_on_nothing_else(problem: Problem, tmp_path: Path) -> None:
    spec, _ = extended(problem, tmp_path, {"type": "ekfac"}, store={"layout": "factors"})
    for number in (0, 1):
        kept = [p for folder in ("features", "gradients") for p in (tmp_path / str(number) / folder).iterdir()]
        assert len(kept) >= 4
        for path in [*kept, tmp_path / str(number) / FACTORS_FILE]:
            later = tmp_path / str(number + 1) / path.relative_to(tmp_path / str(number))
            assert later.read_bytes() == path.read_bytes()
    extend(spec, tmp_path / "work", tmp_path / "again", NoProgress())
    hashes = [
        {p.relative_to(tmp_path / name): sha256_file(p) for p in (tmp_path / name).rglob("*.*")}
        for name in ("2", "again")
    ]
    assert hashes[0] == hashes[1]


def test_an_ensemble_and_an_ivf_search_are_extended(ensemble: Problem, tmp_path: Path) -> None:
    search = {"type": "ivf", "lists": 4, "probes": 4}
    spec, counted = extended(ensemble, tmp_path, {"type": "ekfac"}, search=search, store={"dtype": "float16"})
    assert counted.done == 2 * 3 * (N - SECOND)
    index = LoadedIndex(tmp_path / "2", spec)
    query = index.query(ensemble.queries(), None)
    scores = index.scores(query, np.arange(N), rescore=True)
    for number, one in enumerate(index.attribute(query, N, None, rescore=True)):
        found = dict(zip(one.positive.rows.tolist(), one.positive.scores.tolist(), strict=True))
        expected = {row: score for row, score in enumerate(scores[number].tolist()) if score > 0}
        assert found == pytest.approx(expected)


def test_another_index_is_not_extended(problem: Problem, tmp_path: Path) -> None:
    spec, _ = extended(problem, tmp_path, {"type": "grad_dot"})
    assert spec.base is not None
    wrong = spec.model_copy(update={"base": spec.base.model_copy(update={"fingerprint": "0" * 64})})
    with pytest.raises(FingerprintMismatchError):
        extend(wrong, tmp_path / "work", tmp_path / "wrong", NoProgress())
    with pytest.raises(FingerprintMismatchError):
        LoadedIndex(tmp_path / "2", wrong)


def drift(problem: Problem, folder: Path, method: dict[str, Any], inputs: torch.Tensor) -> dict[str, Any]:
    """The drift of an index over a problem's rows, after as many others were appended."""
    rows = len(problem.inputs)
    every = replace(problem, inputs=torch.cat([problem.inputs, inputs]), targets=torch.cat([problem.targets] * 2))
    folder.mkdir()
    first = part(every, folder / "first", rows)
    second = part(every, folder / "second", 2 * rows, first, rows)
    spec = of(problem, first, method)
    assert fit(spec, folder / "work", folder / "0", NoProgress()).drift is None
    later = of(problem, second, method, base=based_on(folder / "0", spec))
    found = extend(later, folder / "work", folder / "1", NoProgress()).drift
    assert found is not None
    return found


@pytest.mark.parametrize(
    "method", [m for m in METHODS_EXTENDED if m["type"] not in ("grad_dot", "grad_cos", "representation")]
)
def test_drift_tells_other_rows_from_the_same(method: dict[str, Any], problem: Problem, tmp_path: Path) -> None:
    same = drift(problem, tmp_path / "same", method, problem.inputs)
    assert same["value"] == pytest.approx(0, abs=0.15), "half of them are not all of them"
    generator = torch.Generator().manual_seed(5)
    alike = drift(problem, tmp_path / "alike", method, torch.randn(N, 5, generator=generator).double())
    other = drift(problem, tmp_path / "other", method, 3 + 2 * torch.randn(N, 5, generator=generator).double())
    assert other["value"] > 2 * alike["value"]
    assert other["value"] > 0.4
    if method["type"] != "trak":
        assert len(other["layers"]) == 2


def test_methods_without_factors_do_not_drift(problem: Problem, tmp_path: Path) -> None:
    assert drift(problem, tmp_path / "one", {"type": "grad_dot"}, problem.inputs + 5) == {"value": 0.0, "layers": {}}


GAUSS_NEWTON = {"curvature": "gauss_newton", "damping": 1.0}


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ({"type": "ekfac"}, "factors"),
        ({"type": "kfac"}, "vectors"),
        ({"type": "gauss_newton"}, "vectors"),
        ({"type": "grad_cos"}, "vectors"),
        ({"type": "representation"}, "vectors"),
        ({"type": "logra", "projection": {"type": "factored", "dim": 64}}, "vectors"),
        ({"type": "trak", "projection": {"type": "sjlt", "dim": 16}}, "vectors"),
        ({"type": "datainf"}, "factors"),
        ({"type": "explicit", **GAUSS_NEWTON}, "factors"),
    ],
)
def test_a_fit_without_some_rows_is_a_fit_of_the_others(
    method: dict[str, Any], layout: str, problem: Problem, tmp_path: Path
) -> None:
    out = [0, 5, *range(16, 36), N - 1]
    rows = np.setdiff1d(np.arange(N), out)
    few = replace(problem, inputs=problem.inputs[rows], targets=problem.targets[rows])
    store = {"layout": layout}
    alone = of(problem, part(few, tmp_path / "few", len(rows)), method, store=store)
    fit(alone, tmp_path / "work", tmp_path / "alone", NoProgress())
    spec = of(problem, problem.spec.dataset, method, left_out=out, store=store)
    fit(spec, tmp_path / "work", tmp_path / "left", NoProgress())
    index, expected = LoadedIndex(tmp_path / "left", spec), LoadedIndex(tmp_path / "alone", alone)
    queries = problem.queries()
    scores = index.scores(index.query(queries, None), rows, rescore=False)
    others = expected.scores(expected.query(queries, None), np.arange(len(rows)), rescore=False)
    np.testing.assert_allclose(scores, others, rtol=1e-3, atol=1e-5 * np.abs(others).max())
    if index.spec.method.self_influence:
        np.testing.assert_allclose(index.self_influence()[rows], expected.self_influence(), rtol=1e-3, atol=1e-9)
    for one in index.attribute(index.query(queries, None), N, None, rescore=True):
        assert not set(out) & {*one.positive.rows.tolist(), *one.negative.rows.tolist()}


def test_rows_left_out_are_part_of_what_was_fitted(problem: Problem) -> None:
    prints = {problem.with_(left_out=rows).fingerprint() for rows in ([], [1], [2])}
    assert len(prints) == 3


def test_what_a_killed_process_left_is_no_part_of_an_artifact(problem: Problem, tmp_path: Path) -> None:
    first = part(problem, tmp_path / "first", FIRST)
    spec = of(problem, first, {"type": "grad_dot"})
    second = part(problem, tmp_path / "second", SECOND, first, FIRST)
    found = []
    for left in ([], [".00000.safetensors.1f"]):
        into, then = tmp_path / f"{len(left)}", tmp_path / f"{len(left)}-extended"
        for folder in (into / "features", then / "features"):
            folder.mkdir(parents=True)
            for name in left:
                (folder / name).write_bytes(b"half")
        fitted = fit(spec, tmp_path / "work", into, NoProgress())
        later = of(problem, second, {"type": "grad_dot"}, base=based_on(into, spec))
        found.append((fitted, extend(later, tmp_path / "work", then, NoProgress())))
        assert ".00000" not in (then / "index.json").read_text()
    assert found[0] == found[1]
    assert sorted(path.name for path in (then / "features").glob("[!.]*")) == [
        f"{number:05d}.safetensors" for number in range(4)
    ]
