"""Mixtures, multiple testing, factorizations, Pareto k-hat and MCMC diagnostics: statistics that know no model."""
