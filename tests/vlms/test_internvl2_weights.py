"""InternVL2's published layout: what a converted checkpoint computes, against its definition."""

import json

import pytest
import torch
from internvl2_published import (
    ADDED,
    FIRST_WORD,
    HEAD_DIM,
    WORDS,
    internlm2,
    observe,
    picture_features,
    publish,
    published_config,
    published_weights,
    tiny_node,
)

from librobot.errors import LibrobotError
from librobot.nn.pretrained import skip_pretrained, unread_weights, weightless
from librobot.vlms.internvl import InternVL2, InternVL3


@pytest.fixture
def published(tmp_path):
    return publish(tmp_path)


# The definition, from the published tensors alone.


@torch.no_grad()
def test_the_published_layout_computes_what_its_definition_says(published):
    w = {name: tensor.double() for name, tensor in published_weights().items()}
    vlm = InternVL2(checkpoint=published).eval()
    observation = observe(vlm)
    context = vlm(observation, layers=(0, 1, -1))
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    for row in range(2):
        pixels = torch.cat([image[row] for image in observation.images.values()]).double() / 255
        features = picture_features(w, (pixels - mean[:, None, None]) / std[:, None, None])
        ids = observation.inputs["input_ids"][row][context.mask[row]]
        x = w["language_model.model.tok_embeddings.weight"][ids]
        x[ids == ADDED["<IMG_CONTEXT>"]] = features.flatten(0, 1)
        hidden, keys = internlm2(w, x)
        for found, expected in zip(context.layers, hidden, strict=True):
            torch.testing.assert_close(found[row, : len(ids)].double(), expected, atol=1e-5, rtol=0)
        for found, expected in zip(context.keys, keys, strict=True):
            torch.testing.assert_close(found[row, :, : len(ids)].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(vlm.model.lm_head.weight.double(), w["language_model.output.weight"])


def test_the_published_tokenizer(published):
    vlm = InternVL2(checkpoint=published)
    word = {text: FIRST_WORD + i for i, text in enumerate(WORDS)}
    ids = vlm.tokenizer("<s>open the\n<|im_end|>é", add_special_tokens=False)["input_ids"]
    newline, accent = 3 + 0x0A, [3 + 0xC3, 3 + 0xA9]
    assert ids == [1, word["open"], word["▁the"], newline, ADDED["<|im_end|>"], *accent]
    assert vlm.tokenizer.decode(ids, skip_special_tokens=True) == "open the\né"
    assert vlm.tokenizer.pad_token_id == vlm.tokenizer.eos_token_id == 2
    made = vlm.processor(["open"], {"front": torch.zeros(1, 1, 3, 56, 56)})
    assert made["input_ids"][0, 0] == 1
    assert (made["input_ids"] == ADDED["<IMG_CONTEXT>"]).sum() == 4
    assert vlm.model.generation_config.eos_token_id == ADDED["<|im_end|>"]


def test_a_fast_tokenizer_in_the_published_folder_is_taken(published, tmp_path):
    made = InternVL2(checkpoint=published)
    made.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    again = InternVL2(checkpoint=published)
    text = again.template.text("open the", 2)
    assert again.tokenizer(text)["input_ids"] == made.tokenizer(text)["input_ids"]


def test_published_internvl3(tmp_path):
    """Qwen2's names are transformers' own; its tokenizer is read without code from the folder."""
    w = published_weights("qwen2")
    folder = publish(tmp_path, w, published_config("Qwen2ForCausalLM"))
    (tmp_path / "tokenizer.model").unlink()
    letters = InternVL3(**tiny_node("internvl3_tiny")).tokenizer.get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for t, i in letters.items() if i < 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    listed = {str(256 + i): {"content": token, "special": True} for i, token in enumerate(special)}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": listed,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vlm = InternVL3(checkpoint=folder).eval()
    attention = vlm.blocks[1].self_attn
    start = "language_model.model.layers.1.self_attn."
    for name in ("q_proj.weight", "k_proj.bias", "o_proj.weight"):
        assert torch.equal(attention.get_parameter(name), w[start + name])
    assert vlm.model.config.image_token_id == vlm.processor.image_token_id == 261
    with torch.no_grad():
        assert vlm(observe(vlm)).hidden.isfinite().all()


@torch.no_grad()
def test_a_published_model_is_saved_in_transformers_layout(published, tmp_path_factory):
    vlm = InternVL2(checkpoint=published, num_layers=1).eval()
    folder = str(tmp_path_factory.mktemp("native"))
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(folder)
    again = InternVL2(checkpoint=folder).eval()
    observation = observe(vlm)
    made = again.processor(observation.prompt, observation.images)
    assert torch.equal(made["input_ids"], observation.inputs["input_ids"])
    assert torch.equal(again(observation).hidden, vlm(observation).hidden)
    with skip_pretrained(vlm.files()):
        stored = InternVL2(checkpoint="not/there").eval()
    stored.load_state_dict(vlm.state_dict())
    assert torch.equal(stored(observation).hidden, vlm(observation).hidden)


def test_weights_that_stay_in_their_files(published):
    """Cut from the published, fused tensors when they are read."""
    whole = dict(InternVL2(checkpoint=published, dtype="bfloat16").model.named_parameters())
    with weightless(), unread_weights():
        unread = dict(InternVL2(checkpoint=published, dtype="bfloat16").model.named_parameters())
    assert unread.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(unread[name].read((slice(1, None),)), value[1:]), name


def test_half_precision(published):
    vlm = InternVL2(checkpoint=published, dtype="bfloat16")
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    fused = published_weights()["language_model.model.layers.0.attention.wqkv.weight"]
    expected = fused[2 * HEAD_DIM : 3 * HEAD_DIM].bfloat16()
    assert torch.equal(vlm.blocks[0].self_attn.k_proj.weight[:HEAD_DIM], expected)


# What is wrong with a folder.


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(published_config() | changes))


