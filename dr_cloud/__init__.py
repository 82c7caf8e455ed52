"""Continuous data protection and parallel point-in-time recovery for many enterprises."""
