"""Examples and features, row by row on disk."""
