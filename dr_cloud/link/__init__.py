"""What passes between sites: the messages of a replication stream and the plain local stream that carries them."""
