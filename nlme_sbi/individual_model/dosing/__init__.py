"""Doses: as recorded and as received, linear compartments in closed form, differential equations through doses."""
