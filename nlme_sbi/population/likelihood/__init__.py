"""Every individual's joint density: its modes, and mixtures that cover it."""
