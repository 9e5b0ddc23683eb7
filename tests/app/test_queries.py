"""The questions an index answers, over HTTP, against the library called directly."""

import asyncio
import base64
import io
from unittest.mock import AsyncMock

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter
from sqlalchemy import delete

from app.auth.service import KeyRing
from app.db.embedded import get_server
from app.db.session import create_engine, create_sessionmaker
from app.db.tables import Index
from app.errors import CorruptArtifact, NotFound
from app.indexes import service as indexes
from app.jobs.following import Following
from app.queries import service as queries
from app.queries.schemas import CounterfactualRequest
from app.settings import DatabaseSettings, Settings
from app.storage.artifacts import ArtifactStore
from app.web.pagination import Page, next_cursor
from app.web.resources import Resources
from attribution_core.spec import DatasetSpec, Filter, Selector
from tests.app.opened import directly
from tests.conftest import Loaded, load_digits

QUERY = {"queries": [{"dataset": "test", "rows": [3, 8]}]}
SOURCE = {"field": "source", "op": "eq", "value": "vendor-1"}


@pytest.mark.parametrize("name", ["steady", "trak"])
def test_attributions_are_the_librarys(steady: Loaded, name: str) -> None:
    answer = steady.service.post(f"/v1/indexes/{name}/attributions", {**QUERY, "top_k": 7})
    index = directly(steady, name)
    dataset = steady.service.get("/v1/datasets/test")
    folder = steady.service.data / "artifacts" / "datasets" / dataset["id"]
    source = index.context.source_of(folder, DatasetSpec.model_validate(dataset["spec"]))
    expected = index.attribute(index.query(source.batch([3, 8]), None), 7, None, rescore=True)
    assert answer["method"] == index.spec.method.type
    assert answer["notion"] == "predictive"
    assert answer["quality"] is None
    assert answer["recall"] == index.recall
    for result, wanted in zip(answer["results"], expected, strict=True):
        for sign in ("positive", "negative"):
            found = getattr(wanted, sign)
            assert [entry["row"] for entry in result[sign]] == found.rows.tolist()
            np.testing.assert_allclose([entry["score"] for entry in result[sign]], found.scores, rtol=1e-4, atol=1e-7)
        assert result["output"]["value"] == pytest.approx(wanted.output["value"], rel=1e-5)


def test_what_is_included_and_filtered(steady: Loaded) -> None:
    body = {**QUERY, "top_k": 20, "filter": SOURCE, "include": ["metadata", "preview"]}
    result = steady.service.post("/v1/indexes/steady/attributions", body)["results"][0]
    assert len(result["positive"]) == 20
    for entry in result["positive"] + result["negative"]:
        assert entry["metadata"] == {"source": "vendor-1"}
        assert steady.service.http.get(entry["preview"]).headers["content-type"] == "image/png"
    plain = steady.service.post("/v1/indexes/steady/attributions", QUERY)["results"][0]["positive"][0]
    assert plain["metadata"] is None
    assert plain["preview"] is None


def test_an_inline_example_is_answered_like_its_row(steady: Loaded) -> None:
    digits, _ = load_digits()
    out = io.BytesIO()
    Image.fromarray(digits.images[603]).save(out, "PNG")
    example = {"input": base64.b64encode(out.getvalue()).decode(), "target": int(digits.labels[603])}
    inline = steady.service.post("/v1/indexes/steady/attributions", {"queries": [{"example": example}]})["results"][0]
    by_row = steady.service.post("/v1/indexes/steady/attributions", {"queries": [{"dataset": "test", "rows": [3]}]})[
        "results"
    ][0]
    assert [entry["row"] for entry in inline["positive"]] == [entry["row"] for entry in by_row["positive"]]
    assert inline["query"] == {"dataset": None, "row": None, "id": None, "target": example["target"]}


