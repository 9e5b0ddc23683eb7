"""Headwater's attribution library: which training data is behind a model's behaviour.

Usable from a notebook: nothing here knows of HTTP, SQL or the service's settings.
"""
