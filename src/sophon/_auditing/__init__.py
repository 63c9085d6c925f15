"""The audit: what is run, on what, and how."""
