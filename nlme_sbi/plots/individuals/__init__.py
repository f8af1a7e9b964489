"""Figures of single individuals: fits, maps, influence, outliers."""
