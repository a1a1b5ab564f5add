"""The plan at work: quantized layers that run, and files for other tools."""
