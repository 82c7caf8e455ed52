"""A typed client of the REST API, for programs and for the command line."""
