"""What every backbone must hold."""

import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models
from librobot.errors import LibrobotError


@pytest.fixture(params=tiny_models.options("vlm"))
def vlm(request):
    torch.manual_seed(0)
    node = OmegaConf.create(tiny_models.node("vlm", request.param))
    return instantiate(node, _convert_="all").eval()


def observation_for(vlm, size: int = 4, **changes):
    observation = replace(tiny_models.batch(size).observation, **changes)
    return replace(observation, inputs=vlm.processor(observation.prompt, observation.images))


def padded(inputs: dict[str, torch.Tensor], by: int) -> dict[str, torch.Tensor]:
    """The same prompts with longer padding: what comes of a neighbour with a longer prompt."""
    mask = next(value for value in inputs.values() if value.dtype == torch.bool)

    def longer(value: torch.Tensor) -> torch.Tensor:
        if value.shape[-1] != mask.shape[-1]:
            return value
        fill = torch.full((*value.shape[:-1], by), 0 if value.dtype == torch.bool else 7, dtype=value.dtype)
        return torch.cat((value, fill), dim=-1)

    made = {name: longer(value) for name, value in inputs.items()}
    if "camera" in made:  # padding belongs to no camera
        made["camera"][:, mask.shape[1] :] = 0
    return made


@torch.inference_mode()
def test_context_fits_the_geometry(vlm):
    context = vlm(observation_for(vlm), layers=(0, -1))
    shape = vlm.geometry
    b, length = context.mask.shape
    assert shape.num_layers == len(vlm.blocks)
    assert len(context.keys) == len(context.values) == (shape.num_layers if vlm.has_cache else 0)
    if vlm.has_cache:
        assert context.keys[0].shape == (b, shape.num_kv_heads, length, shape.head_dim)
    assert context.hidden.shape == (b, length, vlm.hidden_size)
    assert context.hidden is context.layers[-1]
    assert context.mask.shape == (b, length)


@torch.inference_mode()
def test_next_position_counts_the_instruction(vlm):
    short, long = (vlm(observation_for(vlm, prompt=[text] * 4)) for text in ("open", "open it"))
    more = long.mask.sum(1) - short.mask.sum(1)
    assert (more > 0).all()
    assert torch.equal(long.next_position - short.next_position, more)


@torch.inference_mode()
def test_batch_mates_do_not_change_a_sample(vlm):
    observation = observation_for(vlm)
    together = vlm(observation)
    for row in range(4):
        part = slice(row, row + 1)
        alone = replace(
            observation,
            images={name: image[part] for name, image in observation.images.items()},
            image_mask={name: mask[part] for name, mask in observation.image_mask.items()},
            state=observation.state[part],
            prompt=observation.prompt[part],
        )
        alone = vlm(replace(alone, inputs=vlm.processor(alone.prompt, alone.images)))
        expected = together.hidden[row][together.mask[row]]
        torch.testing.assert_close(alone.hidden[0][alone.mask[0]], expected, atol=1e-5, rtol=1e-4)
        assert alone.next_position[0] == together.next_position[row]


@torch.inference_mode()
def test_a_picture_and_its_camera_change_the_output(vlm):
    observation = observation_for(vlm)
    before = vlm(observation)
    for name in observation.images:
        images = dict(observation.images) | {name: 255 - observation.images[name]}
        after = vlm(replace(observation, images=images))
        assert not torch.allclose(after.hidden, before.hidden, atol=1e-6), f"{name} has no effect"
    turned = dict(zip(observation.images, reversed(observation.images.values()), strict=True))
    turned = replace(observation, images=turned)
    after = vlm(replace(turned, inputs=vlm.processor(turned.prompt, turned.images)))
    last = before.mask.sum(1) - 1  # the same prompt, behind the same pictures in another order
    if torch.equal(after.mask, before.mask):
        assert not torch.allclose(after.hidden[0, last[0]], before.hidden[0, last[0]], atol=1e-6)


