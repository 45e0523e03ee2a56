"""The decisions of a federation, pure: no SQL, no HTTP, no torch, no clock and no chance of its own."""
