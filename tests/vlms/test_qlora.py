"""A language model in four bits: what it computes, what trains, what merging gives."""

import pytest
import torch
from adapted_backbones import FAMILIES, TARGETS, backbone, outputs, read, train_a_little, trainable
from peft.tuners.lora import LoraLayer
from torch import nn

from librobot.vlms.adapter_files import load_adapter, save_adapter, save_merged
from librobot.vlms.adapters import lora, qlora, quantize
from librobot.vlms.quantize import full_weight, is_quantized


def test_four_bits_hold_the_language_model_alone():
    vlm = backbone()
    quantize(vlm)
    quantized = {name for name, module in vlm.model.named_modules() if is_quantized(module)}
    linear = {
        name
        for name, module in vlm.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.")
    }
    assert quantized == linear
    assert len(quantized) == 2 * len(TARGETS)


@pytest.mark.parametrize(("name", "double_quant"), [("qwen2vl_tiny", False), *((f, True) for f in FAMILIES)])
def test_qlora_computes_with_the_rounded_weights(name, double_quant):
    """The same to 1e-5 as a model with the dequantised weights. Against full precision the bound is that of
    the format: a block of 64 Gaussian weights keeps all but about 9% of its norm in NF4, and here two layers
    add up, each with two roundings between input and residual stream; more where each branch is normalised
    before it is added (PaliGemma 2), less where large embeddings pass by (Florence-2)."""
    full, vlm, rounded = backbone(name), backbone(name), backbone(name)
    qlora(vlm=vlm, double_quant=double_quant)
    with torch.no_grad():
        for layer, module in vlm.model.named_modules():
            if is_quantized(module):
                own = rounded.model.get_submodule(layer.removesuffix(".base_layer"))
                own.weight.copy_(full_weight(module))
    vlm.eval()
    torch.testing.assert_close(outputs(vlm), outputs(rounded), atol=1e-5, rtol=1e-5)
    error = (outputs(vlm) - outputs(full)).norm() / outputs(full).norm()
    assert 0.001 < error < (0.3 if name == "paligemma2_tiny" else 0.2)
    assert all(".lora_" in name for name in trainable(vlm))
    read(vlm).hidden.square().mean().backward()
    assert {name for name, parameter in vlm.named_parameters() if parameter.grad is not None} == trainable(
        vlm
    )


def test_gradients_pass_through_four_bits_after_an_evaluation():
    """The same gradient as with ordinary weights of the same values, also once the model has evaluated."""
    vlm, plain = backbone(), backbone()
    qlora(vlm=vlm)
    train_a_little(vlm)
    lora(vlm=plain)
    train_a_little(plain)
    own = dict(vlm.model.named_modules())
    with torch.no_grad():
        for name, module in plain.model.named_modules():
            if isinstance(module, LoraLayer):
                module.base_layer.weight.copy_(full_weight(own[name].base_layer))
                module.lora_A.load_state_dict(own[name].lora_A.state_dict())
    outputs(vlm.eval())
    for model in (vlm, plain):
        read(model.train()).hidden.square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name in trainable(vlm):
        torch.testing.assert_close(
            vlm.get_parameter(name).grad, theirs[name].grad, atol=1e-6, rtol=1e-3, msg=name
        )


@pytest.mark.parametrize("dora", [False, True])
def test_merging_four_bits_gives_an_ordinary_model(tmp_path, dora):
    vlm = backbone()
    qlora(vlm=vlm, dora=dora)
    expected = outputs(train_a_little(vlm.eval()))
    save_merged(vlm, tmp_path / "merged")
    assert not any(is_quantized(module) for module in vlm.modules())
    torch.testing.assert_close(outputs(vlm), expected, atol=1e-5, rtol=0)
    again = backbone(checkpoint=str(tmp_path / "merged"), pretrained=True)
    torch.testing.assert_close(outputs(again), expected, atol=1e-5, rtol=0)


def test_an_adapter_loads_onto_four_bits(tmp_path):
    vlm = backbone()
    qlora(vlm=vlm)
    save_adapter(train_a_little(vlm.eval()), tmp_path / "adapter")
    again = backbone()
    quantize(again)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again.eval()), outputs(vlm))
