"""Perturbed copies: their weights by the formula, and an index of them against one of the same weights as checkpoints of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core.checkpoints import load_model, save_checkpoint
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef
from attribution_core.method_spec import Perturbation
from attribution_core.perturbation import perturb
from tests.core.methods.copies import chosen, relative_error, scores
from tests.core.methods.problems import SMALL, N, Problem

ALL = np.arange(N)
OPTIONS = {"copies": 2, "noise": 0.4, "seed": 5}
PERTURBATION = Perturbation.model_validate(OPTIONS)
METHODS: list[dict[str, Any]] = [
    {"type": "ekfac", "projection": SMALL},
    {"type": "gauss_newton", "projection": SMALL},
    {"type": "datainf", "projection": SMALL},
    {"type": "explicit", "curvature": "gauss_newton", "projection": SMALL},
    {"type": "grad_dot", "projection": SMALL},
    {"type": "trak", "projection": SMALL},
    {"type": "logra", "projection": {"type": "factored", "dim": 64}},
]


def written(problem: Problem, reference: CheckpointRef, into: Path) -> list[CheckpointRef]:
    """A checkpoint and its copies, each as a checkpoint."""
    found = [reference]
    for copy in (1, 2):
        module = load_model(problem.spec.architecture, reference.path)
        perturb(module, PERTURBATION, reference.sha256, copy)
        path = into / f"{reference.id}-{copy}.safetensors"
        save_checkpoint(module, path)
        found.append(CheckpointRef(id=path.stem, path=path, sha256=sha256_file(path)))
    return found


def test_noise_has_the_size_that_was_asked_for_and_weights_keep_theirs() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200))
    with torch.no_grad():
        module[0].weight.mul_(7)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    perturb(module, Perturbation(copies=1, noise=0.4), "weights", 1)
    weight, old = module[0].weight.detach(), before["0.weight"]
    noise = weight * 1.16**0.5 - old
    assert noise.std() == pytest.approx(0.4 * float(old.square().mean().sqrt()), rel=0.01)
    assert float(torch.corrcoef(torch.stack([noise.flatten(), old.flatten()]))[0, 1]) == pytest.approx(0, abs=0.02)
    assert weight.square().mean() == pytest.approx(float(old.square().mean()), rel=0.02)
    # A gain of ones is perturbed like any other; a bias of zeros has no size, and stays.
    assert not torch.equal(module[1].weight, before["1.weight"])
    assert torch.equal(module[1].bias, before["1.bias"])


def test_copies_differ_by_seed_number_and_weights_and_are_repeatable() -> None:
    def made(seed: int, weights: str, copy: int) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(8, 8)
        perturb(module, Perturbation(seed=seed), weights, copy)
        return module.weight.detach()

    first = made(0, "a", 1)
    assert torch.equal(first, made(0, "a", 1))
    for other in (made(1, "a", 1), made(0, "b", 1), made(0, "a", 2)):
        assert not torch.isclose(first, other).any()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_an_index_of_copies_is_that_of_an_ensemble_of_the_same_weights(
    ensemble: Problem, method: dict[str, Any], tmp_path: Path
) -> None:
    given = ensemble.spec.checkpoints[:2]
    index = ensemble.fit("copies", method={**method, "perturbation": OPTIONS}, checkpoints=given)
    members = [member for reference in given for member in written(ensemble, reference, tmp_path)]
    together = ensemble.fit("together", method={**method, **chosen(index)}, checkpoints=members)
    assert relative_error(scores(index, ensemble), scores(together, ensemble)) < 1e-6
    if together.spec.method.self_influence:
        assert relative_error(index.self_influence(), together.self_influence()) < 1e-6
    if "newton" in together.spec.method.estimators:
        groups = [ALL[:9], ALL[20:23]]
        found, expected = (one.newton_effects(one.query(ensemble.queries(), None), groups) for one in (index, together))
        assert relative_error(found, expected) < 1e-5


def test_outputs_are_those_of_the_checkpoints_alone(ensemble: Problem) -> None:
    method = {"type": "ekfac", "projection": SMALL}
    plain = ensemble.fit("plain", method=method)
    index = ensemble.fit("copies", method={**method, "perturbation": OPTIONS})
    queries = ensemble.queries()
    assert index.outputs(queries) == plain.outputs(queries)
    assert index.query(queries, None).outputs == plain.query(queries, None).outputs
    assert relative_error(scores(index, ensemble), scores(plain, ensemble)) > 0.01


def test_copies_do_not_depend_on_the_order_of_checkpoints(ensemble: Problem) -> None:
    method = {"type": "ekfac", "projection": SMALL, "perturbation": OPTIONS}
    given = ensemble.spec.checkpoints
    one, other = (ensemble.fit("one", method=method, checkpoints=order) for order in (given, given[::-1]))
    assert relative_error(scores(one, ensemble), scores(other, ensemble)) < 1e-5


def test_copies_decide_the_fingerprint(problem: Problem) -> None:
    methods = [
        {"type": "ekfac", "perturbation": chosen} for chosen in (None, {}, {"copies": 3}, {"noise": 0.2}, {"seed": 1})
    ]
    assert len({problem.with_(method=method).fingerprint() for method in methods}) == len(methods)


def test_members_are_those_of_the_checkpoints_that_a_spec_has_now(ensemble: Problem) -> None:
    spec = ensemble.with_(method={"type": "ekfac", "perturbation": OPTIONS})
    assert len(spec.members) == 9
    assert spec.answering() == [0, 3, 6]
    fewer = spec.model_copy(update={"checkpoints": spec.checkpoints[1:]})
    assert [member.checkpoint.id for member in fewer.members] == ["ckpt_1"] * 3 + ["ckpt_2"] * 3
