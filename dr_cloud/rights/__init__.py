"""The rights manager: policy as code, two engines, signed bundles, grants, and the record of decisions."""
