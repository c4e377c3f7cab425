"""A small model that learns to predict a criterion."""
