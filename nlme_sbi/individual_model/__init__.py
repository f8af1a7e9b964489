"""One individual: priors, mechanistic models, solvers, dosing events and residual-error models."""
