"""What happens around the training steps: checkpoints, progress, guards."""
