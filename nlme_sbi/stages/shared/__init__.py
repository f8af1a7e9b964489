"""What several stages share: components of a configuration, trained posteriors, stored fits, figures."""
