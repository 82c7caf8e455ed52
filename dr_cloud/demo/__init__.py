"""The demonstration: a real database on a protected disk, corrupted at an unknown moment, found by parallel tests."""
