"""What trials say: statistics, flags, the verdict."""
