"""What a user sees of runs and devices."""
