"""A fit's result depends on nothing but its spec: not on who ran which shard, when, or how large shards and batches are."""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attribution_core.arrays import write_arrays
from attribution_core.curvature import rows as curvature_rows
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import Fisher
from attribution_core.data.batch import Batch
from attribution_core.errors import Cancelled, InvalidInputError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import FitSpec
from attribution_core.gradients import Pass
from attribution_core.methods import kept
from attribution_core.methods.context import FitContext
from attribution_core.methods.fit import AnyPipeline, FitPipeline, FitSummary, build_pipeline, fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from attribution_core.tasks import Task
from tests.core.methods.problems import SMALL, Problem, images, relative_error, sure

METHODS: dict[str, dict[str, Any]] = {
    "trak": {"type": "trak", "projection": SMALL, "damping": 0.1},
    "ekfac": {"type": "ekfac", "projection": SMALL, "damping": 0.1},
    "ekfac sampled": {"type": "ekfac", "projection": SMALL, "damping": 0.1, "fisher": "sampled", "samples": 2},
    "grad_dot": {"type": "grad_dot", "projection": SMALL},
    "grad_cos": {"type": "grad_cos", "projection": SMALL},
    "tracin": {"type": "tracin", "projection": SMALL},
    "gas": {"type": "gas", "projection": SMALL},
    "source": {"type": "source", "projection": SMALL, "segments": 1},
    "representation": {"type": "representation"},
}
# With those of other curvatures; iterations are few, as they are in question and not what they converge to.
EVERY_METHOD = METHODS | {
    "kfac": {"type": "kfac", "projection": SMALL, "damping": 0.1},
    "diagonal": {"type": "diagonal", "projection": SMALL, "damping": 0.1},
    "datainf": {"type": "datainf", "projection": SMALL, "damping": 0.1},
    "logra": {"type": "logra", "projection": {"type": "factored", "dim": 64}, "damping": 0.1},
    "explicit": {"type": "explicit", "projection": SMALL, "damping": 10.0},
    "cg": {"type": "cg", "projection": SMALL, "damping": 10.0, "iterations": 2},
    "lissa": {"type": "lissa", "projection": SMALL, "damping": 10.0, "depth": 3, "batch": 16},
    "arnoldi": {"type": "arnoldi", "projection": SMALL, "damping": 10.0, "iterations": 6},
}
IVF = {"type": "ivf", "lists": 6}
ALL = np.arange(60)


class Stopping:
    """Progress that stops the work after so many examples."""

    def __init__(self, after: int) -> None:
        self.after, self.done = after, 0

    def advance(self, done: int) -> None:
        self.done += done
        if self.done >= self.after:
            raise Cancelled("asked to stop")


class Interrupting:
    """Progress that stops a reduction at one of its reports, which count nothing; never by default."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.reports = at, 0

    def advance(self, done: int) -> None:
        self.reports += done == 0
        if self.reports == self.at:
            raise Cancelled("asked to stop")


def run(spec: FitSpec, work: Path, into: Path, seed: int | None = None) -> FitSummary:
    """Fit with a fresh pipeline for every shard, in an order shuffled by `seed`."""
    stages = build_pipeline(spec, work).stages()
    files: list[Path] = []
    for stage in stages:
        files = [work / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        order = np.arange(len(files)) if seed is None else np.random.default_rng(seed).permutation(len(files))
        for ordinal in order:
            write_arrays(files[ordinal], build_pipeline(spec, work).run_shard(stage.name, int(ordinal), NoProgress()))
        write_arrays(
            work / f"{stage.name}.safetensors", build_pipeline(spec, work).reduce(stage.name, files, NoProgress())
        )
    return build_pipeline(spec, work).assemble(into, files, NoProgress())


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_same_bytes_in_any_order(ensemble: Problem, tmp_path: Path, method: str) -> None:
    spec = ensemble.with_(method=EVERY_METHOD[method], search=IVF)
    summary = run(spec, tmp_path / "work", tmp_path / "one")
    assert run(spec, tmp_path / "work2", tmp_path / "two", seed=5) == summary
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert {"index.json", "factors.safetensors", "search.faiss"} < set(hashes(tmp_path / "one"))


def test_same_bytes_from_two_processes(problem: Problem, tmp_path: Path) -> None:
    """Even shards here, odd shards in another process, against all in one."""
    spec = problem.with_(method=METHODS["ekfac"])
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    code = """
import sys
from pathlib import Path
from attribution_core.arrays import write_arrays
from attribution_core.fit_spec import FitSpec
from attribution_core.methods.fit import FitPipeline
from attribution_core.progress import NoProgress
spec, work, stage = FitSpec.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3]
pipeline = FitPipeline(spec, work)
for shard in pipeline.stages()[0].shards[1::2]:
    write_arrays(work / stage / f"{shard.ordinal:05d}.safetensors", pipeline.run_shard(stage, shard.ordinal, NoProgress()))
