"""Weights through a file and back, strictly."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attribution_core.architectures.build import build, skeleton
from attribution_core.checkpoints import load_model, save_checkpoint
from attribution_core.errors import CheckpointError
from attribution_core.spec import ArchitectureSpec
from attribution_core.weights import check_weights
from tests.core.disk import small_files

SMALL = [
    ArchitectureSpec(name="linear", arguments={"input_dim": 3}),
    ArchitectureSpec(name="mlp", arguments={"input_dim": 3, "hidden": [4], "output_dim": 2}),
    ArchitectureSpec(
        name="cnn", arguments={"input_shape": [1, 4, 4], "channels": [2, 4], "num_classes": 2, "groups": 2}
    ),
    ArchitectureSpec(name="resnet9", arguments={"num_classes": 2, "width": 4, "norm": "batch"}),
    ArchitectureSpec(
        name="transformer_lm",
        arguments={"vocab_size": 7, "max_length": 8, "width": 4, "depth": 1, "heads": 2, "tied": True},
    ),
]
TIED = SMALL[-1]


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_a_saved_model_passes_its_check_and_comes_back(spec: ArchitectureSpec, tmp_path: Path) -> None:
    module = build(spec)
    save_checkpoint(module, tmp_path / "weights")
    summary = check_weights(tmp_path / "weights", skeleton(spec))
    floats = {id(value): value for value in module.state_dict(keep_vars=True).values() if value.is_floating_point()}
    assert summary.num_parameters == sum(value.numel() for value in floats.values())
    loaded = load_model(spec, tmp_path / "weights")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_weights_are_loaded_in_the_asked_dtype(tmp_path: Path) -> None:
    spec = SMALL[0]
    save_checkpoint(build(spec).half(), tmp_path / "weights")
    loaded = load_model(spec, tmp_path / "weights", dtype=torch.float64)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}


@pytest.mark.parametrize("kept", ["tokens.weight", "output.weight"])
def test_a_tied_weight_under_one_name_sets_both(kept: str, tmp_path: Path) -> None:
    module = build(TIED)
    save_checkpoint(module, tmp_path / "all")
    weights = load_file(tmp_path / "all")
    dropped = ({"tokens.weight", "output.weight"} - {kept}).pop()
    del weights[dropped]
    save_file(weights, tmp_path / "one")
    check_weights(tmp_path / "one", skeleton(TIED))
    loaded = load_model(TIED, tmp_path / "one")
    assert loaded.state_dict()[dropped].data_ptr() == loaded.state_dict()[kept].data_ptr()
    assert torch.equal(loaded.state_dict()[dropped], weights[kept])


@pytest.mark.parametrize(
    "weights",
    [
        {"output.weight": torch.zeros(1, 3)},
        {"output.weight": torch.zeros(1, 3), "output.bias": torch.zeros(1), "more": torch.zeros(1)},
        {"output.weight": torch.zeros(3, 1), "output.bias": torch.zeros(1)},
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "weights")
    with pytest.raises(CheckpointError):
        load_model(SMALL[0], tmp_path / "weights")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 40, b"\x80\x05" + b"\0" * 40])
def test_files_that_are_not_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_model(SMALL[0], tmp_path / "weights")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_model(SMALL[0], tmp_path / "nothing")


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    """Workers know it by its number."""
    with small_files(), pytest.raises(OSError, match="too large") as caught:
        save_checkpoint(build(SMALL[1]), tmp_path / "weights")
    assert caught.value.errno == errno.EFBIG
