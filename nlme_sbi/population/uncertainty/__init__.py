"""Confidence intervals: information, sandwich, profile likelihood, bootstrap; influence of individuals."""
