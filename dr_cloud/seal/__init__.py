"""Hash, compress, encrypt; and the keys for it."""
