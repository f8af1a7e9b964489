"""Inputs of the report."""
