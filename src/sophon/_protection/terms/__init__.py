"""The terms of a protection, one file each."""
