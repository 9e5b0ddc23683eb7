"""Headwater's main job from end to end: real digits in, a model trained, its behaviour explained, and the explanations measured.

Starts the service if none is running, then speaks to it over HTTP only: it trains the model from its recipe, answers three questions, measures
the index against retraining on random halves of the data, and retrains without the very examples that an answer was about. Run it again and it
reuses what is there.
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

MODEL: Json = {
    "name": "digit-cnn",
    "architecture": {
        "name": "cnn",
        "arguments": {"input_shape": [1, 28, 28], "channels": [8, 16], "num_classes": 10},
    },
    "task": {"type": "classification"},
    "recipe": {
        "optimizer": {"type": "sgd", "momentum": 0.9, "nesterov": True},
        "learning_rate": 0.1,
        "schedule": {"type": "one_cycle"},
        "weight_decay": 0.01,
        "epochs": 6,
        "batch_size": 64,
    },
}
SEEDS = [0, 1, 2]
REMOVED = 50
VENDOR = {"where": {"field": "source", "op": "eq", "value": "vendor-4"}}
FIRST_HALF = {"where": {"field": "row", "op": "lt", "value": 2000}}
BANK = {"alpha": 0.5, "subsets": 20, "seeds": 1}
QUERIES_AT_ONCE = 32
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
    train(client)
    fit_indexes(client)
    outputs = test_outputs(client, len(test.labels))
    measure(client)
    row = misread(outputs, test.labels)
    explain(client, row)
    verify_digit(client, row)
    verify_vendor(client, hardest(outputs, test.labels == 4, 8))
    console.print(f"\nDone in {time.monotonic() - began:.0f} s. The service keeps running:")
    for page in ("/docs", "/redoc", "/v1/indexes/demo-ekfac/quality", "/v1/datasets/mnist-train/examples", "/metrics"):
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


def train(client: Client) -> None:
    """Register the model with its recipe, and let the service train it once per seed."""
    client.ensure("/v1/models", MODEL["name"], lambda: client.post("/v1/models", MODEL), "register the model")
    path = f"/v1/models/{MODEL['name']}/trainings"
    if not client.get(path)["items"]:
        client.finish(client.post(path, {"dataset": "mnist-train", "seeds": SEEDS}), f"train {MODEL['name']}")


def fit_indexes(client: Client) -> None:
    """Fit TRAK and EK-FAC over all checkpoints."""
    common = {"model": MODEL["name"], "dataset": "mnist-train", "measurement": "margin"}
    for name, method in {"demo-trak": {"type": "trak"}, "demo-ekfac": {"type": "ekfac"}}.items():
        body = {"name": name, **common, "method": method}
        index = client.ensure("/v1/indexes", name, lambda body=body: client.post("/v1/indexes", body), f"fit {name}")
        console.print(
            f"[bold]Index[/] {name}: {index['bytes'] / 1e6:.1f} MB, recall {index['recall']}, fingerprint "
            f"{index['fingerprint'][:12]}"
        )


def test_outputs(client: Client, count: int) -> list[Json]:
    """Return what the model says of every test digit."""
    outputs: list[Json] = []
    for start in range(0, count, QUERIES_AT_ONCE):
        rows = list(range(start, min(start + QUERIES_AT_ONCE, count)))
        body = {"queries": [{"dataset": "mnist-test", "rows": rows}], "top_k": 1}
        outputs += [result["output"] for result in client.post("/v1/indexes/demo-trak/attributions", body)["results"]]
    right = np.mean([output["value"] > 0 for output in outputs])
    console.print(f"[bold]Model[/] {MODEL['name']}: {len(SEEDS)} checkpoints, {right:.1%} of the test margins above 0")
    return outputs


def hardest(outputs: list[Json], among: np.ndarray, count: int) -> list[int]:
    """Return the test rows with the smallest margins."""
    margins = np.where(among, [output["value"] for output in outputs], np.inf)
    return np.argsort(margins, kind="stable")[:count].tolist()


def misread(outputs: list[Json], labels: np.ndarray) -> int:
    """Return the test row nearest to being right among those that the model reads as another digit."""
    wrong = np.array([output["prediction"] for output in outputs]) != labels
    return int(np.argmax(np.where(wrong, [output["value"] for output in outputs], -np.inf)))


def explain(client: Client, row: int) -> None:
    """Show which training examples are behind a digit that the model misreads."""
    for name in ("demo-ekfac", "demo-trak"):
        body = {"queries": [{"dataset": "mnist-test", "rows": [row]}], "top_k": 5, "include": ["metadata"]}
        (result,) = client.post(f"/v1/indexes/{name}/attributions", body)["results"]
        if name == "demo-ekfac":
            output = result["output"]
            console.print(
                f"\n[bold]Test digit {row}[/] is a {result['query']['target']}, read as {output['prediction']} "
                f"(margin {output['value']:+.2f})"
            )
        show_examples(name, result)


def show_examples(name: str, result: Json) -> None:
    """Print the most positive and the most negative training examples."""
    table = Table("", "row", "id", "label", "source", "score", title=f"{name}: training examples behind the margin")
    for sign in ("positive", "negative"):
        for example in result[sign]:
            table.add_row(
                sign,
                str(example["row"]),
                example["id"],
                str(example["target"]),
                example["metadata"]["source"],
                f"{example['score']:+.4f}",
            )
    console.print(table)


def measure(client: Client) -> None:
    """Measure both indexes against one bank of retrainings on random halves, and print what they are worth."""
    console.print()
    for name in ("demo-ekfac", "demo-trak"):
        path = f"/v1/indexes/{name}/evaluations"
        if not client.get(path)["items"]:
            body = {"queries": {"dataset": "mnist-test", "count": 100}, "protocol": BANK, "tune": True}
            client.finish(client.post(path, body), f"measure {name}")
        quality = client.get(f"/v1/indexes/{name}/quality")["quality"]
        low, high = quality["interval"]
        console.print(
            f"[bold]Quality[/] {name}: LDS {quality['lds']:.2f} [{low:.2f}, {high:.2f}] on {quality['retrainings']} retrainings "
            f"on random halves, permuted {quality['control']['lds']:+.2f}, damping {quality['tuned']['damping']:g} "
            "chosen on as many others"
        )


def verify_digit(client: Client, row: int) -> None:
    """Predict a digit's margin after training on other data, then have the model retrained on it."""
    body = {
        "queries": [{"dataset": "mnist-test", "rows": [row]}],
        "subsets": [{"keep": FIRST_HALF}, {"remove": {"top_positive": REMOVED}}],
        "seeds": SEEDS,
    }
    (result,) = verified(client, body)["results"]
    table = Table("trained", "left out", "predicted change", "90 % interval", "realised change")
    labels = ("on the first half", f"without its {REMOVED} most positive")
    for label, prediction in zip(labels, result["predictions"], strict=True):
        table.add_row(label, *shown_prediction(prediction))
    console.print(
        f"\n[bold]demo-ekfac[/]: margin of test digit {row}, predicted and retrained for real with three seeds"
    )
    console.print(table)


