"""Split training: its plan, manifest and messages."""
