"""Looking at every node before a model is loaded: what would fail later, and less clearly, fails here in seconds.

`run.py` asks the nodes through the probes of `probe.py` and `links.py`, `asked.py` says what a config asks of them,
`judge.py` makes problems of the answers. Every check is made and every problem told, whatever failed before it.
"""
