"""An evaluation's own part beside retraining: the scores it measures."""

from pathlib import Path

import numpy as np
import pytest

from attribution_core.errors import Cancelled
from attribution_core.evaluate.pipeline import EvaluationPipeline
from tests.core.methods.problems import classification


class Interrupting:
    """Progress that counts its reports, and stops the work at one of them; never by default."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.reports = at, 0

    def advance(self, done: int) -> None:
        assert done == 0, "scores are no steps of retraining"
        self.reports += 1
        if self.reports == self.at:
            raise Cancelled("asked to stop")


def test_scores_can_be_given_up_between_batches(tmp_path: Path) -> None:
    """A tuned evaluation scores the whole training set once for each damping, which may take hours."""
    problem = classification(tmp_path)
    index = problem.fit("index", method={"type": "grad_dot"}, batch_size=20)
    pipeline = EvaluationPipeline.__new__(EvaluationPipeline)
    pipeline.rows, pipeline.batch = np.arange(60), problem.queries()
    pipeline._progress = counting = Interrupting()
    expected = pipeline._scores_of(index, None)
    assert counting.reports >= 60 // 20
    for at in range(1, counting.reports + 1):
        pipeline._progress = Interrupting(at)
        with pytest.raises(Cancelled):
            pipeline._scores_of(index, None)
    pipeline._progress = Interrupting()
    assert np.array_equal(pipeline._scores_of(index, None), expected)
