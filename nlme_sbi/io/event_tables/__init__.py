"""Event tables of NONMEM, Monolix and nlmixr2: measurements, doses and other events, one a row."""
