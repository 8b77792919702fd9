"""The embedding store: every picture goes through the frozen tower once, and training reads the result."""
