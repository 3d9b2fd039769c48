"""A real, small vision-language model that starts from random weights and trains on a CPU.

Layout as in PaliGemma: each camera's visual tokens, then the prompt's bytes, one causal language model over
all of them, whose prefix attends in both directions by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.errors import LibrobotError
from librobot.nn.attention import Angles, Attention, GatedMLP, block_mask, block_plan, with_self
from librobot.nn.positions import age_embedding, rotary_angles
from librobot.nn.text import BOS, NUM_BYTE_TOKENS, PAD, ByteEmbedding, ByteEncoder, ByteTokenizer
from librobot.nn.vision import KeypointTower, Tower
from librobot.types import Observation
from librobot.vlms.base import VLM, Context, Geometry, Vocabulary, extension
from librobot.vlms.packed import PackedSamples


class Block(nn.Module):
    """Pre-norm transformer block: RMSNorm, grouped-query attention, SwiGLU (as in Llama)."""

    tensor_plan = block_plan()

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads, num_kv_heads, width // num_heads)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = GatedMLP(width, mlp_width)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        angles: Angles,
        mask: Bool[Tensor, "b l m"],
        before: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b h m e"], Float[Tensor, "b h m e"]]:
        """The block's output, and the keys and values that it attended to: those `before`, and its own."""
        keys, values = self.keys_values(x, angles)
        if before is not None:
            keys, values = torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)
        x = x + self.attention(self.attention_norm(x), angles, keys, values, mask)
        return x + self.mlp(self.mlp_norm(x)), keys, values

    def keys_values(
        self, x: Float[Tensor, "b l d"], angles: Angles
    ) -> tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]:
        return self.attention.keys_values(self.attention_norm(x), angles)


