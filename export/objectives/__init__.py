"""Losses, in torch."""
