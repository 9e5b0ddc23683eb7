"""Sequences of different lengths: padding changes nothing, and scores are those of each text alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attribution_core.architectures.build import build
from attribution_core.checkpoints import save_checkpoint
from attribution_core.data.batch import Batch
from attribution_core.data.importer import import_dataset
from attribution_core.errors import InvalidInputError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import FitPipeline, fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from attribution_core.spec import ArchitectureSpec, DatasetSpec
from tests.core.methods.problems import SMALL, relative_error

MODEL = ArchitectureSpec(
    name="transformer_lm", arguments={"vocab_size": 257, "max_length": 48, "width": 8, "depth": 1, "heads": 2}
)
# Its queries and keys are scaled head by head.
QWEN3 = {"model_type": "qwen3", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
TEXTS = [f"{word} of the {'very ' * (number % 4)}river" for number, word in enumerate(["source", "mouth", "bank"] * 5)]
ALL = np.arange(len(TEXTS))
METHODS = {
    name: {"type": name, "projection": SMALL, "damping": 0.1}
    if name in ("trak", "ekfac")
    else {"type": name, **({} if name == "representation" else {"projection": SMALL})}
    for name in ("trak", "ekfac", "grad_dot", "grad_cos", "representation")
}


def specification(folder: Path, texts: list[str] = TEXTS, model: ArchitectureSpec = MODEL) -> FitSpec:
    (folder / "data").mkdir(parents=True)
    source = folder / "texts.jsonl"
    source.write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    dataset = DatasetSpec(name="texts", kind="text", input="text", target=None)
    summary = import_dataset(source, dataset, folder / "data", NoProgress())
    torch.manual_seed(0)
    path = folder / "model.safetensors"
    save_checkpoint(build(model), path)
    return FitSpec.model_validate(
        {
            "architecture": model,
            "task": {"type": "causal_lm"},
            "tokenizer": {"type": "bytes"},
            "dataset": DatasetRef(
                id="ds", folder=folder / "data", spec=dataset, sha256=summary.sha256, num_examples=len(texts)
            ),
            "checkpoints": [CheckpointRef(id="ckpt", path=path, sha256=sha256_file(path))],
            "method": METHODS["grad_dot"],
            "measurement": "log_likelihood",
            "shard_size": 8,
            "batch_size": 4,
        }
    )


def fitted(spec: FitSpec, into: Path, **changes: object) -> LoadedIndex:
    spec = FitSpec.model_validate({**spec.model_dump(), **changes})
    fit(spec, into / "work", into / "index", NoProgress())
    return LoadedIndex(into / "index", spec)


@pytest.mark.parametrize("method", METHODS)
def test_neither_padding_nor_batches_change_scores(tmp_path: Path, method: str) -> None:
    spec = specification(tmp_path)
    first = fitted(spec, tmp_path / "a", method=METHODS[method])
    second = fitted(spec, tmp_path / "b", method=METHODS[method], batch_size=1, shard_size=15)
    source = first.context.source
    mixed = source.batch(np.array([3, 0]))  # padded to the longer one
    scores = first.scores(first.query(mixed, None), ALL, rescore=True)
    assert np.isfinite(scores).all()
    assert relative_error(second.scores(second.query(mixed, None), ALL, rescore=True), scores) < 1e-5
    alone = first.scores(first.query(source.batch(np.array([0])), None), ALL, rescore=True)
    assert relative_error(alone[0], scores[1]) < 1e-5
    # TRAK's kernel of 15 texts multiplies rounding by its condition number.
    limit = 1e-4 if method == "trak" else 1e-5
    assert relative_error(second.self_influence(), first.self_influence()) < limit


@pytest.mark.hf
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layers", [None, ["*q_norm", "*k_norm"]], ids=["all", "norms"])
@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "gauss_newton"])
def test_no_batch_changes_scores_where_norms_are_per_head(tmp_path: Path, kind: str, layers: list[str] | None) -> None:
    spec = specification(tmp_path, model=ArchitectureSpec(name="hf_causal_lm", arguments={"config": QWEN3}))
    found = []
    for size in (1, 8):
        method = {"type": kind, "projection": SMALL, "damping": 0.1}
        index = fitted(spec, tmp_path / str(size), method=method, layers=layers, batch_size=size)
        query = index.query(index.context.source.batch(ALL[:3]), None)
        found.append(index.scores(query, ALL, rescore=True))
    assert relative_error(*found) < 1e-4


def test_grad_dot_is_autograd_on_the_text_alone(tmp_path: Path) -> None:
    index = fitted(specification(tmp_path), tmp_path / "a")
    module = index.context.checkpoint(0).module.double().requires_grad_(True)

    def gradient(text: str) -> torch.Tensor:
        tokens = torch.tensor([list(text.encode())])
        log_p = module(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(log_p, list(module.parameters()))])

    rows = torch.stack([gradient(text) for text in TEXTS])
    expected = rows[[3, 0]] @ rows.T / len(TEXTS)
    module.float().requires_grad_(False)
    query = index.query(index.context.source.batch(np.array([3, 0])), None)
    assert relative_error(index.scores(query, ALL, rescore=True), expected) < 1e-5
    groups = [ALL[::2], ALL[:3]]
    sums = np.stack([expected[:, rows].sum(1) for rows in groups], axis=1)
    assert relative_error(index.group_effects(query, groups, rescore=True), sums) < 1e-5


@pytest.mark.parametrize("stage", ["covariance", "features"])
@pytest.mark.parametrize("text", ["x", "y" * 60], ids=["one token", "too long"])
def test_texts_the_model_cannot_take_are_refused(tmp_path: Path, stage: str, text: str) -> None:
    spec = specification(tmp_path, [*TEXTS, text])
    method = METHODS["ekfac" if stage == "covariance" else "grad_dot"]
    pipeline = FitPipeline(FitSpec.model_validate({**spec.model_dump(), "method": method}), tmp_path / "work")
    with pytest.raises(InvalidInputError):
        pipeline.run_shard(stage, 1, NoProgress())


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    index = fitted(specification(tmp_path), tmp_path / "a")
    tokens = torch.tensor([[5, 900, 7]])
    with pytest.raises(InvalidInputError, match="cannot be run"):
        index.query(Batch(torch.tensor([-1]), tokens, None, torch.ones(1, 3, dtype=torch.bool)), None)
