"""Representer points through fit and index, against refits of the last layer in float64: the decomposition, the sign, the scale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.errors import InvalidInputError
from attribution_core.methods.artifact import read_description
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.representer import Representer
from tests.core.methods.problems import N, Problem, relative_error
from tests.core.methods.problems import problem as written
from tests.core.methods.test_fit import hashes, run
from tests.core.methods.test_retraining import margins, refitted

L2 = 0.05


def representer(given: Problem, name: str, l2: float = L2, **changes: object) -> LoadedIndex:
    measurement = {"measurement": changes.pop("measurement")} if "measurement" in changes else {}
    return given.fit(
        name, method={"type": "representer", "l2": l2, **changes}, store={"dtype": "float32"}, **measurement
    )


def scores(index: LoadedIndex, given: Problem) -> np.ndarray:
    return index.scores(index.query(given.queries(), None), np.arange(N), rescore=True)


def features(given: Problem, inputs: Tensor) -> Tensor:
    """What the last layer takes, (n, d) float64, without the 1 of the bias."""
    module = given.modules()[0]
    assert isinstance(module, nn.Sequential)
    with torch.no_grad():
        found: Tensor = module[:-1](inputs.double())
    return found


def by_hand(given: Problem, l2: float) -> tuple[Tensor, Tensor, Tensor]:
    """The last layer's optimum (3, d), the training outputs' slopes there (n, 3), and kernels with the queries (queries, n)."""
    train, asked = features(given, given.inputs), features(given, given.queries().inputs)
    theta = refitted(train, given.targets, 3, l2)
    logits = train @ theta[:, :-1].T + theta[:, -1]
    slopes = logits.softmax(1) - nn.functional.one_hot(given.targets, 3)
    return theta, slopes, asked @ train.T + 1


def left_out(given: Problem, l2: float) -> np.ndarray:
    """The queries' margins with the last layer refitted on everything, minus without each example, (queries, n)."""
    queries = given.queries()
    train, asked = features(given, given.inputs), features(given, queries.inputs)
    theta = refitted(train, given.targets, 3, l2)
    effects = []
    for row in range(N):
        rest = torch.arange(N) != row
        # The total penalty stays: the mean is over one example less.
        without = refitted(train[rest], given.targets[rest], 3, l2 * N / (N - 1), theta)
        effects.append(margins(theta, asked, queries.targets) - margins(without, asked, queries.targets))
    return torch.stack(effects, 1).numpy()


def test_scores_are_the_representer_values_and_sum_to_the_refitted_output(problem: Problem) -> None:
    theta, slopes, kernels = by_hand(problem, L2)
    targets = problem.queries().targets
    expected = -(slopes.T[targets] * kernels) / (N * L2)  # (queries, n)
    index = representer(problem, "logit", measurement="logit")
    found = scores(index, problem)
    assert relative_error(found, expected) < 1e-5
    asked = features(problem, problem.queries().inputs)
    logits = asked @ theta[:, :-1].T + theta[:, -1]
    assert relative_error(found.sum(1), logits.gather(1, targets[:, None])[:, 0]) < 1e-5
    assert index.dim == theta.numel()


def test_the_decomposition_is_exact_in_float64(problem: Problem) -> None:
    """The layer is the sum of its representers, and its outputs are their kernels' sums: on the inputs as the network computes them."""
    index = representer(problem, "exact")
    (member,) = index.members
    assert isinstance(member, Representer)
    # In the fit's own batches: the network computes in float32, where another batch size may round differently.
    head, parts = member.head, [member.examples(batch)["features"] for batch in index.context.batches(0)]
    inputs = np.concatenate(parts)
    outputs = torch.from_numpy(inputs @ head.T)
    slopes = (outputs.softmax(1) - nn.functional.one_hot(problem.targets, 3)).numpy()
    alphas = -slopes / (N * L2)
    np.testing.assert_allclose(head, alphas.T @ inputs, atol=1e-12)
    np.testing.assert_allclose(outputs, inputs @ inputs.T @ alphas, atol=1e-11)
    assert np.abs(head - by_hand(problem, L2)[0].numpy()).max() < 1e-6


