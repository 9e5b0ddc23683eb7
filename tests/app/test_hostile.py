"""Every field of every body replaced by what nobody should send: refused with a pointer into what was sent, never a fault."""

import copy
import json
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import httpx2 as httpx
import pytest

from attribution_core.method_spec import OFFERED
from tests.conftest import MLP, Loaded, save_digits, train_mlp

ROWS = {"dataset": "test", "rows": [3, 8]}
WHERE = {"and": [{"field": "source", "op": "in", "value": ["a", 1, None]}, {"not": {"field": "row", "op": "lt", "value": 3}}]}  # fmt: skip
RECIPE: dict[str, Any] = {
    "optimizer": {"type": "sgd", "momentum": 0.9, "nesterov": True},
    "learning_rate": 0.05,
    "schedule": {"type": "one_cycle", "rise": 0.3, "initial_divisor": 25, "final_divisor": 1e4, "anneal": "linear"},
    "weight_decay": 1e-3,
    "epochs": 1,
    "batch_size": 50,
    "drop_last": False,
    "shuffle": True,
    "initialisation": {"type": "seed"},
    "gradient_clip": 1.0,
    "augmentation": "shift",
    "max_shift": 2,
}
PROTOCOL = {"alpha": 0.5, "subsets": 8, "seeds": 1, "first_seed": 0, "semantics": "resample"}
QUESTION = {"queries": [ROWS, {"example": {"input": [[128] * 28] * 28, "target": 3}}], "damping": 0.1, "rescore": True}
INDEX: dict[str, Any] = {
    "name": "hostile-index",
    "model": "hostile",
    "dataset": "digits",
    "checkpoints": "final",
    "measurement": "margin",
    "layers": ["*"],
    "precision": "float32",
    "store": {"dtype": "float32", "layout": "auto"},
    "search": {"type": "ivfpq", "lists": 2, "probes": 1, "subquantizers": 4, "bits": 8},
}


def method_body(name: str) -> dict[str, Any]:
    """A method with all of its fields."""
    wanted = {"queries": ROWS, "prior": ["steady"]}
    fields = OFFERED[name].model_fields
    method = OFFERED[name].model_validate({"type": name, **{key: wanted[key] for key in wanted if key in fields}})
    return method.model_dump(mode="json", by_alias=True)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/models": {
        "name": "hostile-model",
        "architecture": MLP,
        "task": {"type": "classification"},
        "tokenizer": {"type": "huggingface", "source": "files:tokenizer.json"},
        "recipe": RECIPE,
        "metadata": {"a": 1},
    },
    "/v1/models/hostile/trainings": {"dataset": "digits", "seeds": [0, 1], "save_every": 1, "run": "hostile", "max_hours": 1},
    "/v1/datasets": {
        "name": "hostile-data",
        "kind": "image",
        "format": "csv",
        "source": "files:numbers.csv",
        "input": ["a", "b"],
        "target": "label",
        "id": "id",
        "metadata": ["c"],
        "shape": [2],
        "channels_first": True,
        "normalize": {"mean": [0.5], "std": [0.5]},
        "max_length": 5,
    },
    "/v1/datasets/digits/versions": {"name": "hostile-version", "format": "csv", "source": "files:numbers.csv"},
    "/v1/datasets/hostile/deletions": {"selector": {"where": WHERE}},
    "/v1/indexes": {**INDEX, "method": {"type": "trak", "projection": {"dim": 64, "seed": 1}, "damping": 0.1}},
    **{f"/v1/indexes#{name}": {**INDEX, "method": method_body(name)} for name in OFFERED},
    "/v1/indexes/hostile/attributions": {**QUESTION, "top_k": 3, "filter": WHERE, "include": ["metadata", "preview"]},
    "/v1/indexes/hostile/counterfactuals": {
        **QUESTION,
        "subsets": [{"remove": {"where": WHERE}}, {"keep": {"rows": [1, 2]}}, {"remove": {"top_positive": 3}}, {"remove": {"ids": ["1"]}}],
        "estimator": "additive",
        "interval": 0.9,
    },
    "/v1/indexes/hostile/unlearning": {**QUESTION, "forget": {"where": WHERE}, "estimator": "additive", "interval": 0.9},
    "/v1/indexes/hostile/evaluations": {
        "queries": {**ROWS, "count": 10},
        "protocol": PROTOCOL,
        "deterministic": [0.9],
        "loo": {"examples": 4, "seeds": 2},
        "removal": {"top": [10], "queries": 2, "seeds": 1},
        "mislabelled": WHERE,
        "source": "source",
        "tune": {"dampings": [0.01, 0.1], "candidates": ["steady"]},
        "max_hours": 1,
    },
    "/v1/indexes/hostile/verifications": {
        "queries": [ROWS],
        "subsets": [{"remove": {"top_positive": 5}}, {"keep": {"where": WHERE}}],
        "seeds": [0, 1],
        "semantics": "mask",
        "damping": 0.1,
        "interval": 0.9,
        "max_hours": 1,
    },
    "/v1/indexes/hostile/unlearned-checkpoints": {
        "forget": {"rows": [1, 2]},
        "method": {"type": "gradient_ascent"},
        "run": "hostile",
        "check": {"oracles": 2, "test": {"dataset": "test", "count": 10}, "baselines": [{"type": "fine_tune"}], "semantics": "resample"},
        "max_hours": 1,
    },
    "/v1/indexes/hostile/extensions": {"dataset": "digits"},
}  # fmt: skip
NAN, INFINITY = float("nan"), float("inf")
ODD: list[Any] = [
    None, True, 0, -1, 0.5, 2**53, 2**63 - 1, -(2**63), 2**63, 10**400, 1e308, 5e-324, -0.0, NAN, INFINITY, -INFINITY,
    "", " ", "x", "*", "\x00", "\ud800", "é\u202e\n", "../../etc/passwd", "A" * 100_000, "NaN",
    [], [[]], [None], [{}], [0] * 3, ["x", "x"], {}, {"": ""}, {"type": "x"}, {"type": ["x"]}, {"a/b~": {"and": []}}, {"A" * 100_000: 1},
]  # fmt: skip

