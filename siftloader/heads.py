"""An exit head of its own, trained beside the model."""
