"""Protection: rounds, guard, losses and the terms it is a sum of."""
