"""Checkpoints on disk: each is complete or absent, and a resumed run goes on from the newest intact one."""
