"""From starting values to a checked estimate: multistart, the climb, variances at 0, label switching."""
