"""A recovery stack: the disks of a VPG as they were at one past time, with a throw-away log for its test's writes."""
