"""What pyproject.toml cannot say: beside src/'s packages, the folder conf/ is the package librobot.conf."""

from setuptools import find_namespace_packages, setup

FOUND = find_namespace_packages("src", include=["librobot*", "hydra_plugins*"], exclude=["*.__pycache__*"])

setup(packages=[*FOUND, "librobot.conf"])
