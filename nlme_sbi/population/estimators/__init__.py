"""Ways to the population likelihood: prior ratio, importance sampling (exact), Laplace, SAEM."""
