"""Learned action tokens: residual vector quantisation of whole chunks (VQ-BeT, Lee et al. 2024, section 3.2).

    z = encoder(chunk)                           a perceptron over all numbers of the chunk
    r_0 = z,  r_q = r_(q-1) - e_q[c_q]           c_q: the nearest of codebook q's vectors to r_(q-1)
    chunk' = decoder(e_1[c_1] + e_2[c_2] + ...)  tokens are c_1, c_2, ...: coarse first
    loss = |chunk - chunk'| + commitment * sum_q ||r_(q-1) - sg(e_q[c_q])||^2

Encoder, decoder and codebooks are learned from the dataset's chunks by `fit`, before the policy is trained,
and then stay. A chunk takes as many tokens as there are codebooks, whatever its length, and no more than
num_codes ** num_quantizers chunks can be said: VQ-BeT itself adds a continuous correction to the decoded one,
which is a policy's business and not a tokenizer's.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot.nn.vector_quantizer import ResidualQuantizer, perplexity
from librobot.progress import ProgressBar

FILE = "vq.json"
RESTARTS = 0.8
"""The share of training in which unused codes begin again; the rest learns with those that there are."""


class VQ:
    """Token `q * num_codes + c` is code c of codebook q; there is no stop token.

    num_train_steps, batch_size, lr: of the autoencoder's training, by Adam with the rate falling to 0 as a
    cosine; seed fixes all of it. `perplexity` (of each codebook) and `error` (the mean absolute one) are
    those of the chunks that it was fitted to.
    """

    mixes = True
    network: Autoencoder | None = None

    def __init__(
        self,
        *,
        num_quantizers: int = 2,
        num_codes: int = 16,
        latent_dim: int = 256,
        mlp_width: int = 128,
        commitment: float = 5.0,
        decay: float = 0.8,
        num_train_steps: int = 3000,
        batch_size: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_quantizers", num_quantizers, 1),
            ("num_codes", num_codes, 2),
            ("latent_dim", latent_dim, 1),
            ("mlp_width", mlp_width, 1),
            ("num_train_steps", num_train_steps, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if commitment <= 0 or lr <= 0:
            raise ValueError(f"commitment and lr must be above 0, found commitment={commitment}, lr={lr}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, found {decay}")
        self.num_quantizers, self.num_codes = num_quantizers, num_codes
        self.latent_dim, self.mlp_width = latent_dim, mlp_width
        self.commitment, self.decay = commitment, decay
        self.num_train_steps, self.batch_size, self.lr, self.seed = num_train_steps, batch_size, lr, seed
        self.perplexity: list[float] = []
        self.error = float("nan")

    @property
    def fitted(self) -> bool:
        return self.network is not None

    @property
    def vocabulary(self) -> int:
        return self.num_quantizers * self.num_codes

    @property
    def max_tokens(self) -> int:
        return self.num_quantizers

    def attach(self, *, horizon: int, action_dim: int) -> None:
        self.horizon, self.action_dim = horizon, action_dim

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        """Train the autoencoder, on this machine's processor. Raises ValueError for chunks of another shape,
        or with values that are not finite."""
        chunks = self._flat(actions).cpu()
        if not len(chunks) or not chunks.isfinite().all():
            raise ValueError(
                f"the VQ tokenizer is fitted to chunks of finite numbers, found {len(chunks)} chunks"
                + (" with others among them" if len(chunks) else "")
            )
        draw = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            torch.manual_seed(self.seed)
            network = self._new()
            optimizer = torch.optim.Adam(network.parameters(), self.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_train_steps)
            with torch.no_grad():
                network.quantizer.start(network.encoder(batch_of(chunks, self.batch_size, draw)), draw)
            with ProgressBar("fitting VQ action tokens", self.num_train_steps) as bar:
                for step in range(self.num_train_steps):
                    batch = batch_of(chunks, self.batch_size, draw)
                    z = network.encoder(batch)
                    quantized = network.quantizer(z)
                    error = (network.decoder(quantized.values) - batch).abs().mean()
                    optimizer.zero_grad()
                    (error + self.commitment * quantized.loss).backward()
                    optimizer.step()
                    schedule.step()
                    restart = step < RESTARTS * self.num_train_steps
                    network.quantizer.learn(z.detach(), draw, restart=restart)
                    if step + 1 == self.num_train_steps:
                        self._measure(network, chunks)
                        used = ", ".join(f"{x:.1f}" for x in self.perplexity)
                        bar.advance(
                            note=f"error {self.error:.3g}, perplexity {used} of {self.num_codes} codes"
                        )
                    else:
                        bar.advance(note=f"error {error.item():.3g}")
        self.network = network.requires_grad_(False)

    def encode(self, actions: Float[Tensor, "b k a"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Raises ValueError for chunks of another shape than those that were fitted."""
        flat = self._flat(actions)
        network = self._network(flat.device)
        with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
            codes = network.quantizer.encode(network.encoder(flat))
        ids = codes + self.num_codes * torch.arange(self.num_quantizers, device=codes.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def decode(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b k a"]:
        """A token that is missing, or stands in another codebook's place, adds nothing; surplus ones are cut
        off."""
        network = self._network(ids.device)
        count = min(ids.shape[1], self.num_quantizers)
        codes = ids.new_zeros(len(ids), self.num_quantizers)
        known = torch.zeros_like(codes, dtype=torch.bool)
        codes[:, :count], known[:, :count] = ids[:, :count], mask[:, :count]
        codes = codes - self.num_codes * torch.arange(self.num_quantizers, device=codes.device)
        known &= (codes >= 0) & (codes < self.num_codes)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            flat = network.decoder(network.quantizer.decode(codes.clamp(0, self.num_codes - 1), known))
        return rearrange(flat, "b (k a) -> b k a", a=self.action_dim)

    def constrain(self, count: int, device: torch.device) -> InTurn:
        return InTurn(count, self.num_quantizers, self.num_codes, device)

    def files(self) -> dict[str, str]:
        """Sizes and weights as JSON; none before the tokens are known."""
        if self.network is None:
            return {}
        weights = {
            name: base64.b64encode(value.cpu().numpy().astype("<f4").tobytes()).decode("ascii")
            for name, value in self.network.state_dict().items()
        }
        measured = {"perplexity": self.perplexity, "error": self.error}
        return {FILE: json.dumps({"sizes": self._sizes(), "measured": measured, "weights": weights})}

    def restore(self, files: Mapping[str, str]) -> None:
        """Raises ValueError where the files hold a tokenizer of other sizes."""
        if FILE not in files:
            return
        held = json.loads(files[FILE])
        for name, size in self._sizes().items():
            if held["sizes"][name] != size:
                raise ValueError(
                    f"the VQ tokenizer that was fitted has {name}={held['sizes'][name]}, and this policy has "
                    f"{size}; take the same head.tokenizer, horizon and robot"
                )
        network = self._new()
        network.load_state_dict(
            {
                name: torch.from_numpy(
                    np.frombuffer(base64.b64decode(held["weights"][name]), "<f4").reshape(own.shape).copy()
                )
                for name, own in network.state_dict().items()
            }
        )
        self.network = network.requires_grad_(False)
        self.perplexity, self.error = held["measured"]["perplexity"], held["measured"]["error"]

    def _measure(self, network: Autoencoder, chunks: Float[Tensor, "n m"]) -> None:
        """What is lost of the chunks, and how evenly they use the codes."""
        with torch.no_grad():
            parts = [(part, network.quantizer(network.encoder(part))) for part in chunks.split(4096)]
            lost = sum(float((network.decoder(q.values) - part).abs().sum()) for part, q in parts)
        codes = torch.cat([quantized.codes for _, quantized in parts])
        self.error = lost / chunks.numel()
        self.perplexity = [perplexity(column, self.num_codes).item() for column in codes.unbind(-1)]

    def _flat(self, actions: Float[Tensor, "b k a"]) -> Float[Tensor, "b m"]:
        expected = (self.horizon, self.action_dim)
        if tuple(actions.shape[1:]) != expected:
            raise ValueError(
                f"the VQ tokenizer is made for chunks of {expected[0]} actions of {expected[1]} dimensions, "
                f"found chunks of shape {tuple(actions.shape[1:])}; fit another one for them"
            )
        return rearrange(actions.detach().float(), "b k a -> b (k a)")

    def _sizes(self) -> dict[str, Any]:
        names = ("horizon", "action_dim", "num_quantizers", "num_codes", "latent_dim", "mlp_width")
        return {name: getattr(self, name) for name in names}

    def _new(self) -> Autoencoder:
        quantizer = ResidualQuantizer(self.num_quantizers, self.num_codes, self.latent_dim, decay=self.decay)
        return Autoencoder(self.horizon * self.action_dim, self.mlp_width, quantizer, self.latent_dim)

    def _network(self, device: torch.device) -> Autoencoder:
        if self.network is None:
            raise ValueError(
                "The VQ tokenizer has to be fitted before it is used, and it was not; librobot-train does it "
                "before training"
            )
        if self.network.quantizer.codebooks.device != device:
            self.network.to(device)
        return self.network


class Autoencoder(nn.Module):
    """VQ-BeT's: perceptrons with two hidden layers on both sides of the codebooks."""

    def __init__(self, size: int, mlp_width: int, quantizer: ResidualQuantizer, latent_dim: int) -> None:
        super().__init__()
        self.encoder = perceptron(size, mlp_width, latent_dim)
        self.quantizer = quantizer
        self.decoder = perceptron(latent_dim, mlp_width, size)


class InTurn:
    """Any code of the first codebook, then any of the second, and so on."""

    def __init__(self, count: int, num_quantizers: int, num_codes: int, device: torch.device) -> None:
        self.step, self.num_quantizers = 0, num_quantizers
        self.codebook = torch.arange(num_quantizers * num_codes, device=device) // num_codes
        self.done = torch.zeros(count, dtype=torch.bool, device=device)

    def allowed(self) -> Bool[Tensor, "b v"]:
        turn = min(self.step, self.num_quantizers - 1)
        return (self.codebook == turn).expand(len(self.done), -1)

    def advance(self, tokens: Int[Tensor, " b"]) -> None:
        self.step += 1
        self.done = torch.full_like(self.done, self.step >= self.num_quantizers)


def perceptron(size_in: int, width: int, size_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size_out)
    )


def batch_of(
    chunks: Float[Tensor, "n m"], count: int, generator: torch.Generator
) -> Float[Tensor, "count m"]:
    return chunks[torch.randint(len(chunks), (count,), generator=generator)]
