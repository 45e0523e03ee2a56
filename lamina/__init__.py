"""lamina: train models on small devices one layer at a time, federated over many of them.

This package is the shared language: model descriptions, plans, segments, manifests, wire messages, tensor files, errors.
It imports neither torch nor a web framework.
"""

__version__ = "0.1.0"
