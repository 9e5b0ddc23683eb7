"""Methods that follow a training or repeat it, over HTTP."""

from pathlib import Path

import pytest

from tests.conftest import MLP, Loaded, train_mlp

ROWS = [3, 8, 20]
QUERY = {"queries": [{"dataset": "test", "rows": [8, 3]}]}
RECIPE = {
    "optimizer": {"type": "sgd", "momentum": 0.9},
    "learning_rate": 0.05,
    "epochs": 2,
    "batch_size": 50,
}
MAGIC = {"type": "magic", "queries": {"dataset": "test", "rows": ROWS}, "seed": 3, "subsets": 2}


def body(name: str, method: dict, **more: object) -> dict:
    return {"name": name, "model": "replayed", "dataset": "digits", "method": method, **more}


@pytest.fixture(scope="module")
def replayed(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The shared service with a model that has a recipe, two checkpoints of one run, and a MAGIC index without any."""
    model = {"name": "replayed", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
    loaded.service.post("/v1/models", model, 201)
    for number, rate in enumerate((0.05, 0.01)):
        file = train_mlp(tmp_path_factory.mktemp("weights") / "some.safetensors", number)
        meta = {"run": "one", "step": 12 * (number + 1), "learning_rate": rate, "final": number == 1}
        loaded.service.upload("/v1/models/replayed/checkpoints", file, 201, meta=meta)
    job = loaded.service.post("/v1/indexes", body("magic", MAGIC), 202)
    finished = loaded.service.finished(job)
    assert finished["state"] == "succeeded", finished
    assert finished["progress"]["unit"] == "steps"
    assert finished["progress"]["done"] == finished["progress"]["total"] == 24 * (1 + 6 + 3)
    return loaded


def test_a_replayed_training_has_no_checkpoints_to_unlearn(replayed: Loaded) -> None:
    for method in ("newton", "datamodel_matching", "fine_tune"):
        body = {"forget": {"rows": [1]}, "method": {"type": method}}
        answer = replayed.service.http.post("/v1/indexes/magic/unlearned-checkpoints", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/method/type")


def test_a_replayed_training_answers_its_queries(replayed: Loaded) -> None:
    index = replayed.service.get("/v1/indexes/magic")
    assert (index["checkpoints"], index["dim"], index["recall"]) == ([], 3, None)
    assert -1 <= index["coverage"]["replay"]["metasmoothness"] <= 1
    answer = replayed.service.post("/v1/indexes/magic/attributions", {**QUERY, "top_k": 5})
    assert [result["query"]["row"] for result in answer["results"]] == [8, 3]
    assert not answer["approximate"]
    for result in answer["results"]:
        scores = [entry["score"] for entry in result["positive"]]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] > 0
    top = answer["results"][0]["positive"]
    subset = {"remove": {"rows": [entry["row"] for entry in top]}}
    counterfactual = replayed.service.post("/v1/indexes/magic/counterfactuals", {**QUERY, "subsets": [subset]})
    change = counterfactual["results"][0]["predictions"][0]["change"]
    assert change == pytest.approx(-sum(entry["score"] for entry in top), rel=1e-5)


def test_other_queries_are_told_which_it_knows(replayed: Loaded) -> None:
    asked = {"queries": [{"dataset": "test", "rows": [3, 9]}]}
    answer = replayed.service.http.post("/v1/indexes/magic/attributions", json=asked)
    assert answer.status_code == 422
    assert "query 1 is not one" in answer.json()["detail"]
    assert "3, 8, 20" in answer.json()["detail"]
    assert answer.json()["errors"][0]["pointer"] == "/queries"
    own = replayed.service.http.get("/v1/indexes/magic/self-influence")
    assert (own.status_code, own.json()["errors"][0]["pointer"]) == (422, "/path/index")
    evaluation = {"queries": {"dataset": "test", "rows": [3, 9]}, "protocol": {"subsets": 8}}
    evaluated = replayed.service.http.post("/v1/indexes/magic/evaluations", json=evaluation)
    assert (evaluated.status_code, evaluated.json()["errors"][0]["pointer"]) == (422, "/queries")
    forget = {"forget": {"rows": [1, 2]}, **QUERY}
    unlearning = replayed.service.http.post("/v1/indexes/magic/unlearning", json=forget)
    assert (unlearning.status_code, unlearning.json()["errors"][0]["pointer"]) == (422, "/forget")


def test_the_queries_data_set_is_kept(replayed: Loaded) -> None:
    answer = replayed.service.http.delete("/v1/datasets/test")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/in-use")


@pytest.mark.parametrize(
    ("change", "status", "pointer"),
    [
        ({"model": "mlp"}, 409, "/method/type"),
        ({"method": {**MAGIC, "queries": {"dataset": "test", "rows": [3, 50]}}}, 422, "/method/queries/rows/1"),
        ({"method": {**MAGIC, "queries": {"dataset": "test", "rows": []}}}, 422, "/method/queries/rows"),
        ({"layers": ["output"]}, 422, "/layers"),
        ({"precision": "bfloat16"}, 422, "/precision"),
    ],
)
def test_impossible_replays_are_refused(replayed: Loaded, change: dict, status: int, pointer: str) -> None:
    answer = replayed.service.http.post("/v1/indexes", json={**body("never", MAGIC), **change})
    assert answer.status_code == status, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert replayed.service.http.get("/v1/indexes/never").status_code == 404


def test_source_takes_a_run_of_sgd(replayed: Loaded) -> None:
    asked = {"type": "source", "projection": {"dim": 64}, "segments": 2}
    job = replayed.service.post("/v1/indexes", body("other-source", asked, checkpoints="all"), 202)
    assert replayed.service.finished(job)["state"] == "succeeded"
    replayed.service.post("/v1/indexes/other-source/attributions", QUERY)
    few = replayed.service.http.post("/v1/indexes", json=body("never", asked))
    assert (few.status_code, few.json()["errors"][0]["pointer"]) == (422, "/checkpoints")


def test_source_refuses_what_was_trained_by_adam(replayed: Loaded, tmp_path: Path) -> None:
    recipe = {**RECIPE, "optimizer": {"type": "adamw"}}
    model = {"name": "adam", "architecture": MLP, "task": {"type": "classification"}, "recipe": recipe}
    replayed.service.post("/v1/models", model, 201)
    meta = {"run": "one", "step": 12, "learning_rate": 0.1}
    replayed.service.upload("/v1/models/adam/checkpoints", train_mlp(tmp_path / "some.safetensors", 0), 201, meta=meta)
    asked = body("never", {"type": "source", "segments": 1}, model="adam")
    answer = replayed.service.http.post("/v1/indexes", json=asked)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/method/type")


@pytest.mark.parametrize("method", ["tracin", "gas"])
def test_learning_rates_come_with_the_checkpoints(replayed: Loaded, method: str) -> None:
    asked = {"type": method, "projection": {"dim": 64}}
    job = replayed.service.post("/v1/indexes", body(f"other-{method}", asked, checkpoints="all"), 202)
    assert replayed.service.finished(job)["state"] == "succeeded"
    replayed.service.post(f"/v1/indexes/other-{method}/attributions", QUERY)
    answer = replayed.service.http.post("/v1/indexes", json={**body("never", asked), "model": "mlp"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/checkpoints")


def test_exact_replay_is_measured_by_masked_retrainings(replayed: Loaded) -> None:
    protocol = {"alpha": 0.9, "subsets": 32, "semantics": "mask", "first_seed": MAGIC["seed"]}
    asked = {"queries": {"dataset": "test", "rows": ROWS}, "protocol": protocol}
    job = replayed.service.finished(replayed.service.post("/v1/indexes/magic/evaluations", asked, 202))
    assert job["state"] == "succeeded", job["error"]
    quality = replayed.service.get("/v1/indexes/magic/quality")["quality"]
    assert quality["lds"] > 0.3, "the derivative of this very training predicts its masked repetitions"
    refused = replayed.service.http.post("/v1/indexes/magic/evaluations", json={**asked, "removal": {"top": [5]}})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/removal"
