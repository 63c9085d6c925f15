"""What everything stands on: errors, files, seeds, spans."""
