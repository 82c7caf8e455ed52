"""The REST API: HTTP in front of the manager. No Ray."""
