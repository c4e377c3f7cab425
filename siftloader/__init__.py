"""Train on the samples worth training on: SIFT for any unmodified PyTorch loop."""
