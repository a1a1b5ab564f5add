"""What a choice costs: simulate it, price it, measure it."""
