"""What a run leaves behind for people: metrics, samples, a trace of all actors, a manifest, progress and plots.

The files of a run folder can be read at any moment. After a kill they may tell of steps beyond the last
checkpoint; the resumed run takes those back (`resume_step`) before it writes its own.
"""
