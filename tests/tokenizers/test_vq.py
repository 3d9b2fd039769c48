"""Learned tokens: the autoencoder against lerobot's VQ-BeT, what is lost, and what users can get wrong."""

import math
import warnings

import pytest
import torch

from librobot.nn.vector_quantizer import ResidualQuantizer
from librobot.tokenizers.vq import VQ

HORIZON, ACTION_DIM = 6, 2


def chunks(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth: half a wave of random height and phase in each dimension."""
    draw = torch.Generator().manual_seed(seed)
    step = torch.linspace(0, math.pi, HORIZON)[None, :, None]
    height = 0.5 * torch.randn(count, 1, ACTION_DIM, generator=draw)
    phase = 6 * torch.rand(count, 1, ACTION_DIM, generator=draw)
    return height * torch.sin(step + phase)


def made(**options) -> VQ:
    small = {"num_train_steps": 250, "latent_dim": 16, "mlp_width": 32, "batch_size": 128}
    small |= {"lr": 5e-3, "commitment": 1.0}
    vq = VQ(**small | options)
    vq.attach(horizon=HORIZON, action_dim=ACTION_DIM)
    return vq


@pytest.fixture(scope="module")
def fitted() -> VQ:
    vq = made()
    vq.fit(chunks(2000))
    return vq


def lost(vq: VQ, actions: torch.Tensor) -> float:
    """Of the actions' variance."""
    return float((vq.decode(*vq.encode(actions)) - actions).square().mean() / actions.var())


def test_held_out_chunks_come_back(fitted):
    assert lost(fitted, chunks(500, seed=1)) < 0.6
    ids, mask = fitted.encode(chunks(500, seed=1))
    assert ids.shape == (500, fitted.max_tokens) == (500, 2)
    assert mask.all()
    assert ((ids // 16) == torch.arange(2)).all(), "each codebook has tokens of its own"
    actions = chunks(2000)
    assert fitted.error == pytest.approx(
        float((fitted.decode(*fitted.encode(actions)) - actions).abs().mean())
    )
    assert all(8 < used <= 16 for used in fitted.perplexity)


def test_tokens_are_coarse_first(fitted):
    """Without its later tokens a chunk is still roughly what it was."""
    actions = chunks(500, seed=1)
    ids, mask = fitted.encode(actions)
    mask = mask.clone()
    mask[:, 1:] = False
    coarse = float((fitted.decode(ids, mask) - actions).square().mean() / actions.var())
    assert lost(fitted, actions) < coarse < 1.0
    assert torch.equal(fitted.decode(ids[:, :1], mask[:, :1]), fitted.decode(ids, mask))


@pytest.mark.slow
def test_what_is_lost_falls_with_codes_and_codebooks():
    """With the sizes of head=vq, and a third of its training."""
    losses = []
    for options in ({}, {"num_quantizers": 4}, {"num_codes": 64}):
        vq = VQ(num_train_steps=1000, **options)
        vq.attach(horizon=HORIZON, action_dim=ACTION_DIM)
        vq.fit(chunks(4000))
        losses.append(lost(vq, chunks(1000, seed=1)))
        print(options, losses[-1], vq.perplexity)
        assert all(used > 0.6 * vq.num_codes for used in vq.perplexity)
    assert losses[0] < 0.25
    assert max(losses[1:]) < losses[0] / 2


def test_the_seed_fixes_the_fit_and_nothing_else_changes():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (made(seed=seed, num_train_steps=20) for seed in (0, 0, 1))
    for vq in (first, again, other):
        vq.fit(chunks(300))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.files() == again.files()
    assert first.files() != other.files()


def test_progress_and_the_codebooks_use_are_said(capfd):
    made(num_train_steps=5).fit(chunks(300))
    said = capfd.readouterr().err
    assert "fitting VQ action tokens 5/5" in said
    assert "perplexity" in said
    assert "of 16 codes" in said


def test_unused_codes_begin_again():
    draw = torch.Generator().manual_seed(0)
    quantizer = ResidualQuantizer(1, 8, 2)
    quantizer.start(torch.zeros(64, 2), draw)  # all codes alike: one takes everything
    centres = torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(8) * math.pi / 4])
    for _ in range(60):
        quantizer.learn(centres.repeat(16, 1), draw)
    assert quantizer(centres).loss < 1e-4
    assert set(quantizer.encode(centres).flatten().tolist()) == set(range(8))
    stuck = ResidualQuantizer(1, 8, 2)
    stuck.start(torch.zeros(64, 2), draw)
    for _ in range(60):
        stuck.learn(centres.repeat(16, 1), draw, restart=False)
    assert len(set(stuck.encode(centres).flatten().tolist())) == 1


def test_codes_are_moving_averages():
    """One step by hand: sums and counts of what takes a code, mixed with what they were."""
    quantizer = ResidualQuantizer(1, 2, 1, decay=0.75)
    quantizer.codebooks.copy_(torch.tensor([[[0.0], [10.0]]]))
    quantizer.counts.copy_(torch.tensor([[2.0, 2.0]]))
    quantizer.learn(torch.tensor([[1.0], [2.0], [3.0], [12.0]]), torch.Generator(), restart=False)
    assert quantizer.counts.tolist() == [[0.75 * 2 + 0.25 * 3, 0.75 * 2 + 0.25 * 1]]
    expected = [0.25 * 6 / 2.25, (0.75 * 20 + 0.25 * 12) / 1.75]
    torch.testing.assert_close(quantizer.codebooks.flatten(), torch.tensor(expected))


def test_the_residual_gradient_passes_straight_through():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(3, 4, 5)
    quantizer.codebooks.normal_()
    z, direction = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    quantized = quantizer(z)
    torch.testing.assert_close(quantized.values, quantizer.decode(quantized.codes))
    (quantized.values * direction).sum().backward()
    torch.testing.assert_close(z.grad, direction)


@pytest.mark.slow
def test_lerobots_vqbet_gives_the_same_codes_and_actions(fitted):
    """The same weights in lerobot's VqVae."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
    from lerobot.policies.vqbet.modeling_vqbet import VqVae

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = VQBeTConfig(
            action_chunk_size=HORIZON, vqvae_n_embed=16, vqvae_embedding_dim=16, vqvae_enc_hidden_dim=32
        )
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,))}
    theirs = VqVae(config).eval()
    ours = fitted.network
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    for layer, book in zip(theirs.vq_layer.layers, ours.quantizer.codebooks, strict=True):
        layer._codebook.embed.data.copy_(book[None])
    actions = chunks(300, seed=2)
    ids, mask = fitted.encode(actions)
    values, codes = theirs.get_code(actions)
    assert torch.equal(codes, ids - 16 * torch.arange(2))
    decoded = theirs.get_action_from_latent(theirs.get_embeddings_from_code(codes))
    torch.testing.assert_close(fitted.decode(ids, mask), decoded, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs.get_action_from_latent(values), decoded, atol=1e-5, rtol=1e-5)


def test_autocast_changes_no_token(fitted):
    actions = chunks(200, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, mask = fitted.encode(actions)
        decoded = fitted.decode(ids, mask)
    assert torch.equal(ids, fitted.encode(actions)[0])
    assert decoded.dtype == torch.float32


def test_what_users_can_get_wrong(fitted):
    with pytest.raises(ValueError, match="VQ tokenizer has to be fitted before it is used"):
        made().encode(chunks(1))
    for wrong in (torch.zeros(1, HORIZON + 1, ACTION_DIM), torch.zeros(1, HORIZON, ACTION_DIM - 1)):
        for call in (fitted.encode, made().fit):
            with pytest.raises(
                ValueError, match=r"chunks of 6 actions of 2 dimensions, found chunks of shape"
            ):
                call(wrong)
    with pytest.raises(ValueError, match="finite numbers, found 1 chunks with others"):
        made().fit(torch.full((1, HORIZON, ACTION_DIM), torch.nan))
    longer = VQ(latent_dim=16, mlp_width=32)
    longer.attach(horizon=HORIZON + 2, action_dim=ACTION_DIM)
    with pytest.raises(ValueError, match=r"has horizon=6, and this policy has 8"):
        longer.restore(fitted.files())
    with pytest.raises(ValueError, match=r"has num_codes=16, and this policy has 32"):
        made(num_codes=32).restore(fitted.files())
    for options, message in (
        ({"num_codes": 1}, "num_codes must be at least 2, found 1"),
        ({"num_quantizers": 0}, "num_quantizers must be at least 1"),
        ({"commitment": 0}, "commitment and lr must be above 0"),
        ({"decay": 1.0}, "decay must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)
