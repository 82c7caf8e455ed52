"""The analyzer: infers from the writes that pass by what a virtual server is, and when it behaves suspiciously."""
