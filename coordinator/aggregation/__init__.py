"""From updates to new weights."""
