"""A whole run in one process."""
