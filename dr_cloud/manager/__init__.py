"""The provider's point of control: registry, VPGs, tasks, placement, database. No Ray, no sockets."""