def test_margins_are_taken_at_the_refitted_outputs(problem: Problem) -> None:
    theta, slopes, kernels = by_hand(problem, L2)
    queries = problem.queries()
    asked = features(problem, queries.inputs)
    outputs = (asked @ theta[:, :-1].T + theta[:, -1]).requires_grad_()
    others = outputs.scatter(1, queries.targets[:, None], -torch.inf).logsumexp(1)
    margin = outputs.gather(1, queries.targets[:, None])[:, 0] - others
    (pulls,) = torch.autograd.grad(margin.sum(), outputs)
    index = representer(problem, "margin")
    assert relative_error(scores(index, problem), -(pulls @ slopes.T) * kernels / (N * L2)) < 1e-5
    own = index.self_influence()
    assert (own > 0).all(), "having an example raises its own margin"


@pytest.mark.parametrize(
    ("l2", "correlation", "slope"), [(L2, 0.9, (1, 20)), (30.0, 0.999, (0.97, 1.03))], ids=["usual", "heavy penalty"]
)
def test_sign_and_scale_are_those_of_leaving_out(
    problem: Problem, l2: float, correlation: float, slope: tuple[float, float]
) -> None:
    """The inverse curvature is (n·l2)⁻¹ where the penalty outweighs the data; elsewhere scores are too large, of the same sign."""
    exact, found = left_out(problem, l2), scores(representer(problem, f"l2-{l2:g}", l2), problem)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > correlation
    assert slope[0] < (found * exact).sum() / (exact**2).sum() < slope[1]
    strong = np.abs(exact) > np.quantile(np.abs(exact), 0.8)
    assert (np.sign(found) == np.sign(exact))[strong].mean() > 0.95


def test_the_index_tells_how_far_the_weights_were(problem: Problem) -> None:
    spec = problem.with_(method={"type": "representer", "l2": L2})
    run(spec, problem.folder / "w", problem.folder / "told")
    coverage = read_description(problem.folder / "told")["coverage"]
    assert coverage["covered"] == ["output"]
    assert 0 < coverage["percent"] < 100
    (head,) = coverage["head"]
    assert 0.001 < head["relative_gradient"] < 1
    assert 0.5 < head["correlation"] < 1


def test_weights_that_are_not_at_the_optimum_are_refused_where_they_have_to_be(
    problem: Problem, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match="set optimum to refit") as caught:
        representer(problem, "required", optimum="require")
    assert caught.value.pointer == "/method/optimum"
    theta, _, _ = by_hand(problem, L2)
    (module,) = problem.modules()
    with torch.no_grad():
        module[-1].weight.copy_(theta[:, :-1])  # type: ignore[index, union-attr]
        module[-1].bias.copy_(theta[:, -1])  # type: ignore[index, union-attr]
    there = written(tmp_path, problem.inputs, problem.targets, problem.spec.architecture, modules=[module])
    required = scores(representer(there, "required", optimum="require"), there)
    assert relative_error(required, scores(representer(problem, "refit"), problem)) < 1e-4


def test_predictions_of_a_regression_are_sums(regression: Problem) -> None:
    given, index = regression, representer(regression, "representer")
    (member,) = index.members
    assert isinstance(member, Representer)
    asked = features(given, given.queries().inputs)
    head = torch.from_numpy(member.head)
    outputs = asked @ head[:, :-1].T + head[:, -1]
    assert relative_error(scores(index, given).sum(1), outputs[:, 0]) < 1e-5


def test_same_bytes_in_any_order(problem: Problem) -> None:
    spec, folder = problem.with_(method={"type": "representer", "l2": L2}), problem.folder
    assert run(spec, folder / "w1", folder / "one") == run(spec, folder / "w2", folder / "two", seed=5)
    assert hashes(folder / "one") == hashes(folder / "two")


def test_what_it_cannot_explain_is_refused(problem: Problem) -> None:
    with pytest.raises(InvalidInputError) as caught:
        problem.fit("layers", method={"type": "representer"}, layers=["hidden_0"])
    assert caught.value.pointer == "/layers"
    (member,) = representer(problem, "plain").members
    assert isinstance(member, Representer)
    member.examples(problem.queries())
    member.checkpoint.module.register_forward_hook(lambda *call: call[-1].softmax(1))
    with pytest.raises(InvalidInputError, match="end in a linear layer") as caught:
        member.examples(problem.queries())
    assert caught.value.pointer == "/method/type"
