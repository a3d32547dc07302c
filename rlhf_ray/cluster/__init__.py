"""The Ray cluster: sessions and placement groups."""
