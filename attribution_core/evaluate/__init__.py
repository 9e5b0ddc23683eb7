"""Judging attribution by real retraining: statistics of scores against what retrained models gave; numpy only."""

from attribution_core.evaluate.calibration import AffineCalibration, IsotonicCalibration, Trust, trusted
from attribution_core.evaluate.conformal import Intervals, fit_intervals
from attribution_core.evaluate.lds import LdsResult, linear_datamodeling_score
from attribution_core.evaluate.loo import LooResult, leave_one_out
from attribution_core.evaluate.mislabel import MislabelResult, mislabel_auc
from attribution_core.evaluate.mixture import MixtureResult, mixture_check
from attribution_core.evaluate.removal import RemovalCurve, RemovalResult, removal_masks, removal_result
from attribution_core.evaluate.retrainings import Retrainings

__all__ = [
    "AffineCalibration",
    "Intervals",
    "IsotonicCalibration",
    "LdsResult",
    "LooResult",
    "MislabelResult",
    "MixtureResult",
    "RemovalCurve",
    "RemovalResult",
    "Retrainings",
    "Trust",
    "fit_intervals",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_auc",
    "mixture_check",
    "removal_masks",
    "removal_result",
    "trusted",
]
