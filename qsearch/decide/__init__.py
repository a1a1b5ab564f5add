"""Plans under budgets, from tables alone; no torch."""
