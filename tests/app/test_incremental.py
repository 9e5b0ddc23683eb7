"""Appending and deleting examples over HTTP: versions, extensions, drift, refreshes, and that what is deleted is gone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.app.problems import is_problem
from tests.conftest import Loaded, save_digits
from tests.service import Service

FIRST, N = 520, 600
EKFAC = {"type": "ekfac", "projection": {"dim": 64}}
SPEC = {"kind": "image", "input": "image", "target": "label", "metadata": ["source"]}
QUERY = {"queries": [{"dataset": "test", "rows": [3, 8]}]}


def done(loaded: Loaded, job: dict) -> dict:
    found = loaded.service.finished(job)
    assert found["state"] == "succeeded", found["error"]
    return found


def base(loaded: Loaded, folder: Path, name: str) -> None:
    """Import the first digits."""
    file = save_digits(folder / f"{name}.npz", 0, FIRST)
    done(loaded, loaded.service.upload("/v1/datasets", file, 202, spec={"name": name, **SPEC}))


def appended(loaded: Loaded, folder: Path, name: str, start: int = FIRST, stop: int = N) -> dict:
    file = save_digits(folder / f"{name}-{start}.npz", start, stop)
    job = loaded.service.upload(f"/v1/datasets/{name}/versions", file, 202, spec={})
    done(loaded, job)
    return loaded.service.get(f"/v1/datasets/{job['resource_id']}")


def scores(service: Service, index: str, top_k: int = N) -> list[dict[int, float]]:
    answer = service.post(f"/v1/indexes/{index}/attributions", {**QUERY, "top_k": top_k})
    return [
        {entry["row"]: entry["score"] for sign in ("positive", "negative") for entry in result[sign]}
        for result in answer["results"]
    ]


def pages(service: Service, path: str) -> list[dict]:
    """Every item of a list."""
    found, cursor = [], None
    while True:
        page = service.http.get(path, params={"limit": 200} | ({"cursor": cursor} if cursor else {})).json()
        found += page["items"]
        if (cursor := page["next"]) is None:
            return found


def shard_hashes(service: Service, index: str, generation: int) -> dict[str, str]:
    name = service.get(f"/v1/indexes/{index}")["id"] + (f".{generation}" if generation > 1 else "")
    folder = service.data / "artifacts" / "indexes" / name
    files = [path for part in ("features", "gradients") for path in (folder / part).glob("*")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_version_has_its_parents_rows_and_then_its_own(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    base(loaded, tmp_path, "grown")
    version = appended(loaded, tmp_path, "grown")
    parent = service.get("/v1/datasets/grown")
    assert (version["name"], version["version"], version["parent"]) == ("grown.v2", 2, parent["id"])
    assert (parent["num_examples"], version["num_examples"]) == (FIRST, N)
    assert version["sha256"] == service.get("/v1/datasets/digits")["sha256"], "the content of both as one"
    row = service.get(f"/v1/datasets/grown.v2/examples/{FIRST}")
    assert row["target"] == service.get(f"/v1/datasets/digits/examples/{FIRST}")["target"]
    assert row["id"] == str(FIRST)
    is_problem(service.http.delete("/v1/datasets/grown"), 409, "in-use")
    again = appended(loaded, tmp_path, "grown.v2", N, N + 10)
    assert (again["name"], again["version"], again["num_examples"]) == ("grown.v3", 3, N + 10)


def test_wrong_versions_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    file = save_digits(tmp_path / "more.npz", FIRST, N)
    for name, spec, status, slug in [
        ("nothing", {}, 404, "not-found"),
        ("test", {"name": "digits"}, 409, "name-taken"),
        ("test", {"kind": "image"}, 422, "invalid-request"),
        ("test", {"source": "files:numbers.csv"}, 422, "invalid-request"),
    ]:
        with file.open("rb") as stream:
            data = {"spec": json.dumps(spec)}
            answer = service.http.post(f"/v1/datasets/{name}/versions", data=data, files={"file": ("a.npz", stream)})
        is_problem(answer, status, slug)
    job = service.post("/v1/datasets/test/versions", {"name": "unlike", "source": "files:numbers.csv"}, 202)
    failed = service.finished(job)
    assert (failed["state"], failed["error"]["type"]) == ("failed", "/problems/invalid-request")
    assert service.get("/v1/datasets/unlike")["status"] == "failed"
    assert service.http.delete("/v1/datasets/unlike").status_code == 204


def test_an_index_is_extended_by_new_rows_only(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    base(loaded, tmp_path, "growing")
    done(loaded, loaded.fit("growing", EKFAC, dataset="growing"))
    before, old = service.get("/v1/indexes/growing"), scores(service, "growing")
    assert (before["generation"], before["training_examples"], before["drift"]) == (1, FIRST, None)
    kept = shard_hashes(service, "growing", 1)
    version = appended(loaded, tmp_path, "growing")
    headers = {"Idempotency-Key": "extend-growing"}
    sent = [
        service.http.post("/v1/indexes/growing/extensions", json={"dataset": version["id"]}, headers=headers)
        for _ in range(2)
    ]
    assert [answer.status_code for answer in sent] == [202, 202]
    assert sent[0].json()["id"] == sent[1].json()["id"]
    job = done(loaded, sent[0].json())
    assert job["kind"] == "extension"
    assert (job["progress"]["done"], job["progress"]["total"]) == (2 * (N - FIRST), 2 * (N - FIRST))
    after = service.get("/v1/indexes/growing")
    assert (after["generation"], after["training_examples"], after["dataset"]) == (2, N, version["id"])
    assert after["pending"] is None
    assert after["fingerprint"] != before["fingerprint"]
    assert 0 <= after["drift"]["value"] < 0.5
    later = shard_hashes(service, "growing", 2)
    assert kept.items() <= later.items()
    assert len(later) > len(kept)
    answer = service.post("/v1/indexes/growing/attributions", QUERY)
    assert (answer["generation"], answer["drift"]) == (2, after["drift"]["value"])
    for was, now in zip(old, scores(service, "growing"), strict=True):
        assert any(row >= FIRST for row in now)
        assert {row: score * FIRST / N for row, score in was.items()} == pytest.approx(
            {row: score for row, score in now.items() if row < FIRST}, rel=1e-4, abs=1e-6
        )
    refreshed = done(loaded, service.post("/v1/indexes/growing/refresh", {}, 202))
    assert refreshed["kind"] == "refresh"
    found = service.get("/v1/indexes/growing")
    assert (found["generation"], found["drift"], found["training_examples"]) == (3, None, N)
    done(loaded, loaded.fit("whole", EKFAC, dataset=version["id"]))
    assert scores(service, "growing") == scores(service, "whole"), "a refresh is a fit of what there is"
    folders = {path.name for path in (service.data / "artifacts" / "indexes").glob(f"{found['id']}*")}
    assert folders == {f"{found['id']}.2", f"{found['id']}.3"}, "the one before is kept for questions in flight"
    assert service.http.delete("/v1/indexes/growing").status_code == 204
    assert not list((service.data / "artifacts" / "indexes").glob(f"{found['id']}*"))


def test_drift_tells_noise_from_digits(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    base(loaded, tmp_path, "drifting")
    done(loaded, loaded.fit("drifting", EKFAC, dataset="drifting"))
    done(loaded, loaded.fit("drifting-too", EKFAC, dataset="drifting"))
    alike = appended(loaded, tmp_path, "drifting")
    noise = np.random.default_rng(0).integers(0, 256, (80, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", image=noise, label=np.arange(80) % 10, source=np.array(["noise"] * 80))
    job = service.upload("/v1/datasets/drifting/versions", tmp_path / "noise.npz", 202, spec={"name": "noisy"})
    done(loaded, job)
    for index, dataset in (("drifting", alike["id"]), ("drifting-too", "noisy")):
        done(loaded, service.post(f"/v1/indexes/{index}/extensions", {"dataset": dataset}, 202))
    drift = [service.get(f"/v1/indexes/{index}")["drift"]["value"] for index in ("drifting", "drifting-too")]
    assert drift[1] > 3 * drift[0]


def test_wrong_extensions_are_refused(steady: Loaded, tmp_path: Path) -> None:
    service = steady.service
    base(steady, tmp_path, "other")
    for index, dataset, status, slug in [
        ("steady", "other", 422, "invalid-request"),
        ("steady", "digits", 422, "invalid-request"),
        ("steady", "nothing", 404, "not-found"),
        ("nothing", "digits", 404, "not-found"),
    ]:
        is_problem(service.http.post(f"/v1/indexes/{index}/extensions", json={"dataset": dataset}), status, slug)
    method = {"type": "datainf", "projection": {"dim": 64}}
    done(steady, steady.fit("no-factors", method, dataset="other"))
    appended(steady, tmp_path, "other")
    answer = service.http.post("/v1/indexes/no-factors/extensions", json={"dataset": "other.v2"})
    assert "factors" in is_problem(answer, 409, "conflict")["detail"]


def test_deleted_examples_are_gone_from_every_answer(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    base(loaded, tmp_path, "shrinking")
    for name, method in (("shrinking", EKFAC), ("shrinking-dot", {"type": "grad_cos", "projection": {"dim": 64}})):
        done(loaded, loaded.fit(name, method, dataset="shrinking"))
    before = {name: scores(service, name, 20) for name in ("shrinking", "shrinking-dot")}
    gone = sorted({row for answer in before.values() for one in answer for row in list(one)[:3]})
    atypical = service.get("/v1/indexes/shrinking/self-influence?limit=5")["items"]
    gone = sorted({*gone, atypical[0]["row"]})
    deleted = service.post("/v1/datasets/shrinking/deletions", {"selector": {"rows": gone}})
    assert (deleted["deleted"], deleted["total"]) == (len(gone), len(gone))
    again = service.post("/v1/datasets/shrinking/deletions", {"selector": {"ids": [str(gone[0])]}})
    assert (again["deleted"], again["total"]) == (0, len(gone))
    assert service.get("/v1/datasets/shrinking")["deleted"] == len(gone)
    for name in before:
        for one in scores(service, name):
            assert not set(gone) & set(one)
        assert all(len(one) == 40 for one in scores(service, name, 20)), "others take their places"
    listed = pages(service, "/v1/indexes/shrinking/self-influence")
    assert listed[0]["row"] == next(item["row"] for item in atypical if item["row"] not in gone)
    for every in (listed, pages(service, "/v1/datasets/shrinking/examples")):
        assert {item["row"] for item in every} == set(range(FIRST)) - set(gone)
    for path in (f"examples/{gone[0]}", f"examples/{gone[0]}/preview"):
        is_problem(service.http.get(f"/v1/datasets/shrinking/{path}"), 410, "gone")
    ask = {"queries": [{"dataset": "shrinking", "rows": gone[:1]}]}
    is_problem(service.http.post("/v1/indexes/shrinking/attributions", json=ask), 422, "invalid-request")
    named = {**QUERY, "subsets": [{"remove": {"rows": gone[:1]}}]}
    is_problem(service.http.post("/v1/indexes/shrinking/counterfactuals", json=named), 422, "invalid-request")
    forget = {**QUERY, "forget": {"ids": [str(gone[0])]}}
    is_problem(service.http.post("/v1/indexes/shrinking/unlearning", json=forget), 422, "invalid-request")
    every_row = {"field": "row", "op": "gte", "value": 0}
    kept = np.setdiff1d(np.arange(FIRST), gone)
    subsets = [{"keep": {"rows": kept[:100].tolist()}}, {"remove": {"where": {**every_row, "value": FIRST - 20}}}]
    subsets.append({"remove": {"top_positive": 5}})
    found = service.post("/v1/indexes/shrinking/counterfactuals", {**QUERY, "subsets": subsets})
    removed = [prediction["removed"] for prediction in found["results"][0]["predictions"]]
    assert removed == [len(kept) - 100, int((kept >= FIRST - 20).sum()), 5]
    top = sum(sorted(scores(service, "shrinking")[0].values(), reverse=True)[:5])
    assert found["results"][0]["predictions"][2]["change"] == pytest.approx(-top, rel=1e-4)
    whole = {**QUERY, "subsets": [{"remove": {"where": every_row}}]}
    is_problem(service.http.post("/v1/indexes/shrinking/counterfactuals", json=whole), 422, "invalid-request")
    unlearned = service.post(
        "/v1/indexes/shrinking/unlearning", {**QUERY, "forget": {"where": {**every_row, "op": "lt", "value": 50}}}
    )
    assert unlearned["forget_size"] == int((kept < 50).sum())
    everything = {"selector": {"where": every_row}}
    is_problem(service.http.post("/v1/datasets/shrinking/deletions", json=everything), 422, "invalid-request")


def test_deletions_hold_for_every_version_and_later_fits_leave_them_out(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    base(loaded, tmp_path, "family")
    done(loaded, loaded.fit("family", EKFAC, dataset="family"))
    version = appended(loaded, tmp_path, "family")
    gone = [0, 100, FIRST - 1, FIRST, N - 1]
    total = service.post("/v1/datasets/family.v2/deletions", {"selector": {"rows": gone}})["total"]
    assert total == 5
    assert service.get("/v1/datasets/family")["deleted"] == 3, "rows that the first version brought"
    is_problem(service.http.get("/v1/datasets/family/examples/100"), 410, "gone")
    assert not {0, 100, FIRST - 1} & set(scores(service, "family")[0])
    job = service.post("/v1/indexes/family/extensions", {"dataset": version["id"]}, 202)
    assert done(loaded, job)["progress"]["done"] == 2 * (N - FIRST - 2)
    found = service.get("/v1/indexes/family")
    assert found["training_examples"] == N - 5
    extended = scores(service, "family")
    assert not set(gone) & set(extended[0])
    done(loaded, service.post("/v1/indexes/family/refresh", {}, 202))
    refreshed = scores(service, "family")
    done(loaded, loaded.fit("family-anew", EKFAC, dataset=version["id"]))
    assert service.get("/v1/indexes/family-anew")["training_examples"] == N - 5
    assert refreshed == scores(service, "family-anew")
    rows = np.setdiff1d(np.arange(N), gone)
    part = np.load(save_digits(tmp_path / "all.npz", 0, N))
    np.savez(tmp_path / "kept.npz", **{name: part[name][rows] for name in part})
    done(loaded, service.upload("/v1/datasets", tmp_path / "kept.npz", 202, spec={"name": "kept", **SPEC}))
    done(loaded, loaded.fit("kept", EKFAC, dataset="kept"))
    for one, other in zip(refreshed, scores(service, "kept"), strict=True):
        same = {int(rows[row]): score for row, score in other.items()}
        assert one == pytest.approx(same, rel=1e-3, abs=1e-6), "as if they had never been there"


def test_nothing_is_fitted_to_a_version_whose_examples_are_all_deleted(loaded: Loaded, tmp_path: Path) -> None:
    """A later version may be asked to delete every row of the one before, as it has others."""
    service = loaded.service
    base(loaded, tmp_path, "emptied")
    done(loaded, loaded.fit("emptied", EKFAC, dataset="emptied"))
    version = appended(loaded, tmp_path, "emptied")
    service.post(f"/v1/datasets/{version['id']}/deletions", {"selector": {"rows": list(range(FIRST))}})
    asked = {"name": "again", "model": "mlp", "dataset": "emptied", "method": EKFAC}
    for path, body in {"indexes": asked, "indexes/emptied/refresh": {}}.items():
        is_problem(service.http.post(f"/v1/{path}", json=body), 409, "not-ready")


def test_an_extension_that_is_cancelled_changes_nothing_and_can_be_tried_again(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    base(loaded, tmp_path, "halted")
    done(loaded, loaded.fit("halted", EKFAC, dataset="halted"))
    before = scores(service, "halted")
    version = appended(loaded, tmp_path, "halted")
    busy = loaded.fit("halted-busy", EKFAC, dataset="halted")  # the one worker does one thing after the other
    job = service.post("/v1/indexes/halted/extensions", {"dataset": version["id"]}, 202)
    second = service.http.post("/v1/indexes/halted/refresh")
    service.post(f"/v1/jobs/{job['id']}/cancel", {}, 202)
    assert service.finished(job)["state"] == "cancelled"
    done(loaded, busy)
    assert "being made already" in is_problem(second, 409, "conflict")["detail"]
    found = service.get("/v1/indexes/halted")
    assert (found["status"], found["generation"]) == ("ready", 1)
    assert (found["pending"]["status"], found["pending"]["kind"]) == ("failed", "extension")
    assert scores(service, "halted") == before
    refreshed = done(loaded, service.post("/v1/indexes/halted/refresh", {}, 202))
    is_problem(service.http.post(f"/v1/jobs/{job['id']}/retry"), 409, "conflict")
    found = service.get("/v1/indexes/halted")
    assert (found["generation"], found["pending"], found["drift"]) == (3, None, None)
    assert refreshed["progress"]["total"] == 3 * FIRST
    assert scores(service, "halted") == before, "a refresh of the same data is the same"
    busy = loaded.fit("halted-again", EKFAC, dataset="halted")
    job = service.post("/v1/indexes/halted/extensions", {"dataset": version["id"]}, 202)
    service.post(f"/v1/jobs/{job['id']}/cancel", {}, 202)
    is_problem(service.http.delete("/v1/datasets/halted"), 409, "in-use")
    service.post(f"/v1/jobs/{job['id']}/retry", {}, 202)
    done(loaded, busy)
    done(loaded, job)
    found = service.get("/v1/indexes/halted")
    assert (found["generation"], found["pending"], found["training_examples"]) == (4, None, N)
