"""The posterior of the population parameters: priors, sampler, draws."""