def test_wrong_checkpoints_are_named(published, tmp_path):
    with pytest.raises(LibrobotError, match=r"of type llama.*internvl3"):
        InternVL3(checkpoint=published)
    change_config(tmp_path, ps_version="v1")
    with pytest.raises(LibrobotError, match=r"ps_version .* must be 'v2', found 'v1'"):
        InternVL2(checkpoint=published)
    change_config(tmp_path, llm_config={"architectures": ["Phi3ForCausalLM"]})
    with pytest.raises(LibrobotError, match="the language model is Phi3ForCausalLM"):
        InternVL2(checkpoint=published)
    change_config(tmp_path, llm_config=published_config()["llm_config"] | {"num_key_value_heads": 4})
    with pytest.raises(LibrobotError, match=r"wqkv.weight has 64 rows, .* multiple of 24"):
        InternVL2(checkpoint=published)


def test_incomplete_checkpoints_are_named(tmp_path):
    weights = published_weights()
    weights["extra.weight"] = weights.pop("mlp1.3.bias")
    folder = publish(tmp_path, weights)
    with pytest.raises(LibrobotError, match=r"linear_2\.bias; without a place: extra\.weight"):
        InternVL2(checkpoint=folder)
    changed = published_config()["llm_config"] | {"intermediate_size": 50}
    change_config(tmp_path, llm_config=changed)
    with pytest.raises(LibrobotError, match=r"w1\.weight gives .*gate_proj.* \(48, 32\), .* \(50, 32\)"):
        InternVL2(checkpoint=folder)
    change_config(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LibrobotError, match=r"no model-00002-of-00002\.safetensors"):
        InternVL2(checkpoint=folder)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(LibrobotError, match=r"not a SentencePiece model"):
        InternVL2(checkpoint=folder)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(LibrobotError, match=r"no tokenizer; expected"):
        InternVL2(checkpoint=folder)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(LibrobotError, match=r"no token <IMG_CONTEXT>"):
        InternVL2(checkpoint=folder)
