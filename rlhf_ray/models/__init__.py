"""Transformers models: packed forward, token log-probs, scalar head, and the tiny test model."""
