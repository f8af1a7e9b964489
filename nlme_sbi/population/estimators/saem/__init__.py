"""Stochastic approximation EM with Metropolis-Hastings chains of every individual."""
