"""The commands: thin, and light to import (nothing heavier than Hydra before a command does its work)."""