"""
    work = tmp_path / "shared"
    pipeline = FitPipeline(spec, work)
    files: list[Path] = []
    for stage in pipeline.stages():
        files = [work / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        for shard in stage.shards[::2]:
            write_arrays(files[shard.ordinal], pipeline.run_shard(stage.name, shard.ordinal, NoProgress()))
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "spec.json"), str(work), stage.name],
            check=True,
            cwd=Path(__file__).parents[3],
        )
        write_arrays(work / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files, NoProgress()))
    pipeline.assemble(tmp_path / "two", files, NoProgress())
    run(spec, tmp_path / "alone", tmp_path / "one")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.parametrize(
    ("make", "measurement"), [("ensemble", "margin"), ("ensemble", "loss"), ("images", "margin"), ("images", "logit")]
)
@pytest.mark.parametrize("share", [0.3, 2.0])
def test_what_one_pass_keeps_for_the_next_changes_no_byte(
    make: str, tmp_path: Path, share: float, measurement: str, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """Nothing kept, some batches of some shards, everything."""
    problem = images(tmp_path / "images") if make == "images" else request.getfixturevalue(make)
    spec = problem.with_(method={"type": "ekfac"}, shard_size=25, batch_size=4, measurement=measurement)
    everything = FitContext(spec).kept_bytes(0) * len(ALL) * len(spec.checkpoints)
    real, passes, drawn = Fisher.draws, [], {}

    def draws(fisher: Fisher, run: Pass, task: Task, batch: Batch, *again: Any) -> Draws:
        passes.append(len(batch))
        return real(fisher, run, task, batch, *again)

    monkeypatch.setattr(Fisher, "draws", draws)
    for name, budget in (("none", 0), ("kept", int(share * everything))):
        monkeypatch.setattr(kept, "KEPT_BYTES", budget)
        fit(spec, tmp_path / "work", tmp_path / name, NoProgress())
        drawn[name] = sum(passes)
        passes.clear()
    spared, examples = drawn["none"] - drawn["kept"], len(ALL) * len(spec.checkpoints)
    assert spared == examples if share > 1 else 0 < spared < examples
    assert hashes(tmp_path / "none") == hashes(tmp_path / "kept")


def test_directions_that_matter_are_few_and_the_same_however_a_fit_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sure(tmp_path)
    method = {"type": "ekfac", "damping": 0.1, "residual_power": 1}
    assert FitContext(given.with_(method=method)).pseudo_gradients.fisher_of(0).least > 0
    labels = given.fit("labels", method=method | {"fisher": "exact"})
    reference = given.fit("reference", method=method)
    expected = reference.scores(reference.query(given.queries(), None), ALL, rescore=False)
    of_labels = labels.scores(labels.query(given.queries(), None), ALL, rescore=False)
    assert 0 < relative_error(expected, of_labels) < 0.12
    for budget in (0, kept.KEPT_BYTES):
        monkeypatch.setattr(kept, "KEPT_BYTES", budget)
        for shard_size, batch_size in ((60, 60), (7, 3), (1, 1)):
            index = given.fit("other", method=method, shard_size=shard_size, batch_size=batch_size)
            found = index.scores(index.query(given.queries(), None), ALL, rescore=False)
            assert relative_error(found, expected) < 1e-4  # labels do no better on weights as large as these


def test_a_shard_that_is_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """A worker that was broken off runs its shard again on the pipeline that kept a part of it."""
    spec = images(tmp_path).with_(method={"type": "ekfac"}, batch_size=4)
    pipeline = FitPipeline(spec, tmp_path / "work")
    with pytest.raises(Cancelled):
        pipeline.run_shard("covariance", 0, Stopping(9))
    for number in range(3):
        write_arrays(tmp_path / f"{number}", pipeline.run_shard("covariance", 0, NoProgress()))
        fresh = FitPipeline(spec, tmp_path / "work").run_shard("covariance", 0, NoProgress())
        write_arrays(tmp_path / f"fresh-{number}", fresh)
    assert len({sha256_file(path) for path in tmp_path.glob("*[0-9]") if path.is_file()}) == 1


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_scores_do_not_depend_on_shards_or_batches(ensemble: Problem, method: str) -> None:
    reference = ensemble.fit("reference", method=EVERY_METHOD[method])
    expected = reference.scores(reference.query(ensemble.queries(), None), ALL, rescore=False)
    for shard_size, batch_size in ((60, 60), (7, 3), (1, 1)):
        index = ensemble.fit("other", method=EVERY_METHOD[method], shard_size=shard_size, batch_size=batch_size)
        found = index.scores(index.query(ensemble.queries(), None), ALL, rescore=False)
        assert relative_error(found, expected) < 1e-5
        if index.spec.method.self_influence:
            assert relative_error(index.self_influence(), reference.self_influence()) < 1e-5
        assert index.spec.fingerprint() == reference.spec.fingerprint()


@pytest.mark.parametrize(
    ("method", "dtype", "error"),
    [
        (method, dtype, error)
        for method in METHODS
        for dtype, error in (("float16", 3e-3), ("int8", 0.1), ("binary", np.inf))
        if dtype != "binary" or method not in ("trak", "representation")
    ],
)
def test_smaller_rows_stay_close(problem: Problem, method: str, dtype: str, error: float) -> None:
    full = problem.fit("full", method=METHODS[method], store={"dtype": "float32", "layout": "vectors"})
    small = problem.fit("small", method=METHODS[method], store={"dtype": dtype, "layout": "vectors"})
    expected = full.scores(full.query(problem.queries(), None), ALL, rescore=False)
    query = small.query(problem.queries(), None)
    found = small.scores(query, ALL, rescore=False)
    assert 0 < relative_error(found, expected) < error
    assert full.spec.fingerprint() != small.spec.fingerprint()
    np.testing.assert_allclose(small.self_influence(), full.self_influence(), rtol=1e-5)
    assert small.recall is not None
    assert 0.1 < small.recall <= 1
    if small.rescores:
        exact = small.scores(query, ALL, rescore=True)
        assert relative_error(exact, full.scores(full.query(problem.queries(), None), ALL, rescore=True)) < 1e-6
    answer = small.attribute(query, 5, None, rescore=False)[0]
    assert answer.approximate == (small.rescores or dtype in ("int8", "binary"))
    np.testing.assert_allclose(answer.positive.scores, found[0][answer.positive.rows], rtol=1e-4)


def test_recall_tells_what_storing_rows_loses(problem: Problem) -> None:
    """Where stored rows are the method's own definition, they are compared with what they were before."""
    sizes = ("float32", "int8")
    trak = {"type": "trak", "projection": {**SMALL, "dim": 64}, "damping": 1e-4}
    found = [problem.fit(dtype, method=trak, store={"dtype": dtype}).recall for dtype in sizes]
    assert found[0] == 1
    assert found[1] is not None
    assert found[1] < 0.9