def verify_vendor(client: Client, fours: list[int]) -> None:
    """Predict the test 4s as if one vendor's data had never been used, then have the model retrained without it."""
    queries = [{"dataset": "mnist-test", "rows": fours}]
    results = verified(client, {"queries": queries, "subsets": [{"remove": VENDOR}], "seeds": SEEDS})["results"]
    trak = client.post("/v1/indexes/demo-trak/unlearning", {"queries": queries, "forget": VENDOR})
    console.print(f"\n[bold]Forgetting vendor-4[/] ({trak['forget_size']} examples), eight test 4s")
    table = Table("test row", "margin", "demo-ekfac change", "demo-trak change", "realised change")
    rows = [
        (result["predictions"][0]["predicted_change"], other["change"], result["predictions"][0]["realised_change"])
        for result, other in zip(results, trak["results"], strict=True)
    ]
    for four, result, changes in zip(fours, results, rows, strict=True):
        table.add_row(str(four), f"{result['output']['value']:+.2f}", *(f"{change:+.2f}" for change in changes))
    table.add_row("mean", "", *(f"{mean:+.2f}" for mean in np.mean(rows, axis=0)), style="bold")
    console.print(table)


def verified(client: Client, body: Json) -> Json:
    """Return a finished verification of the same question, asked now if it was not before."""
    path = "/v1/indexes/demo-ekfac/verifications"
    wanted = body["queries"][0]["rows"]
    for found in client.get(path)["items"]:
        if found["status"] == "succeeded" and found["request"]["queries"][0]["rows"] == wanted:
            return found
    client.finish(client.post(path, body), "verify demo-ekfac by retraining")
    return client.get(path)["items"][0]


def shown_prediction(prediction: Json) -> tuple[str, str, str, str]:
    """Return a verified prediction's cells."""
    interval = "not covered by the bank"
    if prediction["interval"] is not None:
        interval = "[{:+.2f}, {:+.2f}]".format(*prediction["interval"])
    realised = f"{prediction['realised_change']:+.2f} ± {prediction['seed_noise']:.2f}"
    return str(prediction["removed"]), f"{prediction['predicted_change']:+.2f}", interval, realised


if __name__ == "__main__":
    main()
