"""The five roles as Ray actors, and the group that drives the ranks of one as one."""
