"""Inference of single individuals from few simulations: rounds that simulate where the posterior is, and refinement.

Posteriors end like those of ``networks/``: they give draws, which whatever takes draws then uses.
"""
