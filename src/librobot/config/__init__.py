"""Composing, checking and building configurations. Nothing here imports torch at module level."""
