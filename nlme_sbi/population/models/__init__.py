"""Population models: means, variances, correlations, covariates."""
