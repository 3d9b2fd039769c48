"""Makes the helpers beside this file importable from every test folder; keeps small tensors on one thread.

Several threads that wait for each other make the suite many times slower on a busy machine. Tensorflow stays
out of this process, as out of all of librobot but the one that writes RLDS: beside MuJoCo it may crash.
"""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)
os.environ["POT_BACKEND_DISABLE_TENSORFLOW"] = "1"  # for the tests that import POT themselves


@pytest.fixture(autouse=True)
def no_tensorflow():
    yield
    assert "tensorflow" not in sys.modules, "this test loaded tensorflow into the process of the tests"
