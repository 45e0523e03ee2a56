"""Modules -> graphs that take their weights as inputs."""
