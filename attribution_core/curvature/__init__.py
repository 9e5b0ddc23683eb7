"""Curvature of the training loss: fitted over the training set, solved on the query side."""

from attribution_core.curvature.base import Curvature, Identity
from attribution_core.curvature.covariances import CovarianceSums
from attribution_core.curvature.ekfac import Eigenbasis, EigenvalueSums, EkfacFactors

__all__ = ["CovarianceSums", "Curvature", "Eigenbasis", "EigenvalueSums", "EkfacFactors", "Identity"]