def test_recall_costs_nothing_where_there_is_no_first_stage(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("queries were encoded to measure a recall that is 1")

    monkeypatch.setattr(LoadedIndex, "joined", forbidden)
    spec = problem.with_(method={"type": "ekfac"}, store={"layout": "factors"})
    assert fit(spec, tmp_path / "work", tmp_path / "index", NoProgress()).recall == 1
    with pytest.raises(AssertionError, match="recall"):
        fit(problem.with_(method={"type": "ekfac"}), tmp_path / "work2", tmp_path / "other", NoProgress())


def test_int8_factors_are_close_and_say_so(problem: Problem) -> None:
    whole, small = (
        problem.fit(dtype, method=METHODS["ekfac"], store={"dtype": dtype, "layout": "factors"})
        for dtype in ("float32", "int8")
    )
    expected, found = (
        index.scores(index.query(problem.queries(), None), ALL, rescore=True) for index in (whole, small)
    )
    assert 1e-5 < relative_error(found, expected) < 0.02
    groups = [ALL[::2]]
    effects = [
        index.group_effects(index.query(problem.queries(), None), groups, rescore=True) for index in (whole, small)
    ]
    assert relative_error(effects[1], effects[0]) < 0.02
    assert small.bytes < whole.bytes
    for index, approximate in ((whole, False), (small, True)):
        answer = index.attribute(index.query(problem.queries(), None), 5, None, rescore=True)[0]
        assert answer.approximate == approximate
    assert small.recall is not None
    assert 0.9 < small.recall <= 1


def test_bits_are_for_vectors(problem: Problem) -> None:
    with pytest.raises(ValueError, match="binary"):
        problem.with_(store={"dtype": "binary", "layout": "factors"})
    assert problem.fit("bits", store={"dtype": "binary"}).gradients is None


@pytest.mark.parametrize("method", ["trak", "logra", "representation"])
def test_bits_are_for_methods_that_score_again(problem: Problem, tmp_path: Path, method: str) -> None:
    """TRAK's LDS fell from 0.43 to 0.02 on signs (docs/studies/stores.md)."""
    spec = problem.with_(method={"type": method}, store={"dtype": "binary"})
    with pytest.raises(InvalidInputError, match="stored rows alone") as refused:
        FitPipeline(spec, tmp_path)
    assert refused.value.pointer == "/store/dtype"


def test_spec_survives_json(ensemble: Problem) -> None:
    spec = ensemble.with_(method=METHODS["trak"], layers=["layers.0"])
    copied = FitSpec.model_validate_json(spec.model_dump_json())
    assert copied == spec
    assert copied.fingerprint() == spec.fingerprint()


def test_stages_cover_every_row_once_per_checkpoint(ensemble: Problem, tmp_path: Path) -> None:
    stages = FitPipeline(ensemble.with_(method=METHODS["ekfac"]), tmp_path).stages()
    assert [stage.name for stage in stages] == ["covariance", "eigenvalues", "features"]
    for stage in stages:
        assert [shard.ordinal for shard in stage.shards] == list(range(12))
        for checkpoint in range(3):
            covered = [range(shard.start, shard.stop) for shard in stage.shards if shard.checkpoint == checkpoint]
            assert [row for part in covered for row in part] == list(range(60))


def test_progress_counts_examples_and_can_stop_the_work(problem: Problem, tmp_path: Path) -> None:
    progress = Stopping(16)
    with pytest.raises(Cancelled):
        FitPipeline(problem.spec, tmp_path).run_shard("features", 0, progress)
    assert progress.done == 16


@pytest.mark.parametrize(
    ("method", "places"),
    [
        ({"type": "ekfac"}, {"covariance": {"_of_these_sums", "eigenvectors"}, "eigenvalues": {"summed_arrays"}}),
        ({"type": "kfac"}, {"covariance": {"_of_these_sums", "eigenvectors"}}),
        ({"type": "explicit", "damping": 10.0}, {"hessian": {"summed_arrays"}}),
        ({"type": "trak", "projection": SMALL}, {"features": {"kernel_of"}}),
        ({"type": "trak", "projection": SMALL, "curvature": "fisher"}, {"kernel": {"summed_arrays"}}),
        ({"type": "logra"}, {"features": {"fisher_of"}}),
        ({"type": "gauss_newton"}, {"eigenvalues": {"summed_arrays", "_kept", "diagonals", "gram"}}),
    ],
    ids=["ekfac", "kfac", "explicit", "trak", "trak fisher", "logra", "gauss_newton"],
)
def test_a_reduction_stops_between_any_two_of_its_parts(
    tmp_path: Path, method: dict[str, Any], places: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, layers, batches whose rows are chosen, blocks of rows that are multiplied; and goes on to the same bytes."""
    monkeypatch.setattr(curvature_rows, "_ROWS_AT_ONCE", 10)
    spec, work = images(tmp_path / "images").with_(method=method), tmp_path / "work"
    run(spec, work, tmp_path / "index")
    stopped: dict[str, set[str]] = {}
    pipeline = build_pipeline(spec, work)
    for stage in pipeline.stages():
        files = sorted((work / stage.name).iterdir())
        parts, at = set[str](), 1
        while (reduced := interrupted(pipeline, stage.name, files, at, parts)) is None:
            at += 1
        stopped[stage.name] = parts
        write_arrays(tmp_path / "again", reduced)
        assert (tmp_path / "again").read_bytes() == (work / f"{stage.name}.safetensors").read_bytes()
    assert all(found <= stopped[name] for name, found in places.items())


def interrupted(
    pipeline: AnyPipeline, stage: str, files: list[Path], at: int, parts: set[str]
) -> dict[str, np.ndarray] | None:
    """Reduce a stage, but stop at a report; note the functions that were running. None if that report came."""
    progress = Interrupting(at)
    try:
        return pipeline.reduce(stage, files, progress)
    except Cancelled as stop:
        assert progress.reports == at
        parts |= {frame.name for frame in traceback.extract_tb(stop.__traceback__)}
        return None


@pytest.mark.parametrize("method", ["trak", "ekfac", "gauss_newton"])
def test_a_fit_that_is_cancelled_in_a_reduction_leaves_nothing_half_written(tmp_path: Path, method: str) -> None:
    problem = images(tmp_path / "images")
    spec, work = problem.with_(method={"type": method, "projection": SMALL}), tmp_path / "work"
    run(spec, tmp_path / "whole", tmp_path / "expected")
    fit(spec, work, tmp_path / "counted", counting := Interrupting())
    pipeline = build_pipeline(spec, tmp_path / "whole")
    pipeline.assemble(tmp_path / "assembled", features_of(tmp_path / "whole"), assembling := Interrupting())
    in_reductions = counting.reports - assembling.reports
    for at in (1, in_reductions // 2, in_reductions):
        progress = Interrupting(at)
        with pytest.raises(Cancelled):
            fit(spec, work, tmp_path / "index", progress)
        assert progress.reports == at
        assert not (tmp_path / "index").exists()
        assert hashes(work).items() < hashes(tmp_path / "whole").items()
    fit(spec, work, tmp_path / "index", NoProgress())
    assert hashes(tmp_path / "index") == hashes(tmp_path / "counted") == hashes(tmp_path / "expected")


@pytest.mark.parametrize("search", [{}, IVF])
def test_an_artifact_can_be_given_up_while_it_is_laid_out(
    problem: Problem, tmp_path: Path, search: dict[str, Any]
) -> None:
    spec = problem.with_(method=METHODS["grad_dot"], search=search)
    work = tmp_path / "work"
    run(spec, work, tmp_path / "expected")
    pipeline, files = build_pipeline(spec, work), features_of(work)
    pipeline.assemble(tmp_path / "counted", files, counting := Interrupting())
    passes = 4 if search else 2  # rows are written, sampled, added and scored
    assert counting.reports == passes * (len(files) + 1)
    for at in range(1, counting.reports, len(files) + 1):  # at the beginning of each pass
        with pytest.raises(Cancelled):
            pipeline.assemble(tmp_path / f"{at}", files, Interrupting(at))
    pipeline.assemble(tmp_path / "again", files, NoProgress())
    assert hashes(tmp_path / "again") == hashes(tmp_path / "counted") == hashes(tmp_path / "expected")


def features_of(work: Path) -> list[Path]:
    return sorted((work / "features").iterdir())


def test_summary_describes_the_artifact(problem: Problem, tmp_path: Path) -> None:
    spec = problem.with_(method=METHODS["grad_dot"], layers=None)
    summary = run(spec, tmp_path / "work", tmp_path / "index")
    assert summary.num_examples == 60
    assert summary.dim == 256
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "index").rglob("*") if path.is_file())
    assert summary.recall == 1.0  # 60 examples are all re-scored
    assert summary.coverage["percent"] == 100.0
    assert LoadedIndex(tmp_path / "index", spec).recall == 1.0
