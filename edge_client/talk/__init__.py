"""The process that talks to the coordinator."""
