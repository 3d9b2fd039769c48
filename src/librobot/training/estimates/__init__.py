"""What a run would need, from the meta device: nothing is downloaded, no weight is ever allocated."""
