"""The objective on weighted draws with its derivatives and errors, and estimates of individuals and tests of
variances."""