def test_damping_is_a_choice_of_the_query(steady: Loaded) -> None:
    default = steady.service.post("/v1/indexes/steady/attributions", QUERY)
    same = steady.service.post("/v1/indexes/steady/attributions", {**QUERY, "damping": default["damping"]})
    other = steady.service.post("/v1/indexes/steady/attributions", {**QUERY, "damping": 100.0})
    assert same["results"] == default["results"]
    assert abs(other["results"][0]["positive"][0]["score"]) < abs(default["results"][0]["positive"][0]["score"])
    answer = steady.service.http.post("/v1/indexes/steady/attributions", json={**QUERY, "damping": 0.0})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/damping")


def test_counterfactuals_are_sums_of_scores(steady: Loaded) -> None:
    subsets = [
        {"remove": {"rows": [1, 2, 3]}},
        {"remove": {"ids": ["1", "2", "3"]}},
        {"keep": {"where": SOURCE}},
        {"remove": {"top_positive": 5}},
        {"remove": {"top_negative": 5}},
    ]
    answer = steady.service.post("/v1/indexes/steady/counterfactuals", {**QUERY, "subsets": subsets, "interval": 0.9})
    top = steady.service.post("/v1/indexes/steady/attributions", {**QUERY, "top_k": 5})
    for result, listed in zip(answer["results"], top["results"], strict=True):
        rows, ids, _, positive, negative = result["predictions"]
        assert rows["change"] == pytest.approx(ids["change"])
        assert (rows["removed"], positive["removed"]) == (3, 5)
        assert positive["change"] == pytest.approx(-sum(entry["score"] for entry in listed["positive"]), rel=1e-3)
        assert negative["change"] == pytest.approx(-sum(entry["score"] for entry in listed["negative"]), rel=1e-3)
        assert positive["change"] < 0 < negative["change"]
        for prediction in result["predictions"]:
            assert prediction["predicted"] == pytest.approx(result["output"]["value"] + prediction["change"])
            assert (prediction["interval"], prediction["calibrated"]) == (None, False)


def test_unlearning_is_a_counterfactual_without_the_forget_set(steady: Loaded) -> None:
    answer = steady.service.post("/v1/indexes/steady/unlearning", {**QUERY, "forget": {"where": SOURCE}})
    same = steady.service.post(
        "/v1/indexes/steady/counterfactuals", {**QUERY, "subsets": [{"remove": {"where": SOURCE}}]}
    )
    for result, other in zip(answer["results"], same["results"], strict=True):
        assert result["change"] == pytest.approx(other["predictions"][0]["change"], rel=1e-4, abs=1e-6)
        assert result["calibrated"] is False
    assert answer["forget_size"] == same["results"][0]["predictions"][0]["removed"]
    assert answer["forget_set"]["mean_predicted"] < answer["forget_set"]["mean_output"]
    assert answer["retain_sample"]["size"] == 32


@pytest.mark.parametrize("name", ["steady", "trak"])
def test_the_newton_estimator_is_the_librarys(steady: Loaded, name: str) -> None:
    body = {
        **QUERY,
        "subsets": [{"remove": {"where": SOURCE}}, {"remove": {"top_positive": 30}}],
        "estimator": "newton",
    }
    answer = steady.service.post(f"/v1/indexes/{name}/counterfactuals", body)
    additive = steady.service.post(f"/v1/indexes/{name}/counterfactuals", {**body, "estimator": "additive"})
    assert (answer["estimator"], additive["estimator"]) == ("newton", "additive")
    index = directly(steady, name)
    dataset = steady.service.get("/v1/datasets/test")
    folder = steady.service.data / "artifacts" / "datasets" / dataset["id"]
    source = index.context.source_of(folder, DatasetSpec.model_validate(dataset["spec"]))
    query = index.query(source.batch([3, 8]), None)
    rows = index.context.source.reader.matching(TypeAdapter(Filter).validate_python(SOURCE))
    tops = index.attribute(query, 30, None, rescore=True)
    shared = index.newton_effects(query, [rows])[:, 0]
    for place, (result, other) in enumerate(zip(answer["results"], additive["results"], strict=True)):
        group, top = (prediction["change"] for prediction in result["predictions"])
        assert group == pytest.approx(-shared[place], rel=1e-3)
        own = index.newton_effects(query[place : place + 1], [np.sort(tops[place].positive.rows)])
        assert top == pytest.approx(-own[0, 0], rel=1e-3)
        # Of the strongest examples together more is lost than the sum of what each would take alone.
        assert top < other["predictions"][1]["change"] < 0
    unlearned = steady.service.post(
        f"/v1/indexes/{name}/unlearning", {**QUERY, "forget": {"where": SOURCE}, "estimator": "newton"}
    )
    assert unlearned["estimator"] == "newton"
    for result, other in zip(unlearned["results"], answer["results"], strict=True):
        assert result["change"] == pytest.approx(other["predictions"][0]["change"], rel=1e-3)


