"""A trained policy in other forms: what `librobot-export` writes, one module for each kind."""
