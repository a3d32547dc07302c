"""Losses of reward models: the negative log-likelihood of what people said, given the scores of what they compared.

Candidates are flat, `[candidates]`, row after row; `offsets` (int64 `[rows + 1]`) says where each row begins, as in an
Arrow list array. `ranks` (int64 `[candidates]`) is 0 for the best of a row, and equal numbers are ties. Every function
returns one loss per row, `[rows]`; the caller weighs and averages them.
"""
