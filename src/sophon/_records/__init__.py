"""What happened: audit records, trials, statements."""
