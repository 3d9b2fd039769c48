"""Published weights that stay in their files until a process knows which part of them is its own."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

import tiny_models
from librobot.config.build import build
from librobot.errors import LibrobotError
from librobot.nn.pretrained import unread_weights, weightless
from librobot.nn.stored import StoredTensor, stored_tensors

FAMILIES = [
    name if name in ("qwen2vl_tiny", "paligemma_tiny") else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny_models.options("vlm")
    if name.endswith("_tiny")
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_knows_the_places_of_its_weights(name, tmp_path):
    """Through names that transformers converts, in another dtype, where only some layers are kept."""
    torch.manual_seed(0)
    vlm = build(OmegaConf.create(tiny_models.node("vlm", name)), "vlm")
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(tmp_path)
    options = {"checkpoint": str(tmp_path), "dtype": "bfloat16", "num_layers": 1}
    whole = type(vlm)(**options)
    draws = torch.get_rng_state()
    with weightless(), unread_weights():
        unread = type(vlm)(**options)
    assert torch.equal(torch.get_rng_state(), draws)
    assert unread.model.config.to_dict() == whole.model.config.to_dict()
    found, expected = unread.state_dict(keep_vars=True), whole.state_dict(keep_vars=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].shape, found[key].dtype, found[key].requires_grad) == (
            value.shape,
            value.dtype,
            value.requires_grad,
        )
        if isinstance(value, nn.Parameter):
            assert isinstance(found[key], StoredTensor), key
            rows = (slice(1, 3),) if value.ndim else None
            assert torch.equal(found[key].read(rows), value if rows is None else value[rows]), key
    shared = {id(p) for p in unread.parameters()}
    assert len(shared) == len(list(whole.parameters()))


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(6, 4, dtype=torch.float64)
    save_file({"x": whole}, tmp_path / "x.safetensors")
    return whole, stored_tensors([str(tmp_path / "x.safetensors")])["x"]


def test_casts_and_moves_wait_and_the_rest_reads(stored):
    whole, x = stored
    assert x.device.type == "cpu"
    assert x.to("meta").is_meta
    assert not x.is_meta
    half = nn.Parameter(x.to(torch.float16).data)
    assert isinstance(half, StoredTensor)
    assert torch.equal(half.float().read((slice(2, 5), slice(0, 4))), whole.half().float()[2:5])
    second = x.unflatten(0, (2, 3))[1].T.chunk(2)[0]
    assert isinstance(second, StoredTensor)
    assert torch.equal(second.read(), whole[3:].T[:2])
    assert torch.equal(torch.cat([x, x]).read(), torch.cat([whole, whole]))
    assert x.sum() == whole.sum()
    assert torch.equal(x @ torch.ones(4, 1, dtype=x.dtype), whole.sum(dim=1, keepdim=True))


def test_what_would_be_lost_is_refused(stored, tmp_path):
    _, x = stored
    for change in (lambda: x.data.mul_(2), lambda: nn.init.zeros_(x), lambda: x.__setitem__(0, 1.0)):
        with pytest.raises(
            LibrobotError, match="cannot be changed while a policy is built; take trainer=ddp"
        ):
            change()
    with pytest.raises(LibrobotError, match="data: published weights"):
        nn.Parameter(x).data = torch.zeros(6, 4)
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(LibrobotError, match="expected a safetensors file that can be read"):
        x.read()
