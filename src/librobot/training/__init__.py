"""Training runs: launch (light), worker and run (the training process), callbacks and loggers."""