NUMBERS = count()
STRIDE = 11  # of all variants, every so many is sent; 1, by hand, sends tens of thousands


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, the document itself first."""
    yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, entry in entries:
        if at[-1:] != ("input",):  # an example's pixels are all alike
            yield from places(entry, (*at, step))


def changed(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    copied = copy.deepcopy(body)
    inner = copied
    for step in at[:-1]:
        inner = inner[step]
    inner[at[-1]] = value
    return copied


def variants(body: dict[str, Any], under: tuple[Any, ...] = ()) -> Iterator[Any]:
    """The body with each of its places replaced by each odd value, left out, or with a field more."""
    for at in places(body):
        if at[: len(under)] != under:
            continue
        for odd in ODD:
            yield changed(body, at, odd)
        found: Any = body
        for step in at:
            found = found[step]
        if isinstance(found, dict):
            yield changed(body, at, {**found, "colour": "red"})
            for name in found:
                yield changed(body, at, {key: value for key, value in found.items() if key != name})
        if isinstance(found, list):
            yield changed(body, at, found * 2)


def leads_somewhere(pointer: str, document: Any) -> bool:
    """Whether a pointer leads into a document, or to a field that should be where it leads."""
    *steps, last = pointer.split("/")[1:] or [None]
    for step in [*steps, last] if last is not None else []:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(document, list) and name.isdecimal() and int(name) < len(document):
            document = document[int(name)]
        elif isinstance(document, dict) and name in document:
            document = document[name]
        else:
            return step is last and isinstance(document, dict)
    return True


def check(answer: httpx.Response, sent: Any) -> None:
    told = f"{answer.request.url} {json.dumps(sent)[:600]} -> {answer.status_code} {answer.text[:600]}"
    assert answer.status_code < 500, told
    if answer.status_code < 400:
        return
    assert answer.headers["content-type"] == "application/problem+json", told
    assert len(answer.content) < 20_000, told
    for entry in answer.json()["errors"]:
        assert leads_somewhere(entry["pointer"], sent), told


@pytest.fixture(scope="module")
def hostile(steady: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The shared service with a model that has a recipe, an index of it, and a data set to delete from."""
    folder = tmp_path_factory.mktemp("hostile")
    model = {"name": "hostile", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
    steady.service.post("/v1/models", model, 201)
    file = train_mlp(folder / "some.safetensors", 0)
    steady.service.upload("/v1/models/hostile/checkpoints", file, 201, meta={"run": "one", "step": 12})
    spec = {"name": "hostile", "kind": "image", "input": "image", "target": "label", "metadata": ["source"]}
    jobs = [
        steady.service.upload("/v1/datasets", save_digits(folder / "some.npz", 0, 20), 202, spec=spec),
        steady.service.post(
            "/v1/indexes", {**INDEX, "name": "hostile", "method": {"type": "ekfac"}, "search": {}}, 202
        ),
    ]
    for job in jobs:
        assert steady.service.finished(job)["state"] == "succeeded"
    return steady


def named_anew(sent: Any, body: dict[str, Any]) -> Any:
    """Give what keeps the body's name another, so that it is not refused for being taken."""
    kept = isinstance(sent, dict) and "name" in body and sent.get("name") == body["name"]
    return {**sent, "name": f"hostile-{next(NUMBERS)}"} if kept else sent


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_fault_of_the_service(hostile: Loaded, path: str) -> None:
    url, _, method = path.partition("#")
    chosen = variants(BODIES[path], ("method",)) if method else variants(BODIES[path])
    for variant in islice(chosen, None, None, STRIDE * (4 if method else 1)):
        sent = named_anew(variant, BODIES[path])
        answer = hostile.service.http.post(url, content=json.dumps(sent), headers={"Content-Type": "application/json"})
        check(answer, sent)
        if answer.status_code == 202:
            hostile.service.http.post(f"/v1/jobs/{answer.headers['location'].rpartition('/')[2]}/cancel")


@pytest.mark.parametrize(
    ("path", "part", "body"),
    [
        ("/v1/datasets", "spec", BODIES["/v1/datasets"]),
        ("/v1/models/hostile/checkpoints", "meta",
         {"run": "two", "step": 1, "epoch": 0.5, "learning_rate": 0.1, "seed": 0, "final": True}),
    ],
)  # fmt: skip
def test_no_part_of_a_form_is_a_fault_of_the_service(hostile: Loaded, path: str, part: str, body: dict) -> None:
    for sent in islice(variants(body), None, None, STRIDE):
        answer = hostile.service.http.post(path, data={part: json.dumps(sent)}, files={"file": ("a.npz", b"nothing")})
        check(answer, {part: sent, "file": None})
