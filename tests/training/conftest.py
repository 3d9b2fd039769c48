"""The dataset that the small runs train on."""

from pathlib import Path

import pytest
from small_runs import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stick")
