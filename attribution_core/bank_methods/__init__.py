"""Attribution from models retrained on subsets; numpy only."""

from attribution_core.bank_methods.ame import average_marginal_effects
from attribution_core.bank_methods.banzhaf import data_banzhaf
from attribution_core.bank_methods.datamodels import Datamodel, lasso_datamodel, ridge_datamodel
from attribution_core.bank_methods.design import widest_subsets
from attribution_core.bank_methods.empirical_influence import empirical_influence
from attribution_core.bank_methods.knn_shapley import knn_shapley
from attribution_core.bank_methods.posterior import (
    Hyperparameters,
    Learned,
    PosteriorDatamodel,
    condition,
    fit_posterior,
    learn,
)
from attribution_core.bank_methods.semivalues import beta_shapley, data_shapley

__all__ = [
    "Datamodel",
    "Hyperparameters",
    "Learned",
    "PosteriorDatamodel",
    "average_marginal_effects",
    "beta_shapley",
    "condition",
    "data_banzhaf",
    "data_shapley",
    "empirical_influence",
    "fit_posterior",
    "knn_shapley",
    "lasso_datamodel",
    "learn",
    "ridge_datamodel",
    "widest_subsets",
]
