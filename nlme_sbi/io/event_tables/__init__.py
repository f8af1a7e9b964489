"""Event tables of NONMEM, Monolix and nlmixr2: what a row means."""
