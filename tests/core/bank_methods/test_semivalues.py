"""Shapley and Beta Shapley values: the identity they rest on, over all subsets; what is expected of an estimate, over all banks; real retrainings."""

from itertools import permutations, product
from math import comb, factorial, pi
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution_core.arrays import write_arrays
from attribution_core.bank_methods.banzhaf import data_banzhaf
from attribution_core.bank_methods.semivalues import SizeWeights, beta_shapley, data_shapley, semivalues
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.training.bank import Bank, train_group
from attribution_core.training.optimizers import Tensors
from attribution_core.training.sizes import size_law
from attribution_core.training.spec import Protocol, Semantics, TrainSpec, subset_mask, subset_size
from attribution_core.training.trainer import Run, Trainer
from tests.core.bank_methods.test_regressions import all_subsets
from tests.core.training.problems import N, spec_of

BETAS = [(1.0, 1.0), (4.0, 1.0), (1.0, 16.0), (0.5, 2.0)]


def powerset(n: int) -> np.ndarray:
    return np.array([[bool(number >> i & 1) for i in range(n)] for number in range(2**n)])


def utilities(n: int, queries: int = 2, seed: int = 0) -> np.ndarray:
    """Values of all subsets, (2^n, queries), without any structure."""
    return np.random.default_rng(seed).normal(size=(2**n, queries))


