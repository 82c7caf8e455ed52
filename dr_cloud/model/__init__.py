"""The domain's records and words: no I/O, no clocks read, nothing imported from the rest of the project."""
