"""One file per job: the training loop on a page."""
