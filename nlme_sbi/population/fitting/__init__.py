"""From starting values to a verified estimate: multistart, the search, variances at 0, label switching."""
