"""What a training step waits for: measured, traced, and said in words."""
