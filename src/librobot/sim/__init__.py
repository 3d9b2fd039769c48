"""Simulated suites behind one seam: environments, language-given tasks, scripted experts, recording."""
