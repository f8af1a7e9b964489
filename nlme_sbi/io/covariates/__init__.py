"""Covariates of a table: those with one value an individual, those that change in time."""
