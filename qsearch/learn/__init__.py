"""What predicts the quality of a plan, and why; no torch."""
