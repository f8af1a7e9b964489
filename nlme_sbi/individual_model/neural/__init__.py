"""Networks inside individual models: grey boxes, their terms, interpolation between knots."""
