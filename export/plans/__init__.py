"""Plan files -> a plan and its model."""
