"""Connections to a coordinator, which is not believed."""
