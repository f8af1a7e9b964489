"""The objective on weighted draws with its derivatives and errors, and what is told of individuals and variances."""
