"""EK-FAC of convolutions, embeddings and sequences, written out from its formula on autograd alone.

Per layer `A = E[aaᵀ]` and `G = E[ggᵀ]` over positions, `Λ = E[(Q_Gᵀ (Σ_t g_t a_tᵀ) Q_A)^∘2]` over examples (Grosse et al. 2023): inputs and output
gradients are read off by the network's own `forward`, and none of our layer rules, bases or products take part in what is expected.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.curvature.fisher import Fisher
from attribution_core.data.batch import Batch
from attribution_core.gradients import GradientCapture
from attribution_core.methods.base import Checkpoint
from attribution_core.spec import CausalLanguageModelingTask, ClassificationTask
from attribution_core.tasks import build_task
from tests.core.methods.test_brute_force import DAMPING, Dense, fitted

# Inputs `a` and outputs of each layer in forward order, (batch, positions, d).
Seen = list[tuple[Tensor, Tensor]]


def with_one(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], -1)


class Images(nn.Module):
    """A strided, padded convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.convolution(images)).flatten(1))

    def seen(self, images: Tensor) -> tuple[Tensor, Seen]:
        patches = with_one(F.unfold(images, 3, stride=2, padding=1).transpose(1, 2))  # (batch, 4, 19)
        kernel = torch.cat([self.convolution.weight.flatten(1), self.convolution.bias[:, None]], 1)
        maps = (patches @ kernel.T).requires_grad_()  # (batch, positions, channels)
        hidden = torch.tanh(maps).transpose(1, 2).flatten(1)
        output = self.head(hidden)[:, None]
        return output[:, 0], [(patches, maps), (with_one(hidden)[:, None], output)]


class Texts(nn.Module):
    """An embedding, a layer at every token, and logits per token or of their mean."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.tokens = nn.Embedding(5, 4)
        self.middle = nn.Linear(4, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.seen(tokens)[0]

    def seen(self, tokens: Tensor) -> tuple[Tensor, Seen]:
        looked = self.tokens(tokens).requires_grad_()
        bent = self.middle(looked)
        hidden = torch.tanh(bent)
        hidden = hidden.mean(1, keepdim=True) if self.pooled else hidden
        output = self.head(hidden)
        one_hot = F.one_hot(tokens, 5).to(looked.dtype)
        layers = [(one_hot, looked), (with_one(looked), bent), (with_one(hidden), output)]
        return output[:, 0] if self.pooled else output, layers


def images() -> tuple[nn.Module, Batch]:
    return Images(), Batch(torch.arange(20), torch.randn(20, 2, 4, 4).double(), torch.arange(20) % 3)


def labelled_texts() -> tuple[nn.Module, Batch]:
    return Texts(pooled=True), Batch(torch.arange(20), torch.randint(0, 5, (20, 6)), torch.arange(20) % 5)


def padded_texts() -> tuple[nn.Module, Batch]:
    mask = torch.arange(6) < torch.randint(3, 7, (20, 1))
    return Texts(pooled=False), Batch(torch.arange(20), torch.randint(0, 5, (20, 6)), mask=mask)


CASES = {"convolution": images, "labelled texts": labelled_texts, "padded texts": padded_texts}


def objectives(output: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return pseudo-losses (each label's times √p, or the data's own), losses and measurements, each (batch,)."""
    if batch.mask is not None:
        likelihood = output[:, :-1].log_softmax(-1).gather(2, batch.inputs[:, 1:, None])[..., 0]
        real = batch.mask[:, 1:]
        loss = -(likelihood * real).sum(1) / real.sum(1)
        return [loss], loss, -loss
    assert batch.targets is not None
    log_p = output.log_softmax(1)
    pseudo = [-log_p[:, label] * log_p[:, label].exp().sqrt().detach() for label in range(output.shape[1])]
    own = log_p.gather(1, batch.targets[:, None])[:, 0]
    return pseudo, -own, own - torch.log1p(-own.exp())


def expected(module: nn.Module, batch: Batch, *, positions_apart: bool = False) -> Tensor:
    """Scores of all examples for each other, (n, n); `positions_apart` squares before summing positions, which is wrong."""
    output, layers = module.seen(batch.inputs)
    pseudo, loss, measured = objectives(output, batch)
    real = torch.ones(batch.inputs.shape[:2]) if batch.mask is None else batch.mask
    total = torch.zeros(len(batch), len(batch), dtype=torch.float64)
    for a, out in layers:
        used = a * real[..., None] if batch.mask is not None else a
        draws, (own,), (asked,) = (
            [torch.autograd.grad(value.sum(), out, retain_graph=True)[0] for value in values]
            for values in (pseudo, [loss], [measured])
        )
        q_in = torch.linalg.eigh(torch.einsum("nti,ntj->ij", used, used))[1].detach()
        if bool(((a == 0) | (a == 1)).all()):  # one-hot: `A` is diagonal, and where counts are equal any basis would do
            q_in = torch.eye(a.shape[2]).double()
        q_out = torch.linalg.eigh(sum(torch.einsum("nto,ntp->op", g, g) for g in draws))[1]

        def turned(g: Tensor, used: Tensor = used, q_in: Tensor = q_in, q_out: Tensor = q_out) -> Tensor:
            per_position = torch.einsum("nto,nti->ntoi", g @ q_out, used @ q_in).detach()
            return per_position if positions_apart else per_position.sum(1, keepdim=True)

        values = sum(turned(g).square().sum((0, 1)) for g in draws) / len(batch)
        query = turned(asked).sum(1) / (values + DAMPING * values.mean())
        total -= query.flatten(1) @ turned(own).sum(1).flatten(1).T / len(batch)
    return total


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_formula(name: str) -> None:
    torch.manual_seed(0)
    module, batch = CASES[name]()
    module = module.double()
    assert torch.allclose(module(batch.inputs), module.seen(batch.inputs)[0])
    wanted = expected(module, batch)
    task = build_task(ClassificationTask() if batch.mask is None else CausalLanguageModelingTask())
    module.requires_grad_(False)
    checkpoint = Checkpoint(module, task, task.default_measurement, len(batch), GradientCapture(module))
    fisher = Fisher("exact" if batch.mask is None else "empirical", 1, 0)
    nothing = torch.empty(0)
    given = Dense(checkpoint, batch, fisher, nothing, nothing, nothing, nothing)
    found = given.scores(fitted(given, "ekfac"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    module.requires_grad_(True)
    apart = expected(module, batch, positions_apart=True)
    assert float((found - apart).abs().max() / wanted.abs().max()) > 0.05
