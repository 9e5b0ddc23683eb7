"""Retraining for real: trainings from recipes, banks of retrained models, evaluations and verifications."""
