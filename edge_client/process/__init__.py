"""The processes of a device, and what they leave each other."""
