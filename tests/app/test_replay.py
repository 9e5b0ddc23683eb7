"""What trainings, evaluations, verifications and unlearnings refuse alike."""

from tests.app.conftest import RECIPE
from tests.conftest import MLP, Loaded


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
