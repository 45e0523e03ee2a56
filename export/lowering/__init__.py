"""Graphs -> programs of the engines."""
