"""Whether a fitted population describes the data: predictive checks, npde, residuals, random effects."""
