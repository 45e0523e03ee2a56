"""Numbers as bytes."""
