"""Rewards: models, Python functions, HTTP services and their combination."""
