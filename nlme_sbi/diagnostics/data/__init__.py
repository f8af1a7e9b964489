"""Whether the data look like what the model simulates: before anything is fitted."""
