"""Small modules that are trained beside the model."""
