import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from librobot.config.build import build_suite
from librobot.errors import LibrobotError
from librobot.evaluation.environment import suite_node, warn_of_renderer
from librobot.sim.render import GL, RAYS

NOTHING = OmegaConf.create({})


def trained(renderer=GL, **described):
    described = {"name": "metaworld", "kinds": ["reach"], "image_size": 32, "max_steps": 9} | described
    provenance = {"env": {**described, "renderer": renderer}, "renderer": renderer}
    return SimpleNamespace(provenance=provenance, config={})


def test_the_suite_of_training_with_its_options():
    suite = build_suite(suite_node(NOTHING, trained()))
    assert (suite.name, suite.kinds, suite.image_size, suite.max_steps) == ("metaworld", ("reach",), 32, 9)


def test_given_options_replace_those_of_training():
    suite = build_suite(suite_node(OmegaConf.create({"max_steps": 5}), trained()))
    assert (suite.max_steps, suite.image_size) == (5, 32)


def test_pictures_are_drawn_as_in_training_where_that_is_possible():
    assert build_suite(suite_node(NOTHING, trained(renderer=RAYS))).renderer == RAYS
    assert suite_node(NOTHING, trained(renderer=GL)).renderer == "auto"


def test_a_named_suite_is_taken_as_it_is():
    node = OmegaConf.create({"_target_": "librobot.sim.metaworld.MetaWorldSuite", "image_size": 48})
    assert suite_node(node, trained()) == node


def test_a_suite_of_another_package_comes_from_the_training_configuration():
    policy = trained(name="mine")
    policy.config = {"env": {"_target_": "mine.Suite", "image_size": 8}}
    assert suite_node(NOTHING, policy) == {"_target_": "mine.Suite", "image_size": 32}


@pytest.mark.parametrize("policy", [None, SimpleNamespace(provenance={}, config={}), trained(name="mine")])
def test_an_unknown_suite_must_be_named(policy):
    with pytest.raises(LibrobotError, match="env"):
        suite_node(NOTHING, policy)


def test_another_renderer_than_in_training_warns(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_renderer(GL, GL)
        warn_of_renderer(None, RAYS)
        assert not caplog.records
        warn_of_renderer(GL, RAYS)
    (record,) = caplog.records
    assert GL in record.getMessage()
    assert RAYS in record.getMessage()