def marginal_sums(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A semivalue by its definition, (queries, n): Σ_S w_{|S|} / C(n−1, |S|) [f(S ∪ i) − f(S)]."""
    n = len(weights)
    found = np.zeros((values.shape[1], n))
    for number, mask in enumerate(powerset(n)):
        size = int(mask.sum())
        for player in np.flatnonzero(~mask):
            gain = values[number | 1 << player] - values[number]
            found[:, player] += weights[size] / comb(n - 1, size) * gain
    return found


def integrated(n: int, alpha: float, beta: float) -> np.ndarray:
    """w_s = C(n−1, s) ∫ t^s (1−t)^{n−1−s} p(t) dt, p the density of Beta(β, α), by quadrature in θ, t = sin²θ."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    angle = (nodes + 1) * pi / 4
    share = np.sin(angle) ** 2
    density = np.sin(angle) ** (2 * beta - 1) * np.cos(angle) ** (2 * alpha - 1) * weights
    size = np.arange(n)[:, None]
    counts = np.array([[comb(n - 1, s)] for s in range(n)])
    return counts * (share**size * (1 - share) ** (n - 1 - size)) @ density / density.sum()


def by_strata(values: np.ndarray, weights: SizeWeights) -> np.ndarray:
    """Σ_a level_a μ_a + Σ_a κ_a c_{a,i} from all subsets, (queries, n)."""
    n = len(weights.level) - 1
    masks = powerset(n)
    found = np.zeros((values.shape[1], n))
    for size in range(n + 1):
        chosen = masks.sum(1) == size
        mean = values[chosen].mean(0)
        covariance = (values[chosen] - mean).T @ (masks[chosen] - size / n) / chosen.sum()
        found += weights.level[size] * mean[:, None] + weights.contrast[size] * covariance
    return found


@pytest.mark.parametrize(("alpha", "beta"), BETAS)
@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_identity_over_all_subsets_is_the_definition(n: int, alpha: float, beta: float) -> None:
    values, weights = utilities(n), integrated(n, alpha, beta)
    assert weights.sum() == pytest.approx(1)
    expected = marginal_sums(values, weights)
    np.testing.assert_allclose(by_strata(values, SizeWeights.beta(n, alpha, beta)), expected, atol=1e-12)


def test_shapley_is_the_mean_over_orders() -> None:
    n, values = 6, utilities(6)
    found = np.zeros((2, n))
    for order in permutations(range(n)):
        before = 0
        for player in order:
            found[:, player] += values[before | 1 << player] - values[before]
            before |= 1 << player
    np.testing.assert_allclose(by_strata(values, SizeWeights.beta(n, 1, 1)), found / factorial(n), atol=1e-12)


def test_weights_of_banzhaf_values_give_banzhaf_values() -> None:
    n, values = 7, utilities(7)
    binomial = np.array([comb(n - 1, s) for s in range(n)]) / 2 ** (n - 1)
    banzhaf = data_banzhaf(Retrainings(powerset(n), values[:, None]))
    np.testing.assert_allclose(by_strata(values, SizeWeights.of(binomial)), banzhaf, atol=1e-12)
    narrow = by_strata(values, SizeWeights.beta(n, 1e6, 1e6))
    np.testing.assert_allclose(narrow, banzhaf, atol=1e-4)
    two = all_subsets(2, lambda mask: np.array([mask @ [1.0, 2.0] + 3 * mask.all()]))
    np.testing.assert_allclose(by_strata(two.means, SizeWeights.beta(2, 1, 1)), data_banzhaf(two))


def banks(n: int, values: np.ndarray, drawn: int) -> tuple[list[Retrainings], np.ndarray]:
    """Every bank of so many subsets between none and all, and how likely it is."""
    masks, law = powerset(n), size_law(n)
    inner = range(1, 2**n - 1)
    found, chances = [], []
    for numbers in product(inner, repeat=drawn):
        chosen = [0, 2**n - 1, *numbers]
        found.append(Retrainings(masks[chosen], values[chosen][:, None]))
        sizes = masks[list(numbers)].sum(1)
        chances.append(np.prod([law[size] / comb(n, size) for size in sizes]))
    return found, np.array(chances)


@pytest.mark.parametrize(("n", "drawn"), [(3, 2), (3, 3), (4, 3)])
def test_estimates_are_right_on_average_over_all_banks(n: int, drawn: int) -> None:
    values = utilities(n)
    found, chances = banks(n, values, drawn)
    assert chances.sum() == pytest.approx(1)
    for alpha, beta in BETAS:
        weights = SizeWeights.beta(n, alpha, beta)
        mean = sum(chance * semivalues(bank, weights) for bank, chance in zip(found, chances, strict=True))
        np.testing.assert_allclose(mean, marginal_sums(values, integrated(n, alpha, beta)), atol=1e-10)


def test_axioms() -> None:
    """Players 0 and 1 need each other, 2 acts alone, 3 does nothing."""
    n = 4
    masks = powerset(n)
    game = 2.0 * (masks[:, 0] & masks[:, 1]) + 0.5 * masks[:, 2]
    values = np.stack([game, utilities(n)[:, 0]], axis=1)
    found, chances = banks(n, values, 2)
    weights = SizeWeights.beta(n, 1, 1)
    estimates = np.stack([semivalues(bank, weights) for bank in found])
    mean = np.tensordot(chances, estimates, axes=1)
    assert mean[0] == pytest.approx(
        [1, 1, 0.5, 0], abs=1e-12
    )  # symmetry, the null player, who adds the same everywhere
    everything = values[-1] - values[0]
    np.testing.assert_allclose(estimates.sum(2), np.broadcast_to(everything, (len(found), 2)), atol=1e-12)
    for bank, estimate in zip(found[::40], estimates[::40], strict=True):
        summed = semivalues(Retrainings(bank.masks, bank.values @ np.array([[1.0], [3.0]])), weights)
        assert summed[0] == pytest.approx(estimate[0] + 3 * estimate[1])  # linearity
        renamed = semivalues(Retrainings(bank.masks[:, [2, 0, 3, 1]], bank.values), weights)
        assert renamed == pytest.approx(estimate[:, [2, 0, 3, 1]])


def masks_of(protocol: Protocol, n: int) -> np.ndarray:
    return np.stack([subset_mask(protocol, n, number) for number in range(protocol.subsets)])


def noise_of_one(n: int, alpha: float, beta: float) -> float:
    """The standard deviation of a value from one subset whose measurement is noise of variance 1."""
    sizes, contrast = np.arange(1, n), SizeWeights.beta(n, alpha, beta).contrast[1:n]
    return float(np.sqrt((contrast**2 * sizes / n * (1 - sizes / n) / size_law(n)[1:n]).sum()))


@pytest.mark.parametrize(
    ("alpha", "beta", "documented"), [(1.0, 1.0, pi), (4.0, 1.0, 5.7), (1.0, 4.0, 5.7), (16.0, 1.0, 15.0)]
)
def test_the_noise_is_as_documented(alpha: float, beta: float, documented: float) -> None:
    """A measurement that no example explains, on top of what sizes are worth: only the noise is left."""
    n, protocol = 100, Protocol(subsets=402, sizes="varied")
    masks = masks_of(protocol, n)
    values = 0.3 * np.random.default_rng(0).normal(size=(402, 40)) + 5 * np.sqrt(masks.mean(1))[:, None]
    found = beta_shapley(Retrainings(masks, values[:, None]), alpha, beta)
    spread = (found - found.mean(1, keepdims=True)).std()
    assert spread == pytest.approx(0.3 * noise_of_one(n, alpha, beta) / np.sqrt(400), rel=0.1)
    assert noise_of_one(1000, alpha, beta) == pytest.approx(documented, rel=0.05)


def test_a_planted_linear_truth_is_found() -> None:
    n, protocol = 30, Protocol(subsets=3000, sizes="varied", seed=3)
    effects = np.random.default_rng(1).normal(size=(2, n))
    masks = masks_of(protocol, n)
    bank = Retrainings(masks, (masks @ effects.T + 7)[:, None])
    for found in (data_shapley(bank), beta_shapley(bank, 4, 1)):
        assert np.abs(found - effects).max() < 0.5
        assert np.corrcoef(found.ravel(), effects.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("semantics", ["resample", "mask"])
def test_values_of_a_real_model_are_those_of_all_its_retrainings(tmp_path: Path, semantics: Semantics) -> None:
    """Five examples are trained on, so that all 32 subsets can be; a bank's own retrainings are among them, that on nothing too."""
    n = 5
    (tmp_path / "data").mkdir()
    whole = spec_of(tmp_path, "mlp", weight_decay=0.01)
    spec = TrainSpec.model_validate({**whole.model_dump(), "left_out": list(range(n, N))})
    protocol = Protocol(subsets=802, sizes="varied", semantics=semantics)
    trainer, generator = Trainer(spec), torch.Generator().manual_seed(3)
    queries = Batch(torch.full((3,), -1), torch.randn(3, 5, generator=generator), torch.tensor([0, 1, 2]))
    rows = np.zeros((2**n, N), bool)
    rows[:, :n] = powerset(n)
    trained = trainer.train([Run(kept, protocol.first_seed) for kept in rows], semantics).parameters
    models = [{name: value[number] for name, value in trained.items()} for number in range(2**n)]
    values = np.stack([measured(trainer, model, queries) for model in models])
    untrained = trainer.initial(Run(rows[0], protocol.first_seed))
    assert (np.abs(measured(trainer, untrained, queries) - values[0]) < 1e-6).all() == (semantics == "resample")

    write_arrays(tmp_path / "0", train_group(trainer, protocol, 0))
    bank = Bank(spec, protocol, [tmp_path / "0"] * 26)
    masks = bank.masks[:, :n]
    numbers = masks @ 2 ** np.arange(n)
    assert bank.values(queries, "margin")[:32, 0] == pytest.approx(values[numbers[:32]], rel=1e-4, abs=1e-5)
    retrainings = Retrainings(masks, values[numbers][:, None])
    for alpha, beta in ((1.0, 1.0), (4.0, 1.0)):
        exact = marginal_sums(values, integrated(n, alpha, beta))
        error = noise_of_one(n, alpha, beta) * values.std(0)[:, None] / np.sqrt(800)
        assert (np.abs(beta_shapley(retrainings, alpha, beta) - exact) < 5 * error).all()
        assert (np.abs(exact) > 10 * error).any(), "there is something to find"


def measured(trainer: Trainer, parameters: Tensors, queries: Batch) -> np.ndarray:
    """The queries' margins under one model, (queries,)."""
    with torch.no_grad():
        output = trainer.network.loaded(parameters)(queries.inputs)
    return np.asarray(trainer.network.task.measure(output, queries, "margin").double())


def test_subsets_of_varied_sizes_are_uniform_and_follow_their_law() -> None:
    n, protocol = 12, Protocol(subsets=4002, sizes="varied")
    masks = masks_of(protocol, n)
    assert (masks[0].sum(), masks[1].sum()) == (0, n)
    assert np.bincount(masks[2:].sum(1), minlength=n + 1) / 4000 == pytest.approx(size_law(n), abs=1e-3)
    assert masks.mean(0) == pytest.approx(np.full(n, 0.5), abs=0.05)
    few = [
        subset_size(Protocol(subsets=22, sizes="varied", seed=seed), 1000, number)
        for seed in (0, 1)
        for number in range(2, 22)
    ]
    for sizes in (few[:20], few[20:]):
        law = np.cumsum(size_law(1000))[np.sort(sizes)]
        assert np.abs(law - (np.arange(20) + 0.5) / 20).max() < 0.1, "even among few"
    assert few[:20] != few[20:]


def test_banks_of_one_size_keep_their_keys() -> None:
    assert "sizes" not in Protocol(subsets=3).model_dump()
    assert Protocol.model_validate(Protocol(subsets=3, sizes="varied").model_dump(mode="json")).sizes == "varied"
    with pytest.raises(ValueError, match="alpha"):
        Protocol(subsets=3, sizes="varied", alpha=0.4)


def test_banks_that_cannot_tell_the_values_are_refused() -> None:
    n = 40
    half, varied = masks_of(Protocol(subsets=60), n), masks_of(Protocol(subsets=60, sizes="varied"), n)
    ends = np.stack([np.zeros(n, bool), np.ones(n, bool)])

    def bank(masks: np.ndarray) -> Retrainings:
        return Retrainings(masks, np.zeros((len(masks), 1, 1)))

    assert not data_shapley(bank(varied)).any()
    for masks in (half, np.concatenate([ends, half])):
        with pytest.raises(InvalidInputError, match="varied sizes"):
            data_shapley(bank(masks))
    with pytest.raises(InvalidInputError, match="on no example"):
        data_shapley(bank(varied[1:]))
    with pytest.raises(InvalidInputError, match="name more"):
        data_shapley(bank(varied[:11]))
    data_shapley(bank(varied[:12]))
    with pytest.raises(InvalidInputError, match="name more"):
        beta_shapley(bank(varied), 500, 1)
    diverged = np.zeros((60, 1, 1))
    diverged[0] = np.nan
    with pytest.raises(InvalidInputError, match="on no example"):
        data_shapley(Retrainings(varied, diverged))
