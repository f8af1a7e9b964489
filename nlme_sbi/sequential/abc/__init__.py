"""Approximate Bayesian computation: parameters whose simulated statistics lie near those of the data."""
