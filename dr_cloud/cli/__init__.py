"""The `dr-cloud` command."""