@torch.inference_mode()
def test_the_cache_does_not_depend_on_the_layers_asked_for(vlm):
    observation = observation_for(vlm)
    full, cache_only = vlm(observation), vlm(observation, layers=())
    for one, other in zip(full.keys + full.values, cache_only.keys + cache_only.values, strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_longer_padding_changes_nothing(vlm):
    observation = observation_for(vlm)
    context = vlm(observation)
    longer = vlm(replace(observation, inputs=padded(observation.inputs, by=9)))
    real = context.mask
    assert torch.equal(longer.next_position, context.next_position)
    assert not longer.mask[:, real.shape[1] :].any()
    short = slice(0, real.shape[1])
    torch.testing.assert_close(longer.hidden[:, short][real], context.hidden[real], atol=1e-5, rtol=1e-4)
    for one, other in zip(longer.keys, context.keys, strict=True):
        torch.testing.assert_close(
            one[:, :, short].transpose(1, 2)[real], other.transpose(1, 2)[real], atol=1e-5, rtol=1e-4
        )


@torch.inference_mode()
def test_an_absent_camera_moves_nothing_but_itself(vlm):
    """Its pixels count for nothing, and later tokens take its positions."""
    observation = observation_for(vlm)
    absent = dict(observation.image_mask) | {"front": torch.zeros(4, dtype=torch.bool)}
    noise = dict(observation.images) | {"front": 255 - observation.images["front"]}
    one = vlm(replace(observation, image_mask=absent))
    other = vlm(replace(observation, image_mask=absent, images=noise))
    assert torch.equal(one.hidden[one.mask], other.hidden[other.mask])
    assert (one.next_position < vlm(observation).next_position).all()
    assert one.hidden.isfinite().all()


def test_unused_parameters_are_those_without_a_gradient(vlm):
    for layers in ((), (-1,)) if vlm.has_cache else ((0,), (1,), (-1,)):
        vlm.zero_grad()
        context = vlm(observation_for(vlm), layers=layers)
        outputs = context.layers or context.keys + context.values
        sum(x[..., 0].square().sum() for x in outputs).backward()
        without = {n for n, p in vlm.named_parameters() if p.grad is None}
        unused = {id(p) for p in vlm.unused_parameters(layers)}
        assert without == {n for n, p in vlm.named_parameters() if id(p) in unused}


def test_processor_is_picklable_and_says_what_is_too_long(vlm):
    processor = pickle.loads(pickle.dumps(vlm.processor))
    images = tiny_models.batch().observation.images
    made = processor(tiny_models.PROMPTS, images)
    again = vlm.processor(tiny_models.PROMPTS, images)
    assert made.keys() == again.keys()
    assert all(torch.equal(made[key], again[key]) for key in made)
    assert all(len(value) == len(tiny_models.PROMPTS) for value in made.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((LibrobotError, UserWarning), match="max_prompt_tokens"):
            processor(["a" * 10_000])


@torch.inference_mode()
def test_tokens_that_follow_the_context_one_by_one_or_together(vlm):
    """Extended by three tokens at once, or by one and then two: the same; and no token sees a later one."""
    if not vlm.has_cache:
        with pytest.raises(LibrobotError, match="vlm=qwen2vl"):
            vlm.extend(vlm(observation_for(vlm)), torch.zeros(4, 1, vlm.hidden_size))
        return
    context = vlm(observation_for(vlm))
    ids = torch.tensor([[5, 6, 7]] * 4)
    x = vlm.embed_tokens(ids)
    whole = vlm.extend(context, x)
    first = vlm.extend(context, x[:, :1])
    rest = vlm.extend(first, x[:, 1:])
    torch.testing.assert_close(first.hidden, whole.hidden[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rest.hidden, whole.hidden[:, 1:], atol=1e-5, rtol=1e-4)
    assert torch.equal(rest.next_position, context.next_position + 3)
    assert rest.mask.shape[1] == rest.keys[0].shape[2] == context.mask.shape[1] + 3
    assert vlm.logits(whole.hidden).shape[:2] == (4, 3)
    changed = vlm.extend(context, vlm.embed_tokens(ids + torch.tensor([0, 0, 1])))
    torch.testing.assert_close(changed.hidden[:, :2], whole.hidden[:, :2], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(changed.hidden[:, 2], whole.hidden[:, 2], atol=1e-6)


@torch.inference_mode()
def test_padding_among_following_tokens_changes_nothing(vlm):
    if not vlm.has_cache:
        return
    context = vlm(observation_for(vlm))
    x = vlm.embed_tokens(torch.tensor([[5, 9, 6]] * 4))
    real = torch.tensor([[True, False, True]] * 4)
    padded = vlm.extend(context, x, real=real)
    plain = vlm.extend(context, x[:, [0, 2]])
    torch.testing.assert_close(padded.hidden[:, [0, 2]], plain.hidden, atol=1e-5, rtol=1e-4)
    assert torch.equal(padded.next_position, plain.next_position)
    both = vlm.extend(context, x, sees=torch.ones(1, 3, 3, dtype=torch.bool))
    assert not torch.allclose(both.hidden[:, 0], vlm.extend(context, x).hidden[:, 0], atol=1e-6)
