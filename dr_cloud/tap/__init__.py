"""On the host: the NBD export in front of a disk, the intent bitmap, and the feed to the source VDSA."""
