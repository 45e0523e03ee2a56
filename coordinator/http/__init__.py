"""Requests and answers as bytes."""
