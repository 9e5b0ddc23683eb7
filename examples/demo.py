"""Headwater's main job from end to end: real digits in, three questions answered, a real retraining beside each.

Starts the service if none is running, then speaks to it over HTTP only. Run it again and it reuses what is there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
from client import Client, Json
from mnist import Digits, load_digits
from rich.console import Console
from rich.table import Table
from train import ARCHITECTURE, retrain

SEEDS = (0, 1, 2)
REMOVED = 50
VENDOR = "vendor-4"
console = Console(width=118)


def main() -> None:
    """Run the demo against `--url`, starting the service there if it does not answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    began = time.monotonic()
    ensure_service(url)
    client = Client(url)
    training, test = load_digits()
    with tempfile.TemporaryDirectory() as folder:
        import_digits(client, training, test, Path(folder))
        margins = register_checkpoints(client, Path(folder))
    fit_indexes(client)
    explain_and_verify(client, training, test, margins)
    unlearn(client, training, test, margins)
    console.print(f"\nDone in {time.monotonic() - began:.0f} s. The service keeps running:")
    for page in ("/docs", "/redoc", "/v1/indexes/demo-ekfac", "/v1/datasets/mnist-train/examples", "/metrics"):
        console.print(f"  {url}{page}")


def ensure_service(url: str) -> None:
    """Start `headwater serve` in the background unless something healthy answers at `url`."""
    if answers(url):
        console.print(f"[bold]Service[/] already running at {url}")
        return
    data = Path(os.environ.get("HEADWATER_DATA_DIR", "data"))
    data.mkdir(parents=True, exist_ok=True)
    address = httpx.URL(url)
    command = [sys.executable, "-m", "app.cli", "serve", "--host", address.host, "--port", str(address.port)]
    with (data / "service.log").open("ab") as log:
        service = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    began = time.monotonic()
    while not answers(url):
        if service.poll() is not None or time.monotonic() - began > 120:
            raise SystemExit(f"The service did not start; see {data / 'service.log'}")
        time.sleep(0.1)
    console.print(
        f"[bold]Service[/] ready at {url} after {time.monotonic() - began:.1f} s (stop it: kill {service.pid})"
    )


def answers(url: str) -> bool:
    """Return whether the service at `url` is ready."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def import_digits(client: Client, training: Digits, test: Digits, folder: Path) -> None:
    """Upload both sets as npz files of uint8 images, so that every example has a picture."""
    for name, digits in (("mnist-train", training), ("mnist-test", test)):
        spec = {
            "name": name,
            "kind": "image",
            "input": "image",
            "target": "label",
            "id": "digit",
            "metadata": ["source"],
        }
        file = digits.save(folder / f"{name}.npz")
        client.ensure(
            "/v1/datasets",
            name,
            lambda file=file, spec=spec: client.upload("/v1/datasets", file, spec=spec),
            f"import {name}",
        )


def register_checkpoints(client: Client, folder: Path) -> np.ndarray:
    """Train one CNN per seed, upload what is not there yet, and return the test margins (seeds, n)."""
    client.ensure(
        "/v1/models",
        "digit-cnn",
        lambda: client.post(
            "/v1/models", {"name": "digit-cnn", "architecture": ARCHITECTURE, "task": {"type": "classification"}}
        ),
        "register the model",
    )
    registered = {item["run"] for item in client.get("/v1/models/digit-cnn/checkpoints")["items"]}
    with console.status(f"training {len(SEEDS)} CNNs with plain torch"):
        everything = np.arange(len(load_digits()[0].labels))
        margins = retrain([(everything, seed, folder / f"seed-{seed}.safetensors") for seed in SEEDS])
    for seed in SEEDS:
        if f"seed-{seed}" not in registered:
            meta = {"run": f"seed-{seed}", "step": 0, "seed": seed, "final": True}
            client.upload("/v1/models/digit-cnn/checkpoints", folder / f"seed-{seed}.safetensors", meta=meta)
    accuracy = (np.stack(margins) > 0).mean()
    console.print(f"[bold]Model[/] digit-cnn: {len(SEEDS)} checkpoints, {accuracy:.1%} of the test margins above 0")
    return np.stack(margins)


def fit_indexes(client: Client) -> None:
    """Fit TRAK over all checkpoints and EK-FAC over the first."""
    checkpoints = client.get("/v1/models/digit-cnn/checkpoints")["items"]
    first = next(item["id"] for item in checkpoints if item["run"] == "seed-0")
    common = {"model": "digit-cnn", "dataset": "mnist-train", "measurement": "margin"}
    wanted = {
        "demo-trak": {**common, "checkpoints": "all", "method": {"type": "trak"}},
        "demo-ekfac": {**common, "checkpoints": [first], "method": {"type": "ekfac", "damping": 1.0}},
    }
    for name, body in wanted.items():
        index = client.ensure(
            "/v1/indexes",
            name,
            lambda name=name, body=body: client.post("/v1/indexes", {"name": name, **body}),
            f"fit {name}",
        )
        console.print(
            f"[bold]Index[/] {name}: {index['bytes'] / 1e6:.1f} MB, recall {index['recall']}, fingerprint "
            f"{index['fingerprint'][:12]}"
        )


def explain_and_verify(client: Client, training: Digits, test: Digits, margins: np.ndarray) -> None:
    """Explain a misclassified digit, predict it without its strongest support, and retrain to see."""
    row = misread_digit(client, margins)
    query = {"queries": [{"dataset": "mnist-test", "rows": [row]}]}
    predicted: dict[str, Json] = {}
    supporters: dict[str, np.ndarray] = {}
    for name in ("demo-ekfac", "demo-trak"):
        answer = client.post(f"/v1/indexes/{name}/attributions", {**query, "top_k": REMOVED, "include": ["metadata"]})
        result = answer["results"][0]
        if name == "demo-ekfac":
            output = result["output"]
            console.print(
                f"\n[bold]Test digit {row}[/] is a {result['query']['target']}, read as {output['prediction']} "
                f"(margin {output['value']:+.2f})"
            )
        show_examples(name, result)
        supporters[name] = np.array([example["row"] for example in result["positive"]])
        subset = {"remove": {"top_positive": REMOVED}}
        answer = client.post(f"/v1/indexes/{name}/counterfactuals", {**query, "subsets": [subset]})
        predicted[name] = answer["results"][0]["predictions"][0]
    table = Table(
        "index", "output now", "predicted without", "predicted change", "retrained without", "realised change"
    )
    everything = np.arange(len(training.labels))
    for name, rows in supporters.items():
        with console.status(f"retraining {len(SEEDS)} CNNs without the {REMOVED} most positive examples of {name}"):
            kept = np.setdiff1d(everything, rows)
            without = np.stack(retrain([(kept, seed, None) for seed in SEEDS]))[:, row]
        realised = without - margins[:, row]
        table.add_row(
            name,
            f"{predicted[name]['predicted'] - predicted[name]['change']:+.2f}",
            f"{predicted[name]['predicted']:+.2f}",
            f"{predicted[name]['change']:+.2f}",
            f"{without.mean():+.2f}",
            f"{realised.mean():+.2f} ± {realised.std(ddof=1) / len(SEEDS) ** 0.5:.2f}",
        )
    console.print(f"\n[bold]Margin of test digit {row} without its {REMOVED} most positive training examples[/]")
    console.print(table)


def misread_digit(client: Client, margins: np.ndarray) -> int:
    """Return the test row nearest to being right among those that both indexes' models read as another digit."""
    nearest = np.argsort(-np.where(margins.mean(axis=0) < 0, margins.mean(axis=0), -np.inf))[:30].tolist()
    misread = set(nearest)
    for name in ("demo-ekfac", "demo-trak"):
        body = {"queries": [{"dataset": "mnist-test", "rows": nearest}], "top_k": 1}
        results = client.post(f"/v1/indexes/{name}/attributions", body)["results"]
        misread &= {r["query"]["row"] for r in results if r["output"]["prediction"] != r["query"]["target"]}
    return next(row for row in nearest if row in misread)


