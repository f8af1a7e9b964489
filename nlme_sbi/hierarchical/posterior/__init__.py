"""Posteriors of single individuals: networks of their series, normals and bent ones, refinement."""
