"""Simulated pairs of parameters and data: batches, shards on disk, a store for training."""
