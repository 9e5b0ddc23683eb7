"""A running service with real digits and a trained MLP in it: one for all tests of the api, one of its own for fault tests."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tests.service import ROOT, Service

sys.path.insert(0, str(ROOT / "examples"))
from mnist import load_digits

MLP = {"name": "mlp", "arguments": {"input_dim": 784, "hidden": [16], "output_dim": 10}}
KEYS = ("hidden_0.weight", "hidden_0.bias", "output.weight", "output.bias")
TRAIN, TEST = 600, 50


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary files in a folder of this run's own: embedded Postgres runs as another user when we are root, and
    another run of pytest would close the shared parent folder to it."""
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="headwater-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (Path(__file__).parent / "e2e") in item.path.parents:
            item.add_marker(pytest.mark.e2e)


def save_digits(path: Path, start: int, stop: int) -> Path:
    digits, _ = load_digits()
    part = slice(start, stop)
    np.savez(path, image=digits.images[part], label=digits.labels[part], source=digits.sources[part])
    return path


def train_mlp(path: Path, seed: int) -> Path:
    """A plain torch MLP on the first 600 digits, saved under the service's parameter names."""
    digits, _ = load_digits()
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    inputs = torch.tensor(digits.images[:TRAIN]).float() / 255
    labels = torch.tensor(digits.labels[:TRAIN])
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    save_file(dict(zip(KEYS, network.state_dict().values(), strict=True)), path)
    return path


def model(name: str) -> dict:
    return {"name": name, "architecture": MLP, "task": {"type": "classification"}}


@dataclass
class Loaded:
    """A service that holds `digits` (600), `test` (50), the model `mlp` and two checkpoints of it."""

    service: Service
    checkpoints: list[str]

    def fit(self, name: str, method: dict, **more: object) -> dict:
        body = {
            "name": name,
            "model": "mlp",
            "dataset": "digits",
            "checkpoints": self.checkpoints[:1],
            "method": method,
            "measurement": "margin",
            **more,
        }
        return self.service.post("/v1/indexes", body, 202)


def load(service: Service, folder: Path) -> Loaded:
    spec = {"kind": "image", "input": "image", "target": "label", "metadata": ["source"]}
    for name, (start, stop) in {"digits": (0, TRAIN), "test": (TRAIN, TRAIN + TEST)}.items():
        file = save_digits(folder / f"{name}.npz", start, stop)
        job = service.upload("/v1/datasets", file, 202, spec={"name": name, **spec})
        assert service.finished(job)["state"] == "succeeded"
    service.post("/v1/models", {"name": "mlp", "architecture": MLP, "task": {"type": "classification"}}, 201)
    checkpoints = []
    for seed in (0, 1):
        file = train_mlp(folder / f"{seed}.safetensors", seed)
        meta = {"run": f"seed-{seed}", "step": 100, "final": True}
        checkpoints.append(service.upload("/v1/models/mlp/checkpoints", file, 201, meta=meta)["id"])
    return Loaded(service, checkpoints)


def running(folder: Path, **environment: str) -> Iterator[Loaded]:
    service = Service(folder / "data", HEADWATER_WORKER__SHARD_SIZE="32", **environment).start()
    try:
        yield load(service, folder)
    finally:
        assert service.stop() == 0


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The shared service; tests leave it as they find it, but for names of their own."""
    roots = tmp_path_factory.mktemp("roots")
    (roots / "numbers.csv").write_text("a,b,label\n1,2,0\n3,4,1\n")
    (roots / "outside").symlink_to("/etc")
    (roots / "circle").symlink_to("circle")
    yield from running(tmp_path_factory.mktemp("service"), HEADWATER_ROOTS=f'{{"files": "{roots}"}}')


@pytest.fixture(scope="session")
def steady(loaded: Loaded) -> Loaded:
    """The shared service with an index `steady` (ekfac), and `trak` over both checkpoints."""
    jobs = [
        loaded.fit("steady", {"type": "ekfac", "projection": {"dim": 256}}),
        loaded.fit("trak", {"type": "trak", "projection": {"dim": 128}}, checkpoints="all"),
    ]
    for job in jobs:
        assert loaded.service.finished(job)["state"] == "succeeded"
    return loaded


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A service of the module's own, to be broken."""
    yield from running(tmp_path_factory.mktemp("fragile"))
