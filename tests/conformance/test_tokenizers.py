"""What every action tokenizer must hold, found by the heads whose YAML names one."""

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import tiny_models

HORIZON, ACTION_DIM = 6, 3
# One head for each tokenizer: others differ in how they sample.
TOKENIZERS = {
    str(head["tokenizer"]): name
    for name in reversed(tiny_models.options("head"))
    if "tokenizer" in (head := tiny_models.load("head", name))
}
NAMES = sorted(TOKENIZERS.values())
MADE: dict = {}


def chunks(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(count, HORIZON, ACTION_DIM, generator=draw)).cumsum(1).clamp(-1, 1)


def unfitted(name: str):
    node = tiny_models.node("head", name)["tokenizer"]
    if "num_train_steps" in node:
        node["num_train_steps"] = 200  # enough to learn something
    tokenizer = instantiate(OmegaConf.create(node), _convert_="all")
    tokenizer.attach(horizon=HORIZON, action_dim=ACTION_DIM)
    return tokenizer


def made(name: str):
    if name not in MADE:
        MADE[name] = unfitted(name)
        if not MADE[name].fitted:
            MADE[name].fit(chunks(200))
    return MADE[name]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_known_before_the_fit(name):
    before, tokenizer = unfitted(name), made(name)
    assert (before.vocabulary, before.max_tokens, before.mixes) == (
        tokenizer.vocabulary,
        tokenizer.max_tokens,
        tokenizer.mixes,
    )
    assert tokenizer.fitted
    if not before.fitted:
        with pytest.raises(ValueError, match="has to be fitted before it is used"):
            before.encode(chunks(1))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_become_tokens_and_come_back(name):
    """With less error than a chunk of zeros has."""
    tokenizer, actions = made(name), chunks(20, seed=1)
    ids, mask = tokenizer.encode(actions)
    assert ids.shape == mask.shape
    assert ids.shape[1] <= tokenizer.max_tokens
    assert ((ids >= 0) & (ids < tokenizer.vocabulary))[mask].all()
    decoded = tokenizer.decode(ids, mask)
    assert decoded.shape == actions.shape
    assert decoded.dtype == torch.float32
    assert (decoded - actions).square().mean() < actions.square().mean()
    alone = tokenizer.encode(actions[3:4])
    assert torch.equal(alone[0][alone[1]], ids[3][mask[3]]), "a chunk's tokens depend on no other chunk"


@pytest.mark.parametrize("name", NAMES)
def test_what_data_hold_is_allowed_and_whatever_is_allowed_decodes(name):
    tokenizer, count = made(name), 8
    ids, mask = tokenizer.encode(chunks(count, seed=1))
    constraint = tokenizer.constrain(count, torch.device("cpu"))
    for tokens, real in zip(ids.T, mask.T, strict=True):
        allowed = constraint.allowed()
        assert allowed.shape == (count, tokenizer.vocabulary)
        assert allowed[torch.arange(count), tokens][real].all()
        constraint.advance(tokens)
    assert constraint.done.all()
    draw, chosen = torch.Generator().manual_seed(0), []
    constraint = tokenizer.constrain(count, torch.device("cpu"))
    while not constraint.done.all():
        assert constraint.allowed().any(dim=1).all()
        chosen.append(torch.multinomial(constraint.allowed().float(), 1, generator=draw).squeeze(1))
        constraint.advance(chosen[-1])
    assert len(chosen) <= tokenizer.max_tokens
    decoded = tokenizer.decode(torch.stack(chosen, 1), torch.ones(count, len(chosen), dtype=torch.bool))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(ids=st.lists(st.integers(0, 2000), max_size=30), data=st.data())
def test_any_tokens_decode(name, ids, data):
    tokenizer = made(name)
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    actions = tokenizer.decode(torch.tensor([ids], dtype=torch.long), torch.tensor([mask], dtype=torch.bool))
    assert actions.shape == (1, HORIZON, ACTION_DIM)
    assert actions.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_files_restore_the_tokens(name):
    tokenizer, again, actions = made(name), unfitted(name), chunks(20, seed=2)
    files = tokenizer.files()
    assert all(isinstance(text, str) for text in files.values())
    again.restore(files)
    assert again.fitted
    ids, mask = tokenizer.encode(actions)
    for ours, theirs in zip((ids, mask), again.encode(actions), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again.decode(ids, mask), tokenizer.decode(ids, mask))
