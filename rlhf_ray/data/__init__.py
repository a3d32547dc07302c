"""Prompts, preferences, chat templates, packing and the data cursor, and what prepares the examples' data."""
