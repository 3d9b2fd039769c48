from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot.errors import LibrobotError
from librobot.evaluation.controls import blank_images, derangement, shuffled_prompts
from librobot.evaluation.episode import Episode, EpisodeResult


@given(st.lists(st.sampled_from("abcdef"), min_size=0, max_size=60), st.integers(0, 2**31))
def test_derangement_changes_every_label_where_that_is_possible(labels, seed):
    if labels and 2 * max(Counter(labels).values()) > len(labels):
        with pytest.raises(LibrobotError, match="cannot be shuffled"):
            derangement(labels, seed=seed)
        return
    order = derangement(labels, seed=seed)
    assert sorted(order) == list(range(len(labels)))  # a permutation: every instruction is used once
    assert all(labels[i] != labels[j] for i, j in enumerate(order))


def test_derangement_is_random_by_seed():
    labels = [f"{i % 10}" for i in range(100)]
    assert derangement(labels, seed=1) == derangement(labels, seed=1)
    assert derangement(labels, seed=1) != derangement(labels, seed=2)


def test_shuffled_prompts_touch_the_prompt_only():
    episodes = [EpisodeResult(i, "k", i, f"do {i % 3}", True, 1) for i in range(9)]
    transform = shuffled_prompts(episodes)
    given_prompts = []
    for result in episodes:
        observation = {"images": {}, "state": np.ones(2), "prompt": result.prompt}
        seen = transform(observation, Episode(result.index, "k", result.seed))
        assert seen["prompt"] != result.prompt
        assert seen["state"] is observation["state"]
        given_prompts.append(seen["prompt"])
    assert Counter(given_prompts) == Counter(result.prompt for result in episodes)


def test_blank_images_keep_shape_and_the_rest():
    image = np.random.default_rng(0).integers(0, 255, (2, 4, 6, 3), dtype=np.uint8)
    observation = {"images": {"front": image}, "state": np.ones(2), "prompt": "go"}
    blank = blank_images(observation, Episode(0, "k", 0))
    assert blank["images"]["front"].shape == image.shape
    assert blank["images"]["front"].dtype == np.uint8
    assert len(np.unique(blank["images"]["front"])) == 1
    assert (blank["prompt"], blank["state"] is observation["state"]) == ("go", True)
    assert observation["images"]["front"] is image
