"""The checks of scripts/diagnose.py."""
