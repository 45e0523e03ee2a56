"""Models of users and of the built-in family."""
