"""Aligns language models on a Ray cluster."""
