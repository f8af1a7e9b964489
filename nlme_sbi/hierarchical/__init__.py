"""Hierarchical models: parameters at the levels global, group and individual, fitted by importance-weighted variational
inference with a network that reads every series, and by EM over its draws."""