class TinyVLM(VLM):
    """Vision tower, byte tokenizer and language model (the `vlm=tiny` option).

    `tower` is a factory `tower(width=...)` (see `librobot.nn.vision`), called once, or, with
    `tower_per_camera`, once for each of `max_cameras`; pictures of any size are resized to `image_size` on
    the device. `bytes_per_token` neighbouring bytes of the prompt make one token of the language model.
    `prefix_attention` is `bidirectional` (pi0, PaliGemma) or `causal`.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        mlp_width: int = 256,
        rope_theta: float = 10_000.0,
        image_size: int = 64,
        max_prompt_tokens: int = 96,
        bytes_per_token: int = 1,
        max_cameras: int = 8,
        prefix_attention: Literal["bidirectional", "causal"] = "bidirectional",
        tower: Callable[..., Tower] = KeypointTower,
        tower_per_camera: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, found {hidden_size} and {num_heads}"
            )
        if prefix_attention not in ("bidirectional", "causal"):
            raise ValueError(f"prefix_attention is bidirectional or causal, found {prefix_attention!r}")
        self.hidden_size = hidden_size
        self.geometry = Geometry(num_layers, num_heads, num_kv_heads, hidden_size // num_heads, rope_theta)
        self.processor = ByteTokenizer(max_tokens=max_prompt_tokens)
        self.image_size = image_size
        self.causal = prefix_attention == "causal"
        num_towers = max_cameras if tower_per_camera else 1
        self.towers = nn.ModuleList(tower(width=hidden_size) for _ in range(num_towers))
        text_width = tower_of(self.towers, 0).text_width
        self.sentence = ByteEncoder(text_width) if text_width else None
        self.camera_embedding = nn.Embedding(max_cameras, hidden_size)
        self.text = ByteEmbedding(hidden_size, bytes_per_token)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, num_kv_heads, mlp_width) for _ in range(num_layers)
        )
        self.final_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        nn.init.normal_(self.camera_embedding.weight, std=0.5)

    def forward(self, observation: Observation, *, layers: Sequence[int] = (-1,)) -> Context:
        x, mask = self.embed(observation)
        positions = mask.cumsum(dim=1) - 1
        blocks = torch.arange(x.shape[1], device=x.device) if self.causal else torch.zeros_like(positions[0])
        blocks = blocks.expand_as(positions)
        visible = with_self(block_mask(blocks, blocks, mask))
        angles = rotary_angles(positions, self.geometry.head_dim, self.geometry.rope_theta)

        wanted = self._indices(layers)
        states: dict[int, Tensor] = {0: x}
        cache = []
        for index, block in enumerate(self.blocks, start=1):
            if index == len(self.blocks) and index not in wanted:
                assert isinstance(block, Block)
                cache.append(block.keys_values(x, angles))
                break
            x, keys, values = block(x, angles, visible)
            cache.append((keys, values))
            states[index] = x
        if len(self.blocks) in wanted:
            states[len(self.blocks)] = x = self.final_norm(x)

        hidden = tuple(states[index] for index in wanted)
        return Context(
            hidden=hidden[-1] if hidden else x,
            layers=hidden,
            keys=tuple(keys for keys, _ in cache),
            values=tuple(values for _, values in cache),
            mask=mask,
            next_position=mask.sum(dim=1),
            pictures=self._pictures(observation, mask),
        )

    def embed(self, observation: Observation) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        """The prefix before the first block: visual tokens by camera, then the prompt; and which are real."""
        if observation.inputs is None:
            raise LibrobotError("TinyVLM needs observation.inputs: what its processor made of the prompts")
        text, text_mask = self.text(observation.inputs["tokens"], observation.inputs["token_mask"])
        if not observation.images:
            return text, text_mask
        visual, visual_mask = self._embed_images(observation)
        return torch.cat((visual, text), dim=1), torch.cat((visual_mask, text_mask), dim=1)

    @property
    def vocabulary(self) -> Vocabulary:
        """Bytes; what fills a prompt up ends a text."""
        return Vocabulary(
            size=NUM_BYTE_TOKENS,
            num_text=PAD,
            begin=BOS,
            end=PAD,
            space=ord(" "),
            tokenize=lambda text: list(text.encode()),
            detokenize=lambda ids: bytes(id for id in ids if id < PAD).decode(errors="replace"),
        )

    def prompts_as_written(self, max_tokens: int) -> ByteTokenizer:
        return ByteTokenizer(max_tokens=max_tokens)

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Of single bytes, whatever `bytes_per_token` makes of a prompt's."""
        return self.text.table(ids)

    def extend(
        self,
        context: Context,
        x: Float[Tensor, "b q d"],
        *,
        sees: Bool[Tensor, "#b q q"] | None = None,
        real: Bool[Tensor, "b q"] | None = None,
    ) -> Context:
        mask, positions, all_real = extension(context, x.shape[1], sees, real)
        angles = rotary_angles(positions, self.geometry.head_dim, self.geometry.rope_theta)
        keys, values = [], []
        for block, before_keys, before_values in zip(self.blocks, context.keys, context.values, strict=True):
            x, all_keys, all_values = block(x, angles, mask, (before_keys, before_values))
            keys.append(all_keys)
            values.append(all_values)
        return Context(
            hidden=self.final_norm(x),
            layers=(),
            keys=tuple(keys),
            values=tuple(values),
            mask=all_real,
            next_position=positions[:, -1] + 1,
        )

    cannot_pack = None

    def read_packed(
        self,
        observation: Observation,
        x: Float[Tensor, "b q d"],
        real: Bool[Tensor, "b q"],
        *,
        length: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        prefix, mask = self.embed(observation)
        samples = PackedSamples(mask, real, causal=self.causal, length=length)
        positions = samples.positions(mask.cumsum(dim=1) - 1, mask.sum(dim=1))
        angles = rotary_angles(positions, self.geometry.head_dim, self.geometry.rope_theta)
        hidden, visible = samples.join(prefix, x), samples.visible()
        for block in self.blocks:
            hidden, _, _ = block(hidden, angles, visible)
        return samples.answers(self.final_norm(hidden))

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Next-byte logits of normed hidden states; the output weights are the embedding's (tied)."""
        return functional.linear(hidden, self.text.table.weight)

    def unused_parameters(self, layers: Sequence[int], *, logits: bool = False) -> list[nn.Parameter]:
        if logits or len(self.blocks) in self._indices(layers):
            return []
        last = self.blocks[-1]
        assert isinstance(last, Block)
        parts = (last.attention.q_proj, last.attention.o_proj, last.mlp_norm, last.mlp, self.final_norm)
        return [parameter for part in parts for parameter in part.parameters()]

    def _embed_images(self, observation: Observation) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        names = list(observation.images)
        if len(names) > self.camera_embedding.num_embeddings:
            raise LibrobotError(
                f"vlm=tiny has embeddings for {self.camera_embedding.num_embeddings} cameras, found "
                f"{len(names)}: {', '.join(names)}; raise vlm.max_cameras"
            )
        pixels = torch.stack([self._resize(image) for image in observation.images.values()], dim=1)
        n, t = pixels.shape[1:3]
        sentence = None
        if self.sentence is not None:
            assert observation.inputs is not None
            sentence = self.sentence(observation.inputs["tokens"], observation.inputs["token_mask"])
        if len(self.towers) == 1:
            tokens = self._look(tower_of(self.towers, 0), pixels, sentence)
        else:
            views = [self._look(tower_of(self.towers, i), pixels[:, i : i + 1], sentence) for i in range(n)]
            tokens = torch.cat(views, dim=1)
        tokens = tokens + self.camera_embedding.weight[:n, None, None]
        tokens = tokens + age_embedding(t, self.hidden_size).to(tokens)[:, None]
        present = torch.stack([observation.image_mask[name] for name in names], dim=1)
        mask = repeat(present, "b n -> b (n t v)", t=t, v=tokens.shape[3])
        return rearrange(tokens, "b n t v d -> b (n t v) d"), mask

    def _pictures(self, observation: Observation, mask: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """Which tokens of the prefix stand for pictures: all but the prompt's at its end."""
        assert observation.inputs is not None
        num_text = -(-observation.inputs["tokens"].shape[1] // self.text.stride)
        place = torch.arange(mask.shape[1], device=mask.device)
        return (place < mask.shape[1] - num_text).expand_as(mask)

    def _look(
        self, tower: Tower, pixels: Float[Tensor, "b n t c h w"], sentence: Float[Tensor, "b e"] | None
    ) -> Float[Tensor, "b n t v d"]:
        """Visual tokens of every picture, each told the instruction."""
        b, n, t = pixels.shape[:3]
        if sentence is not None:
            sentence = repeat(sentence, "b e -> (b n t) e", n=n, t=t)
        tokens = tower(rearrange(pixels, "b n t c h w -> (b n t) c h w"), sentence)
        return rearrange(tokens, "(b n t) v d -> b n t v d", b=b, n=n, t=t)

    def _resize(self, image: Tensor) -> Float[Tensor, "b t c h w"]:
        """uint8, or floats in [0, 1], of any size to [-1, 1] at the model's size."""
        b, size = image.shape[0], (self.image_size, self.image_size)
        pixels = rearrange(image, "b t c h w -> (b t) c h w").float()
        if image.is_floating_point():
            pixels = pixels * 255.0
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        pixels = (pixels / 127.5 - 1.0).to(self.text.table.weight.dtype)
        return rearrange(pixels, "(b t) c h w -> b t c h w", b=b)

    def _indices(self, layers: Sequence[int]) -> list[int]:
        """Layer numbers from 0 (embedded input) to the number of blocks; negative ones count from the end."""
        count = len(self.blocks) + 1
        for layer in layers:
            if not -count <= layer < count:
                raise ValueError(f"vlm=tiny has hidden states 0 to {count - 1} (or negative), found {layer}")
        return [layer % count for layer in layers]


def tower_of(towers: nn.ModuleList, index: int) -> Tower:
    tower = towers[index]
    assert isinstance(tower, Tower)
    return tower
