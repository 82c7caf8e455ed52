"""The two sides of a VDSA: source (receive, hash, offer, seal, send) and target (reorder, journal, checkpoint)."""
