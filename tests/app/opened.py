"""The library called directly on the files of the running service."""

from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.spec import DatasetSpec
from tests.conftest import MLP, Loaded


def directly(loaded: Loaded, name: str) -> LoadedIndex:
    """The same artifact, opened without the service."""
    service, artifacts = loaded.service, loaded.service.data.resolve() / "artifacts"
    index, dataset = service.get(f"/v1/indexes/{name}"), service.get("/v1/datasets/digits")
    every = {item["id"]: item for item in service.get("/v1/models/mlp/checkpoints")["items"]}
    spec = FitSpec(
        architecture=MLP,
        task={"type": "classification"},
        dataset=DatasetRef(
            id=dataset["id"],
            folder=artifacts / "datasets" / dataset["id"],
            spec=DatasetSpec.model_validate(dataset["spec"]),
            sha256=dataset["sha256"],
            num_examples=600,
        ),
        checkpoints=[
            CheckpointRef(id=i, path=artifacts / "checkpoints" / i / "weights.safetensors", sha256=every[i]["sha256"])
            for i in index["checkpoints"]
        ],
        method=index["method"],
        measurement=index["measurement"],
        store=index["store"],
        search=index["search"],
    )
    assert spec.fingerprint() == index["fingerprint"]
    return LoadedIndex(artifacts / "indexes" / index["id"], spec)
