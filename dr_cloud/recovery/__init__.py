"""Recovery tests: the search for the last clean point in time."""
