"""Whether a trained network's posteriors are right: calibration, recovery, agreement with the likelihood."""
