"""Training of the network: the loop, and the pairs that it sees."""
