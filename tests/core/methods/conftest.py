import pytest

from tests.core.methods import problems


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> problems.Problem:
    return problems.classification(tmp_path_factory.mktemp("classification"))


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> problems.Problem:
    return problems.classification(tmp_path_factory.mktemp("ensemble"), checkpoints=3)


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> problems.Problem:
    return problems.regression(tmp_path_factory.mktemp("regression"))
