"""What attackers do: suites, the search."""
