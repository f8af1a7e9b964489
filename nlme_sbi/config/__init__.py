"""Configurations: which classes they may name, how they become objects, and how refusals are worded."""
