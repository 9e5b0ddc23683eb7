"""Curvature of the training loss: factors fitted over the training set, solved on the query side."""

from attribution_core.curvature.ekfac import CovarianceSums, Eigenbasis, EigenvalueSums, EkfacFactors

__all__ = ["CovarianceSums", "Eigenbasis", "EigenvalueSums", "EkfacFactors"]
