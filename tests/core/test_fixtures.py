"""Agreement with implementations that share no code with ours (`tests/fixtures/make.py`), and disagreement with wrong ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core.architectures.build import build
from attribution_core.curvature.vectors import flattened
from attribution_core.data.batch import Batch
from attribution_core.exact import LogisticRegression
from attribution_core.methods.loaded import LoadedIndex
from tests.core.methods.problems import MLP, SMALL, Problem, problem, relative_error

FIXTURES = Path(__file__).parents[1] / "fixtures"
# As others define it: Kronecker products for every layer.
EKFAC = {"type": "ekfac", "axes": "positions", "whole_layers": 0, "residual_power": 1, "projection": SMALL}
Arrays = dict[str, np.ndarray]


def stored(name: str) -> Arrays:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Arrays]:
    arrays = stored("network")
    module = build(MLP)
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    with torch.no_grad():
        for layer, matrix in zip(layers, (arrays["hidden"], arrays["output"]), strict=True):
            layer.weight.copy_(torch.from_numpy(matrix[:, :-1]))
            layer.bias.copy_(torch.from_numpy(matrix[:, -1]))
    inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    return problem(tmp_path_factory.mktemp("network"), inputs, targets, MLP, modules=[module]), arrays


def asked(arrays: Arrays) -> Batch:
    targets = torch.from_numpy(arrays["query_targets"])
    return Batch(torch.full((len(targets),), -1), torch.from_numpy(arrays["query_inputs"]), targets)


def scores(index: LoadedIndex, arrays: Arrays, damping: float) -> np.ndarray:
    return index.scores(index.query(asked(arrays), damping), np.arange(len(arrays["targets"])), rescore=True)


def test_per_example_gradients_are_those_by_hand(network: tuple[Problem, Arrays]) -> None:
    given, arrays = network
    member = given.fit("dot").members[0]
    training = member.observe(Batch(torch.arange(40), given.inputs.float(), given.targets)).training  # type: ignore[attr-defined]
    assert relative_error(-flattened([part.materialise() for part in training]), arrays["loss_gradients"]) < 1e-5
    measured = member.encode_query(asked(arrays)).measured
    assert relative_error(flattened([part.materialise() for part in measured]), arrays["margin_gradients"]) < 1e-5


@pytest.mark.parametrize(
    "method",
    [
        {"type": "explicit", "damping": 10},
        {"type": "cg", "damping": 10, "iterations": 300, "tolerance": 1e-7},
        {"type": "arnoldi", "damping": 10, "iterations": 57, "rank": 12},
        {"type": "lissa", "damping": 10, "depth": 100, "batch": 40},
    ],
    ids=lambda method: method["type"],
)
def test_hessian_methods_are_scipys(network: tuple[Problem, Arrays], method: dict[str, Any]) -> None:
    """At the same λ, whatever mean eigenvalue each estimated as its unit."""
    given, arrays = network
    index = given.fit("hessian", method={**method, "projection": SMALL})
    curvature: Any = index.members[0].curvature  # type: ignore[attr-defined]
    match method["type"]:
        case "cg":
            unit = abs(curvature._mean_eigenvalue)
        case "lissa":
            unit = abs(curvature._scales[0])
        case _:
            unit = curvature.mean
    expected = arrays["explicit" if method["type"] == "lissa" else method["type"]]
    assert relative_error(scores(index, arrays, float(arrays["damping"]) / unit), expected) < 1e-4


def errors_of_wrong_ones(found: np.ndarray, arrays: Arrays, method: str) -> dict[str, float]:
    prefix = f"wrong {method} "
    return {
        name.removeprefix(prefix): relative_error(found, value)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def test_an_unfinished_conjugate_gradient_is_scipys(network: tuple[Problem, Arrays]) -> None:
    """After three steps the path to the solution shows, which steepest descent does not take."""
    given, arrays = network
    method = {"type": "cg", "damping": 10, "iterations": 3, "tolerance": 1e-7, "projection": SMALL}
    index = given.fit("few", method=method)
    unit = abs(index.members[0].curvature._mean_eigenvalue)  # type: ignore[attr-defined]
    found = scores(index, arrays, float(arrays["damping"]) / unit)
    assert relative_error(found, arrays["cg few"]) < 1e-4
    assert relative_error(found, arrays["cg"]) > 1e-3
    wrong = errors_of_wrong_ones(found, arrays, "cg")
    assert set(wrong) == {"descent"}
    assert min(wrong.values()) > 0.01, wrong


def test_arnoldi_in_a_small_krylov_space_is_its_projection(network: tuple[Problem, Arrays]) -> None:
    """Where Ritz vectors are no eigenvectors yet; those of the Hessian itself, or of another start, are told apart."""
    given, arrays = network
    method = {"type": "arnoldi", "damping": 10, "iterations": 14, "rank": 6, "projection": SMALL}
    found = []
    for seed in (0, 1):
        index = given.fit(f"krylov-{seed}", method={**method, "seed": seed})
        unit = index.members[0].curvature.mean  # type: ignore[attr-defined]
        found.append(scores(index, arrays, float(arrays["damping"]) / unit))
    assert relative_error(found[0], arrays["arnoldi small"]) < 1e-3
    assert relative_error(found[1], arrays["arnoldi small"]) > 0.02
    values, vectors = np.linalg.eigh(arrays["hessian"])
    leading = np.abs(values).argsort()[::-1][:6]
    known = arrays["margin_gradients"] @ vectors[:, leading] / (values[leading] + arrays["damping"])
    converged = -known @ vectors[:, leading].T @ arrays["loss_gradients"].T / 40
    assert relative_error(found[0], converged) > 0.02


def test_lissa_of_small_batches_is_numpys_recursion(network: tuple[Problem, Arrays]) -> None:
    """On the same drawn rows: 8 of 40 per term."""
    given, arrays = network
    index = given.fit("series", method={"type": "lissa", "depth": 30, "batch": 8, "projection": SMALL})
    curvature: Any = index.members[0].curvature  # type: ignore[attr-defined]
    curvature.__dict__["_scales"] = (1.0, float(arrays["largest"]))  # estimated otherwise
    found = scores(index, arrays, float(arrays["damping"]))
    assert relative_error(found, arrays["lissa"]) < 1e-4
    wrong = errors_of_wrong_ones(found, arrays, "lissa")
    assert set(wrong) == {"rows", "undamped", "unscaled"}
    assert min(wrong.values()) > 0.01, wrong
    assert relative_error(found, arrays["explicit"]) > 0.01


def test_ekfac_is_kronfluences_and_no_wrong_one(network: tuple[Problem, Arrays]) -> None:
    given, arrays = network
    index = given.fit("ekfac", method={**EKFAC, "fisher": "empirical"})
    found = scores(index, arrays, 0.1)
    assert relative_error(found, arrays["ekfac"]) < 1e-4
    wrong = errors_of_wrong_ones(found, arrays, "ekfac")
    assert set(wrong) == {"basis", "twice", "transposed", "no 1/n"}
    assert min(wrong.values()) > 0.05, wrong


def test_ekfac_of_enumerated_labels_is_numpys(network: tuple[Problem, Arrays]) -> None:
    given, arrays = network
    index = given.fit("exact", method={**EKFAC, "fisher": "exact"})
    found = scores(index, arrays, 0.1)
    assert relative_error(found, arrays["ekfac exact"]) < 1e-4
    assert relative_error(found, arrays["ekfac"]) > 0.05


def test_the_fixtures_own_hessian_is_where_its_scores_come_from() -> None:
    """And the scores of another curvature differ: the comparisons above can tell."""
    arrays = stored("network")
    assert relative_error(arrays["cg"], arrays["explicit"]) < 1e-9
    assert relative_error(arrays["arnoldi"], arrays["explicit"]) > 1e-3
    plain = -arrays["margin_gradients"] @ arrays["loss_gradients"].T / 40
    assert relative_error(plain, arrays["explicit"]) > 0.1


def test_leave_one_out_of_a_logistic_regression_is_scipys() -> None:
    arrays = stored("logistic")
    model = LogisticRegression(arrays["x"], arrays["y"], arrays["theta"][None], float(arrays["penalty"]))
    found = model.parameter_changes(np.arange(60), "alo")
    assert relative_error(found, arrays["alo"]) < 1e-9
    assert relative_error(model.parameter_changes(np.arange(60), "newton"), arrays["refits"]) < 1e-5
    assert relative_error(model.parameter_changes(np.arange(60), "influence"), arrays["wrong no leverage"]) < 1e-9
    assert relative_error(found, arrays["wrong no leverage"]) > 0.02
    assert relative_error(found, arrays["wrong sign"]) > 1
    assert relative_error(found, arrays["refits"]) < relative_error(arrays["wrong no leverage"], arrays["refits"]) / 2


def test_fixtures_stay_small() -> None:
    files = list(FIXTURES.glob("*.npz"))
    assert len(files) == 2
    assert all(path.stat().st_size < 200_000 for path in files)
