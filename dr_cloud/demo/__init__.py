"""The demonstration: three enterprises, four data centers, one corrupted, its last clean time found."""
