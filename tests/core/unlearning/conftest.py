from pathlib import Path

import pytest

from tests.core.unlearning.problems import Problem, logistic, trained


@pytest.fixture(scope="session")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return logistic(tmp_path_factory.mktemp("logistic"))


@pytest.fixture(scope="session")
def perceptrons(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return trained(tmp_path_factory.mktemp("perceptrons"), 3)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"
