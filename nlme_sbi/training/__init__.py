"""Training of networks: the loop, losses, and sources of training pairs."""
