"""Indexes that learn from a bank of real retrainings, over HTTP: posterior datamodels, datamodels, empirical influence, game-theoretic values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attribution_core.bank_methods.empirical_influence import empirical_influence
from attribution_core.bank_methods.posterior import condition, learn
from attribution_core.bank_methods.semivalues import beta_shapley
from attribution_core.evaluate.retrainings import Retrainings
from tests.app.conftest import RECIPE
from tests.conftest import MLP, Loaded, save_digits

BRIEF = {**RECIPE, "epochs": 3}
BANK = {"alpha": 0.5, "subsets": 24, "seeds": 1}
VARIED = {"sizes": "varied", "subsets": 34}
NAMED = list(range(20))
QUERIES = [{"dataset": "test", "rows": [30, 41]}]
HALF = {"remove": {"where": {"field": "row", "op": "lt", "value": 300}}}


@pytest.fixture(scope="module")
def banked(loaded: Loaded) -> Loaded:
    """The shared service with a trained model, an EK-FAC index of it, and a posterior on that."""
    service = loaded.service
    body = {"name": "banked", "architecture": MLP, "task": {"type": "classification"}, "recipe": BRIEF}
    service.post("/v1/models", body, 201)
    assert (
        service.finished(service.post("/v1/models/banked/trainings", {"dataset": "digits"}, 202))["state"]
        == "succeeded"
    )
    fit(loaded, "banked-prior", {"type": "ekfac"})
    queries = {"dataset": "test", "rows": NAMED}
    fit(loaded, "banked-posterior", {"type": "posterior", "prior": ["banked-prior"], "bank": BANK, "queries": queries})
    return loaded


def fit(loaded: Loaded, name: str, method: dict[str, Any]) -> dict[str, Any]:
    body = {"name": name, "model": "banked", "dataset": "digits", "method": method}
    job = loaded.service.finished(loaded.service.post("/v1/indexes", body, 202))
    assert job["state"] == "succeeded", job["error"]
    found: dict[str, Any] = loaded.service.get(f"/v1/indexes/{name}")
    return found


def scores(loaded: Loaded, name: str, rows: list[int]) -> np.ndarray:
    """All scores of test rows, (rows, n), one query at a time."""
    found = np.zeros((len(rows), 600))
    for place, row in enumerate(rows):
        body = {"queries": [{"dataset": "test", "rows": [row]}], "top_k": 600}
        (result,) = loaded.service.post(f"/v1/indexes/{name}/attributions", body)["results"]
        for entry in (*result["positive"], *result["negative"]):
            found[place, entry["row"]] = entry["score"]
    return found


def test_a_posterior_is_its_prior_conditioned_on_the_bank(banked: Loaded) -> None:
    index = banked.service.get("/v1/indexes/banked-posterior")
    assert index["coverage"]["posterior"]["trainings"] == 24
    assert index["coverage"]["diverged"] == 0
    prior, posterior = (scores(banked, name, [*NAMED, 30]) for name in ("banked-prior", "banked-posterior"))
    bank = bank_of(banked, [*NAMED, 30])
    named = Retrainings(bank.masks, bank.values[:, :, :-1])
    expected = condition(learn([prior[:-1]], named), [prior], bank).scores
    np.testing.assert_allclose(posterior, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def bank_of(banked: Loaded, rows: list[int], asked: dict[str, Any] = BANK) -> Retrainings:
    """What test rows measure under a bank, the posterior's by default, read from the service's own files by the library."""
    from pathlib import Path

    from attribution_core.data.batch import Batch
    from attribution_core.data.collate import ExampleSource
    from attribution_core.data.reader import DatasetReader
    from attribution_core.fit_spec import DatasetRef
    from attribution_core.spec import ArchitectureSpec, ClassificationTask, DatasetSpec
    from attribution_core.training.bank import Bank
    from attribution_core.training.spec import Protocol, TrainSpec

    service = banked.service
    digits, test = (service.get(f"/v1/datasets/{name}") for name in ("digits", "test"))
    artifacts = service.data / "artifacts"

    def reference(dataset: dict[str, Any]) -> DatasetRef:
        return DatasetRef(
            id=dataset["id"],
            folder=artifacts / "datasets" / dataset["id"],
            spec=DatasetSpec.model_validate(dataset["spec"]),
            sha256=dataset["sha256"],
            num_examples=dataset["num_examples"],
        )

    spec = TrainSpec(
        architecture=ArchitectureSpec(**MLP), task=ClassificationTask(), dataset=reference(digits), recipe=BRIEF
    )
    found = next(bank for bank in service.get("/v1/banks")["items"] if bank["id"] == bank_id(banked, asked))
    folder = artifacts / "banks" / found["model"] / found["id"]
    files: list[Path] = sorted(folder.glob("*/group.safetensors"))
    bank = Bank(spec, Protocol.model_validate(asked), files)
    where = reference(test)
    source = ExampleSource(DatasetReader(where.folder, where.spec), ClassificationTask(), None, "cpu")
    batch: Batch = source.batch(rows)
    return Retrainings(bank.masks, bank.values(batch, "margin"))


def bank_id(banked: Loaded, asked: dict[str, Any] = BANK) -> str:
    model = banked.service.get("/v1/models/banked")["id"]
    (found,) = (
        bank["id"]
        for bank in banked.service.get("/v1/banks")["items"]
        if bank["model"] == model and bank["protocol"]["seed"] == 0
        if bank["protocol"].get("sizes") == asked.get("sizes")
    )
    return str(found)


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(banked: Loaded) -> None:
    def changes(rows: list[int]) -> list[float]:
        body = {"queries": [{"dataset": "test", "rows": rows}], "subsets": [HALF]}
        answer = banked.service.post("/v1/indexes/banked-posterior/counterfactuals", body)
        return [result["predictions"][0]["change"] for result in answer["results"]]

    together = changes([30, 41])
    assert together == pytest.approx(changes([30]) + changes([41]), rel=1e-5, abs=1e-5)


def test_the_posterior_knows_its_uncertainty(banked: Loaded) -> None:
    few = {"remove": {"rows": [1, 2, 3]}}
    body = {"queries": QUERIES, "subsets": [HALF, few], "interval": 0.9}
    answer = banked.service.post("/v1/indexes/banked-posterior/counterfactuals", body)
    for result in answer["results"]:
        half, three = result["predictions"]
        for prediction in (half, three):
            low, high = prediction["interval"]
            assert low < prediction["change"] < high
            assert not prediction["calibrated"], "nothing has measured this index yet"
        assert three["interval"][1] - three["interval"][0] < half["interval"][1] - half["interval"][0]


def test_priors_and_banks_in_use_are_kept(banked: Loaded) -> None:
    http = banked.service.http
    for path in ("/v1/indexes/banked-prior", f"/v1/banks/{bank_id(banked)}"):
        assert http.delete(path).status_code == 409, path
    assert http.post("/v1/indexes/banked-prior/refresh").status_code == 409


def test_other_methods_share_the_bank(banked: Loaded) -> None:
    before = len(banked.service.get("/v1/banks")["items"])
    for kind in ("empirical_influence", "banzhaf", "datamodels", "ame"):
        method = {"type": kind, "bank": BANK} | ({"penalty": "ridge"} if kind == "datamodels" else {})
        fit(banked, f"banked-{kind.replace('_', '-')}", method)
    assert len(banked.service.get("/v1/banks")["items"]) == before
    expected = empirical_influence(bank_of(banked, [30]))
    np.testing.assert_allclose(scores(banked, "banked-empirical-influence", [30]), expected, rtol=1e-4, atol=1e-5)
    answer = banked.service.post("/v1/indexes/banked-datamodels/attributions", {"queries": QUERIES})
    assert answer["method"] == "datamodels"
    refused = banked.service.http.get("/v1/indexes/banked-banzhaf/self-influence")
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/path/index")


def test_shapley_values_share_a_bank_and_sum_to_what_training_changes(banked: Loaded) -> None:
    before = len(banked.service.get("/v1/banks")["items"])
    for kind, parameters in (("shapley", {}), ("beta_shapley", {"alpha": 4, "beta": 1})):
        fit(banked, f"banked-{kind.replace('_', '-')}", {"type": kind, "bank": VARIED, **parameters})
    assert len(banked.service.get("/v1/banks")["items"]) == before + 1
    bank = bank_of(banked, [30, 41], VARIED)
    shapley, skewed = (scores(banked, name, [30, 41]) for name in ("banked-shapley", "banked-beta-shapley"))
    np.testing.assert_allclose(shapley.sum(1), bank.means[1] - bank.means[0], rtol=1e-3)
    np.testing.assert_allclose(skewed, beta_shapley(bank, 4, 1), rtol=1e-4, atol=1e-5)
    answer = banked.service.post("/v1/indexes/banked-shapley/attributions", {"queries": QUERIES})
    assert (answer["method"], answer["notion"]) == ("shapley", "game_theoretic")
    (shown,) = (one for one in banked.service.get("/v1/banks")["items"] if one["id"] == bank_id(banked, VARIED))
    assert (shown["protocol"]["sizes"], shown["retrainings"]) == ("varied", 64)


@pytest.mark.parametrize(
    ("method", "pointer"),
    [
        ({"type": "shapley", "bank": {"subsets": 24}}, "/method/bank/sizes"),
        ({"type": "banzhaf", "bank": VARIED}, "/method/bank/sizes"),
        ({"type": "shapley", "bank": {**VARIED, "subsets": 11}}, "/method/bank/subsets"),
        ({"type": "beta_shapley", "alpha": 500, "bank": VARIED}, "/method/bank/subsets"),
        ({"type": "shapley", "bank": {**VARIED, "alpha": 0.4}}, "/method/bank"),
        ({"type": "datamodels", "bank": {"subsets": 9}}, "/method/bank/subsets"),
        ({"type": "ame", "bank": {"subsets": 9}}, "/method/bank/subsets"),
        ({"type": "empirical_influence", "bank": {"subsets": 4}}, "/method/bank/subsets"),
        ({"type": "banzhaf", "bank": {"subsets": 24, "alpha": 0.9}}, "/method/bank/alpha"),
        ({"type": "ame", "bank": {"subsets": 24, "alpha": 0.0001}}, "/method/bank/alpha"),
        ({"type": "magic", "queries": {"dataset": "test", "rows": [1]}, "alpha": 0.9999}, "/method/alpha"),
    ],
)
def test_retrainings_that_teach_a_method_nothing_are_refused(
    banked: Loaded, method: dict[str, Any], pointer: str
) -> None:
    body = {"name": "untaught", "model": "banked", "dataset": "digits", "method": method}
    answer = banked.service.http.post("/v1/indexes", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_checkpoints_are_unlearned_by_what_a_bank_predicts(banked: Loaded) -> None:
    fit(banked, "banked-matched", {"type": "datamodels", "penalty": "ridge", "bank": BANK})
    method = {"type": "datamodel_matching", "epochs": 1, "retained": 4}
    for index in ("banked-posterior", "banked-matched"):
        body = {"forget": {"rows": [1, 2]}, "method": method, "run": index}
        path = f"/v1/indexes/{index}/unlearned-checkpoints"
        job = banked.service.finished(banked.service.post(path, body, 202))
        assert job["state"] == "succeeded", job["error"]


def test_deleted_examples_are_named_as_queries_no_more(banked: Loaded, tmp_path: Path) -> None:
    service = banked.service
    spec = {"name": "p-named", "kind": "image", "input": "image", "target": "label"}
    imported = service.upload("/v1/datasets", save_digits(tmp_path / "named.npz", 600, 610), 202, spec=spec)
    assert service.finished(imported)["state"] == "succeeded"
    service.post("/v1/datasets/p-named/deletions", {"selector": {"rows": [4]}})
    named = {"queries": {"dataset": "p-named", "rows": [1, 4]}}
    for method in ({"type": "magic", **named}, {"type": "posterior", "prior": ["banked-prior"], "bank": BANK, **named}):
        body = {"name": "p-gone", "model": "banked", "dataset": "digits", "method": method}
        answer = service.http.post("/v1/indexes", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/method/queries/rows/1")


def test_an_overlarge_bank_is_refused_with_its_hours(banked: Loaded) -> None:
    method = {"type": "empirical_influence", "bank": {"subsets": 100_000, "seeds": 1000}}
    body = {"name": "endless", "model": "banked", "dataset": "digits", "method": method}
    answer = banked.service.http.post("/v1/indexes", json=body)
    assert answer.status_code == 422
    assert "hours" in answer.json()["detail"]
    assert answer.json()["errors"][0]["pointer"] == "/method/bank/subsets"


def test_it_is_not_judged_by_what_it_learnt_from(banked: Loaded) -> None:
    queries = {"dataset": "test", "rows": list(range(20, 50))}
    same = {"queries": queries, "protocol": BANK}
    answer = banked.service.http.post("/v1/indexes/banked-posterior/evaluations", json=same)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/protocol/seed"
    varied = {"queries": queries, "protocol": VARIED}
    answer = banked.service.http.post("/v1/indexes/banked-posterior/evaluations", json=varied)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/protocol/sizes")
    other = {"queries": queries, "protocol": {**BANK, "seed": 1}}
    job = banked.service.finished(banked.service.post("/v1/indexes/banked-posterior/evaluations", other, 202))
    assert job["state"] == "succeeded", job["error"]
    quality = banked.service.get("/v1/indexes/banked-posterior")["quality"]
    assert quality["lds"] > 0.2
    body = {"queries": QUERIES, "subsets": [HALF], "interval": 0.9}
    answer = banked.service.post("/v1/indexes/banked-posterior/counterfactuals", body)
    assert all(result["predictions"][0]["calibrated"] for result in answer["results"])


@pytest.mark.parametrize(
    ("method", "pointer"),
    [
        ({"type": "posterior", "prior": ["steady"], "queries": {"dataset": "test", "rows": [1]}}, "/method/prior/0"),
        ({"type": "posterior", "prior": ["banked-posterior"], "queries": {"dataset": "test", "rows": [1]}}, "/method/prior/0"),
        ({"type": "posterior", "prior": ["banked-prior"], "queries": {"dataset": "test", "rows": [99]}}, "/method/queries/rows/0"),
    ],
)  # fmt: skip
def test_what_a_posterior_cannot_begin_with(
    banked: Loaded, steady: Loaded, method: dict[str, Any], pointer: str
) -> None:
    body = {"name": "refused", "model": "banked", "dataset": "digits", "method": method}
    answer = banked.service.http.post("/v1/indexes", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer
