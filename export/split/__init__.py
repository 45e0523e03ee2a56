"""Programs of split training."""
