"""Train the demo's small CNN with plain torch; this is the user's own training code, not the service's.

The module's parameter names are those of the architecture `cnn`, so its weights fit the model registered there.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from mnist import Digits, load_digits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = {
    "name": "cnn",
    "arguments": {"input_shape": [1, 28, 28], "channels": [8, 16], "num_classes": 10},
}
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 8, 64, 0.1, 1e-2


def build(seed: int) -> nn.Sequential:
    """Return the freshly initialised network."""
    torch.manual_seed(seed)
    network = nn.Sequential()
    network.add_module("conv_0", nn.Conv2d(1, 8, 3, padding="same"))
    network.add_module("activation_0", nn.ReLU())
    network.add_module("pool_0", nn.MaxPool2d(2))
    network.add_module("conv_1", nn.Conv2d(8, 16, 3, padding="same"))
    network.add_module("activation_1", nn.ReLU())
    network.add_module("pool_1", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    network.add_module("output", nn.Linear(16 * 7 * 7, 10))
    return network


def inputs(digits: Digits) -> Tensor:
    """Return the images as the service feeds them, (n, 1, 28, 28) in [0, 1]."""
    return torch.tensor(digits.images).float().unsqueeze(1) / 255


def train(digits: Digits, rows: np.ndarray, seed: int) -> nn.Module:
    """Train on the given rows; the seed fixes initialisation and order."""
    images, labels = inputs(digits)[rows], torch.tensor(digits.labels)[rows]
    network = build(seed)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(rows), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def margins(network: nn.Module, digits: Digits) -> np.ndarray:
    """Return `log p_y / (1 - p_y)` of every digit's own label, (n,)."""
    log_probabilities = network(inputs(digits)).double().log_softmax(1)
    labels = torch.tensor(digits.labels).unsqueeze(1)
    own = log_probabilities.gather(1, labels)
    others = log_probabilities.scatter(1, labels, -torch.inf).logsumexp(1, keepdim=True)
    return (own - others).squeeze(1).numpy()


def train_and_measure(rows: np.ndarray, seed: int, save: Path | None = None) -> np.ndarray:
    """Train on `rows`, keep the weights where asked, and return the test digits' margins (n,)."""
    torch.set_num_threads(1)
    training, test = load_digits()
    network = train(training, rows, seed)
    if save is not None:
        save_file(network.state_dict(), save)
    return margins(network, test)


def retrain(jobs: Sequence[tuple[np.ndarray, int, Path | None]], processes: int = 2) -> list[np.ndarray]:
    """Run `train_and_measure` for every (rows, seed, where to save), several at once."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(_unpack), jobs))


def _unpack(job: tuple[np.ndarray, int, Path | None]) -> np.ndarray:
    return train_and_measure(*job)
