"""What the decoder alone decodes is what the loaders' frames need, no more."""

import pytest

from librobot.bench._decoder_alone import decoder_alone
from librobot.bench._footage import write_footage
from librobot.bench._loaders import Task


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench") / "footage"
    write_footage(root, episodes=2, length=12, height=64, width=64)
    return root


@pytest.mark.parametrize(
    ("samples", "window", "decoded"),
    [
        ([0, 2, 14], 1, 3),  # keyframes
        ([1, 13], 1, 4),  # frames behind one
        ([13, 1, 0, 1], 1, 4),  # shared and repeated
        ([5], 4, 4),  # frames 2 to 5
        ([6], 4, 5),  # frames 3 to 6, and the keyframe before
    ],
)
def test_two_cameras_decode_from_their_keyframes_on(footage, samples, window, decoded):
    task = Task(footage, window, batch_size=len(samples), num_workers=0)
    assert list(decoder_alone(task, samples)) == [2 * decoded]
