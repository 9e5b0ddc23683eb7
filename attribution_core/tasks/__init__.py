"""What a model was trained to do, and what can be measured of it."""

from attribution_core.spec import CausalLanguageModelingTask, ClassificationTask, RegressionTask
from attribution_core.tasks.base import FisherKind, Task
from attribution_core.tasks.causal_lm import CausalLanguageModeling
from attribution_core.tasks.classification import Classification
from attribution_core.tasks.regression import Regression

__all__ = ["FisherKind", "Task", "build_task"]


def build_task(spec: ClassificationTask | RegressionTask | CausalLanguageModelingTask) -> Task:
    """Return the task a spec names."""
    match spec:
        case ClassificationTask():
            return Classification()
        case RegressionTask():
            return Regression()
        case CausalLanguageModelingTask():
            return CausalLanguageModeling(spec.reduction)
