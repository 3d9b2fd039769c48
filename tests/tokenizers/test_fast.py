"""FAST against its definition, the published folder format, and the exactness of constrained decoding."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dct
from transformers import PreTrainedTokenizerFast

from librobot.tokenizers.fast import FAST, quantised

HORIZON, ACTION_DIM, SCALE, VOCAB_SIZE = 8, 3, 10.0, 400


def chunks(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth chunks with a little noise, in [-1, 1]."""
    draw = np.random.default_rng(seed)
    step = np.linspace(0, math.pi, HORIZON)[None, :, None]
    height, phase = draw.normal(0, 0.5, (count, 1, ACTION_DIM)), draw.uniform(0, 6, (count, 1, ACTION_DIM))
    noise = draw.normal(0, 0.05, (count, HORIZON, ACTION_DIM))
    return torch.from_numpy(np.clip(height * np.sin(step + phase) + noise, -1, 1))


def made(**options) -> FAST:
    fast = FAST(**{"vocab_size": VOCAB_SIZE, "scale": SCALE} | options)
    fast.attach(horizon=HORIZON, action_dim=ACTION_DIM)
    return fast


@pytest.fixture(scope="module")
def fitted():
    fast = made()
    fast.fit(chunks(500))
    return fast


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the published processor fits and writes it: a byte-level vocabulary, with coefficients
    large enough for characters of two bytes."""
    import tokenizers

    scale, folder = 100.0, tmp_path_factory.mktemp("published")
    whole = [np.around(scale * dct(c.numpy(), axis=0, norm="ortho")).astype(int).ravel() for c in chunks(500)]
    lowest, highest = min(q.min() for q in whole), max(q.max() for q in whole)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    alphabet = [chr(code) for code in range(highest - lowest + 1)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, show_progress=False, initial_alphabet=alphabet
    )
    texts = ["".join(map(chr, row - lowest)) for row in whole]
    tokenizer._tokenizer.train_from_iterator(texts, trainer=trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    wrapped.save_pretrained(folder)
    config = {"scale": scale, "vocab_size": 1024, "min_token": int(lowest), "processor_class": "any"}
    (folder / "processor_config.json").write_text(json.dumps(config))
    assert highest - lowest > 256
    return folder


def rows(ids, mask):
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def test_coefficients_are_the_definitions():
    actions = chunks(20)
    step, frequency = torch.arange(HORIZON), torch.arange(HORIZON)[:, None]
    basis = torch.cos(math.pi * frequency * (2 * step + 1) / (2 * HORIZON)).double() * math.sqrt(2 / HORIZON)
    basis[0] /= math.sqrt(2)
    exact = SCALE * torch.einsum("fk,nka->nfa", basis, actions).flatten(1)  # frequency by frequency
    found = torch.from_numpy(quantised(actions, SCALE))
    assert (found - exact).abs().max() <= 0.5 + 1e-5
    certain = (exact - exact.floor() - 0.5).abs() > 1e-5
    assert torch.equal(found[certain].double(), exact.round()[certain])


def test_tokens_spell_the_shifted_coefficients(fitted):
    actions = chunks(30, seed=1)
    coefficients = quantised(chunks(500), SCALE)
    assert fitted.min_token == coefficients.min()
    known = quantised(actions, SCALE).clip(coefficients.min(), coefficients.max())
    ids, mask = fitted.encode(actions)
    for row, expected in zip(rows(ids, mask), known, strict=True):
        assert row[-1] == fitted.stop == VOCAB_SIZE
        text = "".join(fitted.tokenizer.id_to_token(token) for token in row[:-1])
        assert text == "".join(map(chr, expected - fitted.min_token))


def test_a_round_trip_loses_half_a_quantum_per_coefficient(fitted):
    actions = chunks(500)
    ids, mask = fitted.encode(actions)
    error = fitted.decode(ids, mask).double() - actions
    coefficients = dct(error.numpy(), axis=1, norm="ortho")
    assert 0.45 / SCALE < np.abs(coefficients).max() <= 0.5 / SCALE + 1e-6
    # Otherwise a token per coefficient, and one for stop.
    assert mask.sum(1).float().mean() < 0.6 * fitted.max_tokens


def test_coefficients_beyond_the_data_count_as_the_nearest(fitted):
    large = 50 * chunks(5)
    ids, mask = fitted.encode(large)
    highest = quantised(chunks(500), SCALE).max()
    decoded = quantised(fitted.decode(ids, mask), SCALE)
    assert (decoded == quantised(large, SCALE).clip(fitted.min_token, highest)).all()


def test_a_saved_folder_gives_the_same_tokens(fitted, tmp_path):
    fitted.save(tmp_path)
    again = made(scale=1.0, checkpoint=str(tmp_path))  # the folder's scale counts
    actions = chunks(50, seed=2)
    ids, mask = fitted.encode(actions)
    for reloaded in (again, made()):
        reloaded.restore(fitted.files())
        assert reloaded.fitted
        assert rows(*reloaded.encode(actions)) == rows(ids, mask)
        assert torch.equal(reloaded.decode(ids, mask), fitted.decode(ids, mask))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    codes = quantised(actions, SCALE) - fitted.min_token
    texts = ["".join(map(chr, fitted.pieces.nearest_code(row))) for row in codes]
    assert [theirs(text)["input_ids"] for text in texts] == [row[:-1] for row in rows(ids, mask)]
    assert [theirs.decode(row[:-1]) for row in rows(ids, mask)] == texts


def test_a_published_folder_gives_its_tokens(published):
    fast = made(vocab_size=1024, checkpoint=str(published))
    assert fast.fitted
    assert fast.scale == 100
    actions = chunks(500)[:100]
    theirs = PreTrainedTokenizerFast.from_pretrained(published)
    codes = np.stack([dct(c.numpy(), axis=0, norm="ortho").ravel() for c in actions])
    texts = ["".join(map(chr, np.around(100 * row).astype(int) - fast.min_token)) for row in codes]
    ids, mask = fast.encode(actions)
    assert mask.sum(1).max() <= fast.max_tokens
    assert [row[:-1] for row in rows(ids, mask)] == [theirs(text)["input_ids"] for text in texts]
    error = dct((fast.decode(ids, mask).double() - actions).numpy(), axis=1, norm="ortho")
    assert np.abs(error).max() <= 0.5 / 100 + 1e-6


@pytest.mark.slow
def test_lerobots_processor_agrees(tmp_path):
    from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor

    train, actions = chunks(500), chunks(500)[:100]
    ours = made()
    ours.fit(train)
    ours.save(tmp_path / "ours")
    reference = UniversalActionProcessor.fit(list(train.numpy()), scale=SCALE, vocab_size=VOCAB_SIZE)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = made(checkpoint=str(tmp_path / "theirs"))
    for fast, peer in (
        (ours, UniversalActionProcessor.from_pretrained_local(str(tmp_path / "ours"))),
        (loaded, reference),
    ):
        tokens = peer(actions.numpy())
        ids, mask = fast.encode(actions)
        assert [row[:-1] for row in rows(ids, mask)] == tokens
        assert np.abs(peer.decode(tokens) - fast.decode(ids, mask).numpy()).max() < 1e-6


@pytest.mark.parametrize("which", ["fitted", "published"])
def test_whatever_is_allowed_spells_exactly_a_chunk(which, fitted, published):
    fast = fitted if which == "fitted" else made(vocab_size=1024, checkpoint=str(published))
    draw = torch.Generator().manual_seed(0)
    constraint = fast.constrain(64, torch.device("cpu"))
    chosen, amid = [], False
    while not constraint.done.all():
        allowed = constraint.allowed()
        assert allowed.shape == (64, fast.vocabulary)
        assert not (allowed[:, fast.stop] & ~constraint.done).any(), "stop is for full sequences alone"
        tokens = torch.multinomial(allowed.float(), 1, generator=draw).squeeze(1)
        chosen.append(tokens)
        constraint.advance(tokens)
        amid = amid or bool(constraint.pending.any())
    assert amid == (which == "published")
    full = constraint.allowed()
    assert full[:, fast.stop].all()
    assert full.sum() == 64
    assert len(chosen) <= fast.max_tokens
    for row in torch.stack(chosen, dim=1).tolist():
        assert len(fast.pieces.codes_of(row)) == HORIZON * ACTION_DIM


def test_what_the_data_hold_is_allowed(fitted, published):
    for fast in (fitted, made(vocab_size=1024, checkpoint=str(published))):
        ids, mask = fast.encode(chunks(500)[:50])
        constraint = fast.constrain(50, torch.device("cpu"))
        for tokens, real in zip(ids.T, mask.T, strict=True):
            assert constraint.allowed()[torch.arange(50), tokens][real].all()
            constraint.advance(tokens)
        assert constraint.done.all()


@given(st.lists(st.integers(-5, 1100), max_size=60), st.data())
def test_any_tokens_decode(fitted, published, ids, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    for fast in (fitted, made(vocab_size=1024, checkpoint=str(published))):
        tokens = torch.tensor([ids], dtype=torch.long)
        actions = fast.decode(tokens, torch.tensor([mask], dtype=torch.bool))
        assert actions.shape == (1, HORIZON, ACTION_DIM)
        assert actions.isfinite().all()


def test_unfinished_and_overlong_tokens(fitted):
    actions = chunks(1)
    ids, mask = fitted.encode(actions)
    assert (fitted.decode(ids, torch.zeros_like(mask)) == 0).all()
    twice = torch.cat((ids[:, :-1], ids), dim=1)
    full = fitted.decode(ids, mask)
    assert torch.equal(fitted.decode(twice, torch.ones_like(twice, dtype=torch.bool)), full)
    # Without its last token a chunk keeps its low frequencies.
    mask[:, -2:] = False
    shorter = quantised(fitted.decode(ids, mask), SCALE)
    kept = len(fitted.pieces.codes_of(ids[mask].tolist()))
    assert kept < HORIZON * ACTION_DIM
    assert (shorter[0, :kept] == quantised(full, SCALE)[0, :kept]).all()
    assert (shorter[0, kept:] == 0).all()


def test_what_users_can_get_wrong(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"has to be fitted.*head.tokenizer.checkpoint"):
        made().encode(chunks(1))
    with pytest.raises(ValueError, match=r"vocab_size must be at least .*found 20; raise vocab_size"):
        made(vocab_size=20).fit(chunks(50))
    with pytest.raises(ValueError, match="scale must be above 0"):
        made(scale=0)
    with pytest.raises(ValueError, match=r"checkpoint must be a folder.*no tokenizer.json and no processor"):
        made(checkpoint=str(tmp_path))
    absent = made(checkpoint=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"found no folder .*absent"):
        absent.fit(chunks(50))
    absent.restore(fitted.files())
    assert absent.fitted
    fitted.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"set head.tokenizer.vocab_size={VOCAB_SIZE}"):
        made(vocab_size=1024, checkpoint=str(tmp_path / "saved"))
    assert made().files() == {}