def show_examples(name: str, result: Json) -> None:
    """Print the five most positive and the five most negative training examples."""
    table = Table("", "row", "id", "label", "source", "score", title=f"{name}: training examples behind the margin")
    for sign in ("positive", "negative"):
        for example in result[sign][:5]:
            table.add_row(
                sign,
                str(example["row"]),
                example["id"],
                str(example["target"]),
                example["metadata"]["source"],
                f"{example['score']:+.4f}",
            )
    console.print(table)


def unlearn(client: Client, training: Digits, test: Digits, margins: np.ndarray) -> None:
    """Predict the test 4s as if one vendor's data had never been used, and retrain to see."""
    fours = np.flatnonzero(test.labels == 4)
    rows = fours[np.argsort(margins[:, fours].mean(axis=0))[:8]]
    body = {
        "forget": {"where": {"field": "source", "op": "eq", "value": VENDOR}},
        "queries": [{"dataset": "mnist-test", "rows": rows.tolist()}],
    }
    answers = {name: client.post(f"/v1/indexes/{name}/unlearning", body) for name in ("demo-ekfac", "demo-trak")}
    with console.status(f"retraining {len(SEEDS)} CNNs without {VENDOR}"):
        kept = np.flatnonzero(training.sources != VENDOR)
        without = np.stack(retrain([(kept, seed, None) for seed in SEEDS]))[:, rows]
    realised = (without - margins[:, rows]).mean(axis=0)
    forgotten = answers["demo-ekfac"]["forget_size"]
    console.print(f"\n[bold]Forgetting {VENDOR}[/] ({forgotten} of {len(training.labels)} examples), eight test 4s")
    table = Table("test row", "margin", *(f"{name} change" for name in answers), "realised change")
    for position, row in enumerate(rows):
        changes = [f"{answer['results'][position]['change']:+.2f}" for answer in answers.values()]
        table.add_row(str(row), f"{margins[:, row].mean():+.2f}", *changes, f"{realised[position]:+.2f}")
    means = [np.mean([result["change"] for result in answer["results"]]) for answer in answers.values()]
    table.add_row("mean", "", *(f"{mean:+.2f}" for mean in means), f"{realised.mean():+.2f}", style="bold")
    console.print(table)


if __name__ == "__main__":
    main()
