"""Everything that lies on disk."""
