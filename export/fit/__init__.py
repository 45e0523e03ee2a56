"""Settings with which a plan fits a device."""
