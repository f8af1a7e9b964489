"""Checks of the prior ratio, and the prior that its next simulations come from."""
