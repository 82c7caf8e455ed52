"""Measurements beside peers: `python -m bench [NAME …]`. What is measured, and how, is in docs/performance.md."""
