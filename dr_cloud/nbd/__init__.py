"""The NBD wire: server, clients, and the interface that a served disk implements."""
