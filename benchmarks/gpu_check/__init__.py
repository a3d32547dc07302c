"""Whether a machine with one or more GPUs computes what this package expects of it: `scripts/gpu_check.sh`.

Each check is a function that takes a `Setting` and returns what it measured, in words; it raises `CheckFailed` for a
wrong result. Checks call the product's own functions. They run in a process of their own, so that one that crashes or
hangs is a line in the table like any other.
"""
