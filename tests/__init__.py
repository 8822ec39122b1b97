"""The properties that the project promises, each a test."""
