"""Every Ray call of the project, and nothing else: thin shells around the pure cores."""
