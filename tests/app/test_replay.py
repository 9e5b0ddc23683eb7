"""Trainings, evaluations and verifications over HTTP, by real retraining of a small model on real digits."""

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import pytest
from sqlalchemy import func, select

from app.datasets import service as datasets
from app.db.embedded import get_server
from app.db.session import create_engine, create_sessionmaker
from app.errors import Conflict, InvalidRequest
from app.indexes import creation
from app.indexes import service as indexes
from app.indexes.schemas import IndexCreate
from app.jobs import service as jobs
from app.replay import service as replays
from app.replay.schemas import EvaluationCreate
from app.settings import DatabaseSettings, Settings
from app.storage.artifacts import ArtifactStore
from app.worker import verifications
from app.worker.runner import Runner, Running
from tests.conftest import MLP, Loaded, save_digits

RECIPE: dict[str, Any] = {
    "optimizer": {"type": "sgd", "momentum": 0.9},
    "learning_rate": 0.05,
    "weight_decay": 1e-3,
    "epochs": 4,
    "batch_size": 50,
}
PROTOCOL = {"alpha": 0.5, "subsets": 32, "seeds": 1}
EXPLICIT = {"type": "explicit", "curvature": "gauss_newton", "damping": 0.1}


@pytest.fixture(scope="module")
def trained(loaded: Loaded) -> Loaded:
    """The shared service with a model that was trained from its recipe, and an index of it."""
    service = loaded.service
    body = {"name": "retrained", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
    assert service.post("/v1/models", body, 201)["recipe"]["epochs"] == 4
    job = service.post("/v1/models/retrained/trainings", {"dataset": "digits", "seeds": [0, 1]}, 202)
    assert service.finished(job)["state"] == "succeeded"
    fit = {"name": "retrained-ekfac", "model": "retrained", "dataset": "digits", "method": {"type": "ekfac"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    return loaded


@pytest.fixture(scope="module")
def evaluated(trained: Loaded) -> dict[str, Any]:
    """The finished evaluation of the index."""
    body = {
        "queries": {"dataset": "test", "count": 30},
        "protocol": PROTOCOL,
        "deterministic": [0.9],
        "loo": {"examples": 4, "seeds": 2},
        "removal": {"top": [10], "queries": 2, "seeds": 1},
        "mislabelled": {"field": "row", "op": "lt", "value": 20},
        "source": "source",
        "tune": {"dampings": [0.01, 0.1, 1.0]},
    }
    job = trained.service.post("/v1/indexes/retrained-ekfac/evaluations", body, 202)
    assert trained.service.finished(job)["state"] == "succeeded"
    found: dict[str, Any] = trained.service.get("/v1/indexes/retrained-ekfac/evaluations")["items"][0]
    return found


def test_a_model_is_trained_from_its_recipe(trained: Loaded) -> None:
    (training,) = trained.service.get("/v1/models/retrained/trainings")["items"]
    assert training["status"] == "succeeded"
    assert [run["run"] for run in training["runs"]] == ["seed-0", "seed-1"]
    assert trained.service.get(f"/v1/models/retrained/trainings/{training['id']}") == training
    checkpoints = trained.service.get("/v1/models/retrained/checkpoints")["items"]
    assert {checkpoint["step"] for checkpoint in checkpoints} == {48}
    assert all(checkpoint["final"] for checkpoint in checkpoints)
    assert len({checkpoint["sha256"] for checkpoint in checkpoints}) == 2
    answer = trained.service.post(
        "/v1/indexes/retrained-ekfac/attributions", {"queries": [{"dataset": "test", "rows": list(range(30))}]}
    )
    right = [result["output"]["value"] > 0 for result in answer["results"]]
    assert np.mean(right) > 0.5, "a trained model is right about most digits"


def test_trajectories_have_their_learning_rates(trained: Loaded) -> None:
    body = {"dataset": "digits", "seeds": [0], "save_every": 20, "run": "path"}
    job = trained.service.post("/v1/models/retrained/trainings", body, 202)
    assert trained.service.finished(job)["state"] == "succeeded"
    items = trained.service.get("/v1/models/retrained/checkpoints")["items"]
    path = sorted((item for item in items if item["run"] == "path-0"), key=lambda item: item["step"])
    assert [(item["step"], item["final"]) for item in path] == [(20, False), (40, False), (48, True)]
    assert all(item["learning_rate"] == pytest.approx(0.05) for item in path)
    same = next(item for item in items if item["run"] == "seed-0")
    assert path[-1]["sha256"] == same["sha256"], "the same seed trains to the same bits"


def test_very_long_trainings_are_judged_at_once(trained: Loaded) -> None:
    """Of a training of 12 million steps a few are timed, and it is refused before its checkpoints are counted one by one."""
    service = trained.service
    endless = {**RECIPE, "epochs": 1_000_000}
    body = {"name": "endless", "architecture": MLP, "task": {"type": "classification"}, "recipe": endless}
    service.post("/v1/models", body, 201)
    for more, pointer in (({}, "/max_hours"), ({"save_every": 1}, "/save_every")):
        asked = {"dataset": "digits", "max_hours": 0.001, **more}
        answer = service.http.post("/v1/models/endless/trainings", json=asked)
        assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_what_is_named_twice_is_refused_where_it_stands(trained: Loaded) -> None:
    service = trained.service
    one = service.get("/v1/models/retrained/checkpoints")["items"][0]["id"]
    fit = {"name": "twice", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    subset, queries = {"remove": {"rows": [1]}}, [{"dataset": "test", "rows": [3]}]
    ascent = {"type": "gradient_ascent"}
    unlearned = {"forget": {"rows": [1]}, "run": "twice", "check": {"oracles": 2, "baselines": [ascent, ascent]}}
    for path, body, pointer in [
        ("models/retrained/trainings", {"dataset": "digits", "seeds": [7, 7], "run": "twice"}, "/seeds"),
        ("indexes", {**fit, "checkpoints": [one, one]}, "/checkpoints/1"),
        ("indexes/retrained-ekfac/verifications", {"queries": queries, "subsets": [subset], "seeds": [3, 3]}, "/seeds"),
        ("indexes/retrained-ekfac/unlearned-checkpoints", unlearned, "/check/baselines"),
    ]:  # fmt: skip
        answer = service.http.post(f"/v1/{path}", json=body)
        assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer]), path


def test_a_second_training_of_the_same_runs_is_refused(trained: Loaded) -> None:
    answer = trained.service.http.post("/v1/models/retrained/trainings", json={"dataset": "digits", "seeds": [1]})
    assert answer.status_code == 409
    assert answer.json()["errors"][0]["pointer"] == "/run"


def test_a_model_without_a_recipe_says_what_is_missing(steady: Loaded) -> None:
    for path, body in (
        ("models/mlp/trainings", {"dataset": "digits"}),
        ("indexes/steady/evaluations", {"queries": {"dataset": "test"}}),
        (
            "indexes/steady/verifications",
            {"queries": [{"dataset": "test", "rows": [0]}], "subsets": [{"remove": {"rows": [1]}}]},
        ),
    ):
        answer = steady.service.http.post(f"/v1/{path}", json=body)
        assert answer.status_code == 409, path
        assert answer.json()["type"] == "/problems/recipe-missing"
        assert "learning_rate" in answer.json()["detail"]


def test_an_evaluation_measures_against_real_retraining(trained: Loaded, evaluated: dict[str, Any]) -> None:
    quality = evaluated["quality"]
    low, high = quality["interval"]
    assert low < quality["lds"] < high
    assert quality["lds"] > 0.15, "EK-FAC predicts retraining of a small MLP"
    assert abs(quality["control"]["lds"]) < 0.15
    assert (quality["protocol"]["subsets"], quality["retrainings"]) == (16, 16), "tuning took the other half"
    assert quality["diverged"] == 0
    assert quality["deterministic"][0]["protocol"]["semantics"] == "mask"
    assert -1 <= quality["loo"]["correlation"] <= 1
    assert quality["removal"]["curves"]
    assert 0 <= quality["mislabel"]["auc"] <= 1
    assert quality["mixture"]
    assert quality["tuned"]["damping"] in (0.01, 0.1, 1.0)
    index = trained.service.get("/v1/indexes/retrained-ekfac")
    assert index["quality"]["lds"] == quality["lds"]
    assert trained.service.get("/v1/indexes/retrained-ekfac/quality")["quality"]["evaluation"] == evaluated["id"]


def test_answers_carry_quality_and_calibrated_intervals(trained: Loaded, evaluated: dict[str, Any]) -> None:
    half = {"remove": {"rows": list(range(0, 600, 2))}}
    few = {"remove": {"rows": [1, 2, 3]}}
    body = {"queries": [{"dataset": "test", "rows": [3, 8]}], "subsets": [half, few], "interval": 0.9}
    answer = trained.service.post("/v1/indexes/retrained-ekfac/counterfactuals", body)
    assert answer["quality"]["lds"] == evaluated["quality"]["lds"]
    assert answer["damping"] == evaluated["quality"]["tuned"]["damping"]
    for result in answer["results"]:
        inside, outside = result["predictions"]
        assert inside["calibrated"]
        low, high = inside["interval"]
        assert low <= inside["change"] <= high
        assert not outside["calibrated"], "three of 600 is far from the halves that were retrained"


def test_a_second_index_shares_the_bank(trained: Loaded, evaluated: dict[str, Any]) -> None:
    before = trained.service.get("/v1/banks")["items"]
    fit = {"name": "retrained-dot", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert trained.service.finished(trained.service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 30}, "protocol": PROTOCOL}
    job = trained.service.post("/v1/indexes/retrained-dot/evaluations", body, 202)
    ended = trained.service.finished(job)
    assert ended["state"] == "succeeded"
    assert ended["progress"]["total"] == 0, "nothing was trained again"
    after = trained.service.get("/v1/banks")["items"]
    assert [(bank["id"], bank["retrainings"]) for bank in after] == [(b["id"], b["retrainings"]) for b in before]


def test_methods_are_compared_on_one_bank(trained: Loaded, evaluated: dict[str, Any]) -> None:
    service = trained.service
    fit = {"name": "retrained-trak", "model": "retrained", "dataset": "digits", "method": {"type": "trak"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    tune = {"dampings": [0.1, 1.0], "candidates": ["retrained-ekfac"]}
    body = {"queries": {"dataset": "test", "count": 30}, "protocol": PROTOCOL, "tune": tune}
    job = service.finished(service.post("/v1/indexes/retrained-trak/evaluations", body, 202))
    assert job["state"] == "succeeded", job["error"]
    methods = service.get("/v1/indexes/retrained-trak/quality")["quality"]["tuned"]["methods"]
    assert {entry["method"] for entry in methods} == {"trak", "ekfac"}
    assert methods[0]["lds_tuning_half"] >= methods[1]["lds_tuning_half"]
    refused = service.http.post(
        "/v1/indexes/retrained-trak/evaluations", json={**body, "tune": {"candidates": ["steady"]}}
    )
    assert refused.status_code in (404, 422)


def test_a_new_generation_has_no_quality_and_no_calibration(trained: Loaded, evaluated: dict[str, Any]) -> None:
    service, half = trained.service, {"remove": {"rows": list(range(0, 600, 2))}}
    fit = {"name": "renewed", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 30}, "protocol": PROTOCOL}
    assert service.finished(service.post("/v1/indexes/renewed/evaluations", body, 202))["state"] == "succeeded"
    asked = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [half], "interval": 0.9}
    before = service.post("/v1/indexes/renewed/counterfactuals", asked)
    assert before["quality"] is not None
    assert before["results"][0]["predictions"][0]["calibrated"]
    assert service.finished(service.post("/v1/indexes/renewed/refresh", {}, 202))["state"] == "succeeded"
    after = service.post("/v1/indexes/renewed/counterfactuals", asked)
    assert after["quality"] is None
    assert not after["results"][0]["predictions"][0]["calibrated"]
    assert after["results"][0]["predictions"][0]["interval"] is None


def test_a_verification_lays_predictions_beside_retraining(trained: Loaded) -> None:
    body = {
        "queries": [{"dataset": "test", "rows": [3, 8]}],
        "subsets": [{"remove": {"top_positive": 60}}, {"keep": {"where": {"field": "row", "op": "lt", "value": 400}}}],
        "seeds": [0, 1],
    }
    answer = trained.service.http.post(
        "/v1/indexes/retrained-ekfac/verifications", json=body, headers={"Prefer": "wait=60"}
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["retrainings"] == 2 * (1 + 2 + 1)
    for result in found["results"]:
        helpful, kept = result["predictions"]
        assert (helpful["removed"], kept["removed"]) == (60, 200)
        assert len(helpful["realised_by_seed"]) == 2
        assert helpful["predicted_change"] < 0
        assert helpful["realised_change"] < 0, "without its helpful examples the margin falls"
        assert helpful["seed_noise"] >= 0
    listed = trained.service.get("/v1/indexes/retrained-ekfac/verifications")["items"]
    assert trained.service.get(f"/v1/indexes/retrained-ekfac/verifications/{found['id']}") == listed[0]


async def test_a_verification_retrains_the_same_sets_in_every_attempt(
    trained: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples that are deleted meanwhile change none, and with another generation of the index it does not go on."""
    body = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [{"remove": {"top_positive": 60}}]}
    job_id = trained.service.post("/v1/indexes/retrained-ekfac/verifications", body, 202)["id"]
    trained.service.finished({"id": job_id})
    data = trained.service.data.resolve()
    database = create_engine(DatabaseSettings(url=get_server(data / "postgres", cleanup_mode=None).get_uri()))
    sessions, artifacts = create_sessionmaker(database), ArtifactStore(data)
    runner = Runner(Settings(data_dir=data), sessions, artifacts, "w", {})
    monkeypatch.setattr(artifacts, "workspace", lambda job_id: tmp_path)
    async with sessions() as session:
        running = Running(await jobs.find(session, job_id))
        index = await indexes.find_ready(session, "retrained-ekfac")
    first, *_ = await verifications._prepared(runner, running)
    monkeypatch.setattr(datasets, "deleted_rows", AsyncMock(return_value=first._rows[0][0][:5].tolist()))
    again, *_ = await verifications._prepared(runner, running)
    assert list(first._sets) == list(again._sets)
    later = {"tuned": {"damping": 7.0}}
    monkeypatch.setattr(indexes, "find_ready", AsyncMock(return_value=index))
    monkeypatch.setattr(index, "quality", later)
    with pytest.raises(Conflict, match="ask again"):
        await verifications._prepared(runner, running)
    await database.dispose()


def test_checkpoints_are_unlearned_and_compared_with_retraining(trained: Loaded) -> None:
    service = trained.service
    fours = {"where": {"field": "target", "op": "eq", "value": 4}}
    body = {
        "forget": fours,
        "method": {"type": "newton"},
        "check": {"oracles": 4, "test": {"dataset": "test"}, "baselines": [{"type": "gradient_ascent"}]},
    }
    job = service.finished(service.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", body, 202))
    assert job["state"] == "succeeded", job["error"]
    (found,) = service.get("/v1/indexes/retrained-ekfac/unlearned-checkpoints")["items"]
    assert service.get(f"/v1/indexes/retrained-ekfac/unlearned-checkpoints/{found['id']}") == found
    assert found["forget_size"] == len(found["request"]["forget"]["rows"]) > 20
    made = [service.get(f"/v1/models/retrained/checkpoints/{entry['checkpoint']}") for entry in found["checkpoints"]]
    assert {entry["run"] for entry in made} == {"unlearned-seed-0", "unlearned-seed-1"}
    assert not any(entry["final"] for entry in made), "a later index of the final checkpoints must not take them"
    assert {entry["source"] for entry in made} == {"unlearned"}
    every = {
        "name": "every",
        "model": "retrained",
        "dataset": "digits",
        "checkpoints": "all",
        "method": {"type": "grad_dot"},
    }
    service.finished(service.post("/v1/indexes", every, 202))
    taken = [
        service.get(f"/v1/models/retrained/checkpoints/{one}")
        for one in service.get("/v1/indexes/every")["checkpoints"]
    ]
    assert {entry["source"] for entry in taken} == {"trained"}, "`all` is of trainings of the model"
    nothing, newton, ascent = found["comparison"]["results"]
    assert [entry["role"] for entry in (nothing, newton, ascent)] == ["nothing", "method", "baseline"]
    assert set(newton["sets"]) == {"forget", "retain", "test"}
    again = service.http.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", json=body)
    assert again.status_code == 409
    assert again.json()["errors"][0]["pointer"] == "/run"


@pytest.mark.parametrize(("asked", "layers"), [({"type": "auto"}, None), (EXPLICIT, ["output"])])
def test_an_index_that_auto_may_choose_is_unlearned_from_and_compared_with_retraining(
    trained: Loaded, asked: dict[str, Any], layers: list[str] | None
) -> None:
    service, name = trained.service, f"by-{asked['type']}"
    fit = {"name": name, "model": "retrained", "dataset": "digits", "method": asked, "layers": layers}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    index = service.get(f"/v1/indexes/{name}")
    if asked["type"] == "auto":
        assert (index["method"]["type"], index["choice"]["asked"]["type"]) == ("gauss_newton", "auto")
    fours = {"where": {"field": "target", "op": "eq", "value": 4}}
    body = {"forget": fours, "run": name, "check": {"oracles": 4, "test": {"dataset": "test"}}}
    job = service.finished(service.post(f"/v1/indexes/{name}/unlearned-checkpoints", body, 202))
    assert job["state"] == "succeeded", job["error"]
    (found,) = service.get(f"/v1/indexes/{name}/unlearned-checkpoints")["items"]
    nothing, newton = (one["sets"] for one in found["comparison"]["results"][:2])
    assert newton["forget"]["distance"] < nothing["forget"]["distance"]
    assert abs(newton["forget"]["loss_gap"]) < abs(nothing["forget"]["loss_gap"])


def test_a_newton_step_needs_an_index_with_a_curvature(trained: Loaded) -> None:
    service = trained.service
    fit = {"name": "flat", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"forget": {"rows": [1, 2]}, "method": {"type": "newton"}, "run": "flat"}
    answer = service.http.post("/v1/indexes/flat/unlearned-checkpoints", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/method/type")


@pytest.mark.parametrize(
    ("forget", "status"),
    [({"rows": []}, 422), ({"rows": [600]}, 422), ({"top_positive": 3}, 422), ({"rows": [1, 2]}, 409)],
)
def test_forget_sets_and_models_that_cannot_be_unlearned(steady: Loaded, forget: dict[str, Any], status: int) -> None:
    """The last one asks for a comparison with retrained models of a model that has no recipe."""
    body = {"forget": forget, "method": {"type": "newton"}, "check": {"oracles": 2} if status == 409 else None}
    answer = steady.service.http.post("/v1/indexes/steady/unlearned-checkpoints", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["errors"]


def test_a_baseline_that_cannot_be_is_refused_where_it_stands(trained: Loaded) -> None:
    body = {"forget": {"rows": [1]}, "check": {"oracles": 2, "baselines": [{"type": "exact_newton"}]}}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", json={**body, "run": "no"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/check/baselines/0/type")


def test_too_much_retraining_is_refused_with_its_hours(trained: Loaded) -> None:
    body = {"queries": {"dataset": "test"}, "protocol": {"subsets": 100_000, "seeds": 100}, "max_hours": 0.01}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/evaluations", json=body)
    assert answer.status_code == 422
    assert "hours" in answer.json()["detail"]
    assert answer.json()["errors"][0]["pointer"] == "/max_hours"


@pytest.mark.parametrize("kind", ["fine_tune", "gradient_ascent", "datamodel_matching"])
def test_fine_tuning_counts_towards_the_hours(trained: Loaded, kind: str) -> None:
    body = {"forget": {"rows": [1]}, "run": "hours", "method": {"type": kind, "epochs": 10_000}, "max_hours": 1e-6}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, ["/max_hours"])


@pytest.mark.parametrize("kind", ["evaluation", "index"])
async def test_nothing_is_written_before_the_engine_has_answered(trained: Loaded, kind: str) -> None:
    """An equal request would wait for the row, and the database would refuse to let it wait for long."""
    data = trained.service.data.resolve()
    database = create_engine(DatabaseSettings(url=get_server(data / "postgres", cleanup_mode=None).get_uri()))
    protocol = {"subsets": 400, "seeds": 7}
    asked = EvaluationCreate.model_validate({"queries": {"dataset": "test", "count": 4}, "protocol": protocol})
    fit = {
        "name": "never",
        "model": "retrained",
        "dataset": "digits",
        "method": {"type": "datamodels", "bank": protocol},
    }
    async with create_sessionmaker(database)() as session:

        async def answered(*_: object) -> dict[str, float]:
            written = await session.execute(select(func.pg_current_xact_id_if_assigned()))
            assert written.scalar() is None
            return {"seconds_per_step": 1e9}

        resources = MagicMock(settings=Settings(data_dir=data), artifacts=ArtifactStore(data))
        resources.engine.call = AsyncMock(side_effect=answered)
        with pytest.raises(InvalidRequest, match="hours"):
            if kind == "evaluation":
                await replays.create_evaluation(session, resources, "retrained-ekfac", asked)
            else:
                await creation.create(session, IndexCreate.model_validate(fit), resources)
    await database.dispose()


UNKNOWN = {"field": "nowhere", "op": "eq", "value": 1}


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ({"protocol": {"subsets": 8, "alpha": 0.0001}}, "/protocol/alpha"),
        ({"deterministic": [0.9, 0.9999]}, "/deterministic/1"),
        ({"removal": {"top": [5, 600]}}, "/removal/top"),
        ({"mislabelled": UNKNOWN}, "/mislabelled"),
        ({"mislabelled": {"field": "row", "op": "lt", "value": 0}}, "/mislabelled"),
        ({"mislabelled": {"field": "row", "op": "gte", "value": 0}}, "/mislabelled"),
        ({"source": "nowhere"}, "/source"),
        ({"deterministic": [0.9, 0.9]}, "/deterministic"),
        ({"removal": {"top": [5, 5]}}, "/removal/top"),
        ({"tune": {"candidates": ["retrained-ekfac"]}}, "/tune/candidates/0"),
    ],
)
def test_an_evaluation_that_would_fail_after_retraining_is_refused(
    trained: Loaded, asked: dict[str, Any], pointer: str
) -> None:
    body = {"queries": {"dataset": "test", "count": 4}, "protocol": {"subsets": 8}, **asked}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/evaluations", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_a_method_without_damping_is_not_tuned(trained: Loaded) -> None:
    fit = {"name": "undamped", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert trained.service.finished(trained.service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 4}, "protocol": {"subsets": 8}, "tune": True}
    answer = trained.service.http.post("/v1/indexes/undamped/evaluations", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/tune")


@pytest.mark.parametrize("path", ["verifications", "counterfactuals"])
@pytest.mark.parametrize(
    ("subset", "pointer"),
    [
        ({"remove": {"rows": [600]}}, "/subsets/1/remove"),
        ({"remove": {"ids": ["nobody"]}}, "/subsets/1/remove"),
        ({"keep": {"where": UNKNOWN}}, "/subsets/1/keep"),
        ({"keep": {"rows": []}}, "/subsets/1/keep"),
    ],
)
def test_a_subset_that_cannot_be_is_refused_where_it_stands(
    trained: Loaded, path: str, subset: dict[str, Any], pointer: str
) -> None:
    body = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [{"remove": {"rows": [1]}}, subset]}
    answer = trained.service.http.post(f"/v1/indexes/retrained-ekfac/{path}", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_sets_that_make_no_batch_are_refused(trained: Loaded) -> None:
    service = trained.service
    recipe = {**RECIPE, "batch_size": 400, "drop_last": True, "epochs": 1}
    model = {"name": "full-batches", "architecture": MLP, "task": {"type": "classification"}, "recipe": recipe}
    service.post("/v1/models", model, 201)
    assert (
        service.finished(service.post("/v1/models/full-batches/trainings", {"dataset": "digits"}, 202))["state"]
        == "succeeded"
    )
    fit = {"name": "full-batches", "model": "full-batches", "dataset": "digits", "method": {"type": "ekfac"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    many, queries = {"rows": list(range(300))}, {"dataset": "test", "rows": [3]}
    for path, body, pointer in [
        ("indexes/full-batches/evaluations", {"queries": queries, "protocol": {"subsets": 8}}, "/protocol/alpha"),
        ("indexes/full-batches/evaluations", {"queries": queries, "protocol": {"subsets": 8, "alpha": 0.8}, "removal": {"top": [5, 300]}}, "/removal/top"),
        ("indexes/full-batches/verifications", {"queries": [queries], "subsets": [{"remove": many}]}, "/subsets/0"),
        ("indexes/full-batches/unlearned-checkpoints", {"forget": many, "check": {"oracles": 2}}, "/check/oracles"),
        ("indexes", {**fit, "name": "half-batches", "method": {"type": "ame", "bank": {"subsets": 12}}}, "/method/bank/alpha"),
    ]:  # fmt: skip
        answer = service.http.post(f"/v1/{path}", json=body)
        assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer]), path


def test_diverging_retrainings_are_counted_and_left_out(trained: Loaded) -> None:
    service = trained.service
    wild = {**RECIPE, "learning_rate": 1e6}
    service.post(
        "/v1/models", {"name": "wild", "architecture": MLP, "task": {"type": "classification"}, "recipe": wild}, 201
    )
    job = service.finished(service.post("/v1/models/wild/trainings", {"dataset": "digits", "seeds": [0]}, 202))
    assert job["state"] == "failed"
    assert "diverged" in job["error"]["detail"]


def test_deleted_examples_are_trained_on_no_more(loaded: Loaded, tmp_path: Path) -> None:
    """Digits without some rows are trained on, evaluated and verified as a data set that never had them."""
    service, gone = loaded.service, [0, 7, 199]
    spec = {"kind": "image", "input": "image", "target": "label", "metadata": ["source"]}
    part = np.load(save_digits(tmp_path / "some.npz", 0, 200))
    np.savez(tmp_path / "fewer.npz", **{name: np.delete(part[name], gone, axis=0) for name in part})
    quality, weights, banks = [], [], []
    for name in ("some", "fewer"):
        imported = service.upload("/v1/datasets", tmp_path / f"{name}.npz", 202, spec={"name": f"r-{name}", **spec})
        assert service.finished(imported)["state"] == "succeeded"
        if name == "some":
            service.post("/v1/datasets/r-some/deletions", {"selector": {"rows": gone}})
        model = {"name": f"r-{name}", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
        service.post("/v1/models", model, 201)
        training = service.post(f"/v1/models/r-{name}/trainings", {"dataset": f"r-{name}", "seeds": [0]}, 202)
        assert service.finished(training)["state"] == "succeeded"
        weights.append(service.get(f"/v1/models/r-{name}/checkpoints")["items"][0]["sha256"])
        fit = {"name": f"r-{name}", "model": f"r-{name}", "dataset": f"r-{name}", "method": {"type": "grad_dot"}}
        assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
        body = {
            "queries": {"dataset": "test", "count": 10},
            "protocol": {"subsets": 8},
            "deterministic": [0.9],
            "loo": {"examples": 3, "seeds": 1},
            "removal": {"top": [5], "queries": 1, "seeds": 1},
            "mislabelled": {"field": "target", "op": "lt", "value": 2},
        }
        job = service.finished(service.post(f"/v1/indexes/r-{name}/evaluations", body, 202))
        assert job["state"] == "succeeded", job["error"]
        quality.append(service.get(f"/v1/indexes/r-{name}/evaluations")["items"][0]["quality"])
        subsets = [{"remove": {"top_positive": 5}}]
        asked = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": subsets, "seeds": [0]}
        checked = service.finished(service.post(f"/v1/indexes/r-{name}/verifications", asked, 202))
        assert checked["state"] == "succeeded", checked["error"]
        (found,) = service.get(f"/v1/indexes/r-{name}/verifications")["items"]
        banks.append(found["results"][0]["predictions"][0])
    assert weights[0] == weights[1], "to the bit"
    assert banks[0] == approximately(banks[1])
    assert quality[0] == approximately(quality[1])
    asked = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [{"remove": {"rows": gone}}]}
    answer = service.http.post("/v1/indexes/r-some/verifications", json=asked)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/subsets/0/remove")
    refused = {"queries": {"dataset": "r-some", "rows": gone[:1]}, "protocol": {"subsets": 8}}
    answer = service.http.post("/v1/indexes/r-some/evaluations", json=refused)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/queries/rows")


def test_wrong_labels_are_not_looked_for_without_self_influence(trained: Loaded) -> None:
    fit = {"name": "retrained-datainf", "model": "retrained", "dataset": "digits", "method": {"type": "datainf"}}
    assert trained.service.finished(trained.service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 3}, "mislabelled": {"field": "row", "op": "lt", "value": 20}}
    answer = trained.service.http.post("/v1/indexes/retrained-datainf/evaluations", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/mislabelled")


def approximately(value: Any) -> Any:
    """JSON whose numbers may differ by rounding; ids differ."""
    if isinstance(value, dict):
        return {key: approximately(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [approximately(entry) for entry in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


def test_banks_are_listed_and_deleted(trained: Loaded, evaluated: dict[str, Any]) -> None:
    listed = trained.service.get("/v1/banks")["items"]
    deterministic = next(bank for bank in listed if bank["protocol"]["semantics"] == "mask")
    assert deterministic["bytes"] > 0
    assert trained.service.get(f"/v1/banks/{deterministic['id']}") == deterministic
    assert trained.service.http.delete(f"/v1/banks/{deterministic['id']}").status_code == 204
    assert trained.service.http.get(f"/v1/banks/{deterministic['id']}").status_code == 404
