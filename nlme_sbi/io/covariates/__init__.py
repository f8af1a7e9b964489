"""Covariates of a table: constant ones, with one value an individual, and those that change in time."""
