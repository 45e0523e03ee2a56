"""`lamina demo`: a whole federated run on this machine."""
