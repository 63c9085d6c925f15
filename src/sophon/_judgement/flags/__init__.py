"""Red flags, by subject."""
