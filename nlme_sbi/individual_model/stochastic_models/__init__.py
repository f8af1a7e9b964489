"""Simulators without a likelihood: stochastic differential equations and reaction networks."""
