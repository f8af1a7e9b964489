"""Tables without doses: long ones, one column an individual, vectors without times."""