def test_self_influence_pages_cover_the_training_set_in_order(steady: Loaded) -> None:
    items, cursor = [], None
    while True:
        params = {"limit": 200} | ({"cursor": cursor} if cursor else {})
        page = steady.service.http.get("/v1/indexes/steady/self-influence", params=params).json()
        items, cursor = items + page["items"], page["next"]
        if cursor is None:
            break
    scores = [item["score"] for item in items]
    assert sorted(item["row"] for item in items) == list(range(600))
    assert scores == sorted(scores, reverse=True)
    for position in (600, "0"):
        cursor = next_cursor(f"self-influence:{steady.service.get('/v1/indexes/steady')['id']}:1:desc", position)
        answer = steady.service.http.get("/v1/indexes/steady/self-influence", params={"cursor": cursor})
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-cursor")
    lowest = steady.service.http.get("/v1/indexes/steady/self-influence", params={"limit": 1, "order": "asc"}).json()[
        "items"
    ][0]
    assert lowest["score"] == min(scores)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("attributions", {"queries": []}),
        ("attributions", {"queries": [{"dataset": "test", "rows": []}]}),
        ("attributions", {"queries": [{"dataset": "test", "rows": [50]}]}),
        ("attributions", {"queries": [{"dataset": "test", "rows": [-1]}]}),
        ("attributions", {"queries": [{"dataset": "test", "rows": [2**53]}]}),
        ("attributions", {"queries": [{"dataset": "test"}]}),
        ("attributions", {"queries": [{"dataset": "test", "rows": list(range(33))}]}),
        ("attributions", {"queries": [{"example": {"input": "%%%"}}]}),
        ("attributions", {"queries": [{"example": {"input": "aGVsbG8=", "target": 1}}]}),
        ("attributions", {"queries": [{"example": {"input": [[1, 2], [3]], "target": 1}}]}),
        ("attributions", {"queries": [{"example": {"input": [[0] * 28] * 28, "target": 10}}]}),
        ("attributions", {"queries": [{"example": {"input": [[0] * 28] * 28}}]}),
        ("attributions", {"queries": [{"example": {"input": [[0] * 9] * 9, "target": 1}}]}),
        ("attributions", {"top_k": 0}),
        ("attributions", {"top_k": -1}),
        ("attributions", {"top_k": 10**9}),
        ("attributions", {"top_k": 1.5}),
        ("attributions", {"damping": -1}),
        ("attributions", {"filter": {"field": "nothing", "op": "eq", "value": 1}}),
        ("attributions", {"filter": {"field": "source", "op": "regex", "value": ".*"}}),
        ("attributions", {"filter": {"and": []}}),
        ("attributions", {"include": ["everything"]}),
        ("attributions", {"colour": "red"}),
        ("counterfactuals", {"subsets": []}),
        ("counterfactuals", {"subsets": [{}]}),
        ("counterfactuals", {"subsets": [{"remove": {"rows": [1]}, "keep": {"rows": [2]}}]}),
        ("counterfactuals", {"subsets": [{"remove": {"rows": [600]}}]}),
        ("counterfactuals", {"subsets": [{"remove": {"ids": ["nobody"]}}]}),
        ("counterfactuals", {"subsets": [{"keep": {"rows": []}}]}),
        ("counterfactuals", {"subsets": [{"remove": {"rows": [1], "ids": ["1"]}}]}),
        ("counterfactuals", {"subsets": [{"remove": {"rows": [1]}}] * 65}),
        ("counterfactuals", {"subsets": [{"remove": {"rows": [1]}}], "estimator": "magic"}),
        ("counterfactuals", {"subsets": [{"remove": {"rows": [1]}}], "interval": 1}),
        ("unlearning", {"forget": {"top_positive": 3}}),
        ("unlearning", {"forget": {"where": {"field": "source", "op": "exists", "value": True}}}),
    ],
)
def test_impossible_questions_are_refused(steady: Loaded, kind: str, change: dict) -> None:
    answer = steady.service.http.post(f"/v1/indexes/steady/{kind}", json={**QUERY, **change})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


