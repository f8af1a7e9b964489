"""Simulation-based inference for nonlinear mixed-effects models."""

__version__ = "0.1.0"
