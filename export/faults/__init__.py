"""What is wrong with a model, before a long export."""