def test_a_class_that_the_model_does_not_have_is_named(steady: Loaded) -> None:
    digit = {"input": [[0] * 28] * 28, "target": 3}
    queries = [{"dataset": "test", "rows": [0, 1]}, {"example": digit}, {"example": {**digit, "target": 10}}]
    answer = steady.service.http.post("/v1/indexes/steady/attributions", json={"queries": queries})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"pointer": "/queries/2/example/target", "detail": "target 10 is not one of the model's classes 0 … 9"}
    ]


@pytest.mark.parametrize(
    ("forget", "pointer"), [({"rows": list(range(600))}, "/forget"), ({"ids": ["nobody"]}, "/forget")]
)
def test_a_forget_set_that_cannot_be_is_named(steady: Loaded, forget: dict, pointer: str) -> None:
    answer = steady.service.http.post("/v1/indexes/steady/unlearning", json={**QUERY, "forget": forget})
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_damaged_files_are_told_and_harm_nobody_else(steady: Loaded) -> None:
    assert steady.service.finished(steady.fit("damaged", {"type": "grad_dot"}))["state"] == "succeeded"
    index = steady.service.get("/v1/indexes/damaged")
    path = next((steady.service.data / "artifacts" / "indexes" / index["id"] / "features").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    answer = steady.service.http.post("/v1/indexes/damaged/attributions", json=QUERY)
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/corrupt-artifact")
    steady.service.post("/v1/indexes/steady/attributions", QUERY)


async def test_questions_that_a_deletion_overtakes_find_nothing(steady: Loaded) -> None:
    """Their index was there, its files are not when the engine reads them: they are not damaged."""
    assert steady.service.finished(steady.fit("overtaken", {"type": "grad_dot"}))["state"] == "succeeded"
    data = steady.service.data.resolve()
    database = create_engine(DatabaseSettings(url=get_server(data / "postgres", cleanup_mode=None).get_uri()))
    sessions, artifacts = create_sessionmaker(database), ArtifactStore(data)
    resources = Resources(
        Settings(data_dir=data),
        database,
        sessions,
        artifacts,
        AsyncMock(),
        KeyRing(sessions),
        Following(sessions),
        asyncio.Event(),
    )
    selector = Selector(rows=[1])
    question = CounterfactualRequest.model_validate({**QUERY, "subsets": [{"remove": {"rows": [1]}}]})
    async with sessions() as session:
        index = await indexes.find(session, "overtaken")

        async def overtaken(operation: str, payload: object) -> None:
            await session.execute(delete(Index).where(Index.id == index.id))
            raise CorruptArtifact("A file is not there.")

        resources.engine.call.side_effect = overtaken
        for asked in (
            lambda: queries.self_influence(session, resources, "overtaken", Page(5, None), "desc"),
            lambda: queries.check_predictable(session, resources, "overtaken", question),
            lambda: queries.forgotten_rows(session, resources, index, selector),
        ):
            with pytest.raises(NotFound, match="There is no index"):
                await asked()
            with pytest.raises(NotFound, match="was deleted"):
                await indexes.answering(session, index)
            await session.rollback()
    await database.dispose()
