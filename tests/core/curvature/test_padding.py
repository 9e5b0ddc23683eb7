"""Pseudo-gradients of texts do not depend on the padding that other texts of their batch give them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attribution_core.architectures.build import build
from attribution_core.curvature import CovarianceSums
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import Fisher
from attribution_core.data.batch import Batch
from attribution_core.gradients import GradientCapture
from attribution_core.spec import ArchitectureSpec, CausalLanguageModelingTask
from attribution_core.tasks import build_task

VOCABULARY, HEADS, TEXTS = 13, 4, [4, 7, 2]
QWEN3 = {"model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32}  # fmt: skip


class PerHead(nn.Module):
    """Scales each head of each token before or after heads are put in front, and looks at a table without tokens; each token sees those before it."""

    def __init__(self, heads_first: bool = False, table: int = 0) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 4 * HEADS), nn.RMSNorm(4)
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4 * HEADS, VOCABULARY)
        self.heads_first = heads_first
        self.register_buffer("table", torch.randn(1, table, 4) if table else None)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        split = self.embed(tokens).unflatten(2, (HEADS, 4))  # (batch, tokens, heads, 4)
        if self.heads_first:
            split = split.transpose(1, 2)
        scaled = self.shared(self.norm(split).tanh())
        if self.heads_first:
            scaled = scaled.transpose(1, 2)
        if self.table is not None:
            scaled = scaled + self.shared(self.table).mean(1)[:, None, None]
        return self.head(scaled.flatten(2).cumsum(1))


def of_transformers(config: dict[str, object]) -> nn.Module:
    return build(ArchitectureSpec(name="hf_causal_lm", arguments={"config": config}))


def ours() -> nn.Module:
    arguments = {"vocab_size": VOCABULARY, "max_length": 16, "width": 8, "depth": 1, "heads": 2, "tied": True}
    return build(ArchitectureSpec(name="transformer_lm", arguments=arguments))


CASES: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "heads after tokens": PerHead,
    "heads before tokens": lambda: PerHead(heads_first=True),
    "a table as long as the longest text": lambda: PerHead(table=7),
    "a table of twice its length": lambda: PerHead(table=14),
}


def texts(lengths: list[int]) -> list[Batch]:
    drawn = [torch.randint(0, VOCABULARY, (1, length)) for length in lengths]
    return [Batch(torch.tensor([row]), text, mask=torch.ones_like(text).bool()) for row, text in enumerate(drawn)]


def agree_alone_and_together(module: nn.Module, lengths: list[int]) -> None:
    capture, task = GradientCapture(module.double().eval()), build_task(CausalLanguageModelingTask())
    alone = texts(lengths)

    def draws(batch: Batch) -> Draws:
        return Fisher("sampled", 1, 0).draws(capture.run(batch.forward, len(batch)), task, batch)

    sums, expected = CovarianceSums(capture.blocks), CovarianceSums(capture.blocks)
    together = draws(Batch.joined(alone))
    sums.add(together)
    each = [draws(batch) for batch in alone]
    for number, part in enumerate(together[0]):
        found = torch.cat([one[0][number].materialise() for one in each])
        torch.testing.assert_close(
            part.materialise(), found, rtol=1e-6, atol=1e-9, msg=lambda m, p=part: f"{p.block.name}: {m}"
        )
    for one in each:
        expected.add(one)
    for name, value in expected.arrays().items():
        torch.testing.assert_close(sums.arrays()[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [TEXTS, [HEADS, 2], [2 * HEADS, 3]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_texts_are_the_same_alone_and_padded(name: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    agree_alone_and_together(CASES[name](), lengths)


@pytest.mark.hf
@pytest.mark.filterwarnings("default")
def test_texts_are_the_same_alone_and_padded_where_norms_are_per_head() -> None:
    torch.manual_seed(0)
    agree_alone_and_together(of_transformers(QWEN3), TEXTS)
