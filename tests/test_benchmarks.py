"""The benchmark's table is filled over several runs: rows that a run does not choose stay as the results file has them."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report, run
from benchmarks.cost import damping_name
from benchmarks.damping_laws import Known, distances
from benchmarks.lds import Truth
from benchmarks.plan import Damping, Entry
from benchmarks.report import NOT_MEASURED
from benchmarks.workloads import WORKLOADS, Workload

OURS = Entry("headwater", "ekfac", "none", {"type": "ekfac"}, dampings=(None, 0.5))
PEER = Entry("peer", "TRAK", "none", dampings=(None, 0.5))
SCALES = {None: 2.0, 0.5: 1.0, 0.1: 1.2, 0.02: 1.4, 0.01: 1.6, 0.001: 1.7, -1.0: 1.8, 7.0: 4.0, 90.0: 9.0}
N, QUERIES, SUBSETS = 20, 12, 16
EFFECTS = np.random.default_rng(0).normal(size=(QUERIES, N))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs the benchmark of a made-up workload and returns its results and what was measured."""
    generator = np.random.default_rng(1)
    masks = np.stack([generator.permutation(N) < N // 2 for _ in range(SUBSETS)])
    values = (masks @ EFFECTS.T)[:, None] + generator.normal(size=(SUBSETS, 2, QUERIES))
    measured: list[tuple[str, int, tuple[Damping, ...]]] = []

    def measure(entry: Entry, workload: Workload, checkpoints: int, dampings, timeout: int, resume: bool) -> Path:
        """Write scores that are further from the truth with fewer checkpoints, for the peer and at the default damping."""
        folder = tmp_path / f"{entry.peer}-{checkpoints}"
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(len(entry.peer)).normal(size=EFFECTS.shape)
        for damping in dampings:
            size = SCALES[damping] * (1.5 if entry.peer == "peer" else 1.0) / checkpoints
            np.save(folder / f"scores-{damping_name(damping)}.npy", EFFECTS + size * noise)
        (folder / "cost.json").write_text(json.dumps({"feature_seconds": 1.0}))
        measured.append((entry.peer, checkpoints, tuple(dampings)))
        return folder

    truth = Truth(masks, values)
    monkeypatch.setattr(run, "ENTRIES", (OURS, PEER))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "prepare", lambda workload: {})
    monkeypatch.setattr(run, "retrain", lambda workload, data: None)
    monkeypatch.setattr(run, "dataset_of", lambda workload, data: None)
    monkeypatch.setattr(run.Truth, "read", lambda path: truth)

    def once(peers: list[str] | None, checkpoints: list[int] | None = None, missing: bool = False):
        measured.clear()
        chosen = argparse.Namespace(
            peer=peers, method=None, checkpoints=checkpoints, missing=missing, timeout=1, resume=False
        )
        run.bench(WORKLOADS["mnist-mlp"], chosen)
        return json.loads((tmp_path / "results/mnist-mlp.json").read_text()), list(measured)

    return once


def _rows(results, peer: str):
    return [row for row in results["rows"] if row["peer"] == peer]


def test_rows_that_are_not_chosen_stay_and_are_compared(bench):
    first, measured = bench(["peer"])
    assert measured == [("peer", 1, (None, 0.5)), ("peer", 5, (None, 0.5))]
    assert [row["error"] for row in _rows(first, "headwater")] == [NOT_MEASURED] * 2
    assert first["compared"] == {"1": {}, "5": {}}
    second, measured = bench(["headwater"])
    assert [peer for peer, _, _ in measured] == ["headwater"] * 2
    assert _rows(second, "peer") == _rows(first, "peer")
    together, measured = bench(None)
    assert len(measured) == 4
    assert second == together
    difference = second["compared"]["1"]["difference"]
    ours, peer = (_rows(second, name)[0] for name in ("headwater", "peer"))
    expected = ours["dampings"][ours["best"]]["lds"] - peer["dampings"][peer["best"]]["lds"]
    assert difference["lds"] == pytest.approx(expected, abs=1e-4)
    assert 0 < difference["low"] < difference["lds"] < difference["high"]


def test_what_is_missing_is_measured_alone(bench):
    bench(["peer"])
    bench(["headwater"], [1])
    _, measured = bench(None, missing=True)
    assert [(peer, checkpoints) for peer, checkpoints, _ in measured] == [("headwater", 5)]
    _, measured = bench(None, missing=True)
    assert measured == []


def test_more_checkpoints_are_tried_around_the_best_damping_of_a_row_that_was_written_earlier(bench, monkeypatch):
    wide = Entry("peer", "TRAK", "none", dampings=(None, -1.0, 90.0, 7.0, 0.5, 0.01, 0.1, 0.001, 0.02))
    monkeypatch.setattr(run, "ENTRIES", (wide,))
    bench(["peer"], [1])
    monkeypatch.setattr(run, "ENTRIES", (Entry("peer", "TRAK", "none", dampings=(None, 7.0)),))
    _, measured = bench(["peer"], [5])
    assert measured == [("peer", 5, (None, 0.5, 0.01, 0.02, 0.1, 7.0))]


def test_a_row_of_other_options_is_not_kept(bench, monkeypatch):
    bench(["headwater"])
    other = Entry("headwater", "ekfac", "none", {"type": "ekfac", "fisher": "sampled"}, dampings=(None, 0.5))
    monkeypatch.setattr(run, "ENTRIES", (other, PEER))
    results, _ = bench(["peer"])
    assert [row["error"] for row in _rows(results, "headwater")] == [NOT_MEASURED] * 2


def _row(peer: str, method: str, lds: float, seconds: float):
    quality = {"lds": lds, "low": lds - 0.05, "high": lds + 0.05}
    costs = {"feature_seconds": seconds, "query_seconds": seconds, "peak_memory_mb": 100.0}
    return {
        "peer": peer,
        "method": method,
        "checkpoints": 1,
        "best": "default",
        "dampings": {"default": quality},
        **costs,
    }


def test_losses_are_those_of_our_default_and_of_our_best():
    rows = [_row("headwater", "ekfac", 0.5, 1.0), _row("headwater", "slow", 0.7, 9.0), _row("peer", "TRAK", 0.6, 2.0)]
    lines = report._losses({"rows": rows})
    assert [line for line in lines if line.startswith("*")] == [
        "* 1 checkpoint(s): our ekfac loses in LDS at its default damping to peer TRAK.",
        "* 1 checkpoint(s): our ekfac loses in LDS at its best damping to peer TRAK.",
        "* 1 checkpoint(s): our slow loses in feature seconds to peer TRAK.",
        "* 1 checkpoint(s): our slow loses in query seconds to peer TRAK.",
    ]
    assert report._losses({"rows": [rows[0], _row("peer", "TRAK", 0.4, 2.0)]}) == [
        "Where we lose: nowhere in this table."
    ]


@pytest.mark.parametrize(("lds", "expected"), [(0.59, "overlap"), (0.61, "disjoint"), (0.39, "disjoint")])
def test_a_comparison_says_whether_intervals_are_disjoint(lds: float, expected: str):
    ours, peer = (
        {**row, **row["dampings"]["default"]} for row in (_row("headwater", "a", lds, 1), _row("peer", "b", 0.5, 1))
    )
    pair = {"ours": ours, "peer": peer, "difference": {"lds": lds - 0.5, "low": 0.01, "high": 0.2}}
    page = report._summary([{"workload": "made-up", "ceiling": 1.0, "compared": {"1": pair, "5": {}}}])
    assert f"| win | {expected} |" in page
    assert page.endswith("the others would be ties.") is (expected == "overlap")
    assert f"{int(expected == 'disjoint')} of 1 pairs" in page


def test_a_laws_constant_is_chosen_on_other_architectures():
    """Here they want a damping ten times as large, at which it loses what one step of ten costs."""
    lds = {0.1: 0.3, 1.0: 0.5, 10.0: 0.4}
    shifted = {10 * damping: value for damping, value in lds.items()}
    known = [Known("mlp", 1.0, 3.0, lds), Known("cnn", 1.0, 3.0, shifted), Known("cnn", 1.0, 3.0, shifted)]
    found, of_all = distances(lambda one: one.scarcity, known, 100)
    by_others = {"cnn": 0.2, "mlp": 0.1}
    assert found == pytest.approx([by_others["cnn"], by_others["cnn"], by_others["mlp"]])
    assert of_all == pytest.approx(by_others["mlp"] / 3)
