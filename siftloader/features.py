"""What a live model computes up to a layer or a stage, as vectors."""
