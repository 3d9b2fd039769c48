"""Action tokens, predicted one after another by a causal network.

    loss = mean over tokens j of -log p(token_j | tokens before it, context)

RT-2 (Brohan et al. 2023) and OpenVLA (Kim et al. 2024) do this with bins, pi0-FAST (Pertsch et al. 2025) with
FAST tokens. Tokens are sampled by inverting their cumulative distribution, so that noise fixes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from librobot.heads.base import ActionHead, Decoder, Mask, NetworkKind, hold_last
from librobot.losses import note
from librobot.tokenizers.base import ActionTokenizer
from librobot.tokenizers.written import padded_weights

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Autoregressive(ActionHead):
    """The decoder predicts the tokens that `tokenizer` makes of a chunk.

    `temperature` divides the logits when sampling; 0 takes the likeliest token each time.
    `label_smoothing` spreads that share of each target over the whole vocabulary. `dim_weights` needs tokens
    that stand for one dimension each, as bins do.
    """

    network: ClassVar[NetworkKind] = "decoder"
    generative: ClassVar[bool] = False

    def __init__(
        self,
        *,
        tokenizer: ActionTokenizer,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        dim_weights: Sequence[float] | None = None,
        drop_context: float = 0.0,
    ) -> None:
        super().__init__(dim_weights=dim_weights, drop_context=drop_context)
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, found {temperature}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, found {label_smoothing}")
        if dim_weights is not None and tokenizer.mixes:
            raise ValueError(
                f"dim_weights must be null with {type(tokenizer).__name__}, whose tokens mix dimensions, "
                f"found {list(dim_weights)}; take head=bins to weight dimensions"
            )
        self.tokenizer = tokenizer
        self.temperature, self.label_smoothing = temperature, label_smoothing

    @property
    def stochastic(self) -> bool:
        return self.temperature > 0

    def attach(self, *, horizon: int, action_dim: int, real_dim: int | None = None) -> None:
        super().attach(horizon=horizon, action_dim=action_dim, real_dim=real_dim)
        self.tokenizer.attach(horizon=horizon, action_dim=action_dim)

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.max_tokens

    @property
    def needs_fit(self) -> bool:
        return not self.tokenizer.fitted

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        self.tokenizer.fit(actions)

    def files(self) -> dict[str, str]:
        return self.tokenizer.files()

    def restore(self, files: Mapping[str, str]) -> None:
        self.tokenizer.restore(files)

    def loss(
        self,
        network: Decoder,
        context: Any,
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        *,
        noise: Float[Tensor, "b k a"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        """The mean cross-entropy of a sample's tokens: of bins, those whose number `mask` admits; of tokens
        that mix numbers, all of them. `noise` and `time` have nothing to act on."""
        context = self.training_context(context, len(actions))
        tokens, real = self.tokenizer.encode(hold_last(actions, mask))
        logits = logits_of_real(network, tokens, real, context).float()
        of_real = functional.cross_entropy(
            logits, tokens[real], reduction="none", label_smoothing=self.label_smoothing
        )
        error = of_real.new_zeros(tokens.shape).masked_scatter(real, of_real)
        self._note(error, actions, mask)
        weights = real * self._token_weights(mask, actions)
        total = weights.sum(dim=1)
        return (error * weights).sum(dim=1) / torch.where(total > 0, total, 1.0)

    def sample(
        self,
        network: Decoder,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        """Token j is drawn at the quantile Phi(noise_j), noise flattened as the chunk is. Tokens beyond the
        k * a numbers of a chunk take the same quantiles again, shifted by the golden ratio (modulo 1) each
        time round, which keeps them uniform. `num_steps` has nothing to act on."""
        quantiles = None
        if self.stochastic:
            noise = self.draw_noise(shape) if noise is None else noise
            quantiles = torch.special.ndtr(rearrange(noise.float(), "b k a -> b (k a)"))
        following = self._begin(network, context, shape[0], guidance)
        constraint = self.tokenizer.constrain(shape[0], self.anchor.device)
        tokens: Tensor | None = None
        chosen: list[Tensor] = []
        real: list[Tensor] = []
        while len(chosen) < self.max_tokens and not bool(constraint.done.all()):
            logits = following(tokens).float().masked_fill(~constraint.allowed(), -math.inf)
            tokens = self._choose(logits, quantiles, len(chosen))
            chosen.append(tokens)
            real.append(~constraint.done)
            constraint.advance(tokens)
        return self.tokenizer.decode(torch.stack(chosen, dim=1), torch.stack(real, dim=1))

    def _choose(
        self, logits: Float[Tensor, "b v"], quantiles: Float[Tensor, "b m"] | None, index: int
    ) -> Int[Tensor, " b"]:
        if quantiles is None:
            return logits.argmax(dim=-1)
        rounds, column = divmod(index, quantiles.shape[1])
        quantile = (quantiles[:, column] + rounds * GOLDEN_RATIO) % 1.0 if rounds else quantiles[:, column]
        cumulative = (logits / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1]
        # Strictly below the last step, which rounding may place on either side of 1: beyond it lie only
        # tokens without probability.
        level = torch.minimum(quantile * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, level[:, None], right=True).squeeze(1)

    def _begin(
        self, network: Decoder, context: Any, count: int, guidance: float | None
    ) -> Callable[[Tensor | None], Tensor]:
        """The decoder's state, or with guidance that of two, whose logits are extrapolated."""
        given = network.begin(context)
        if guidance is None or guidance == 1.0:
            return given
        if not self.drop_context:
            raise ValueError(
                f"{type(self).__name__}: guidance={guidance:g} needs a network that was trained with "
                f"drop_context above 0, found 0; train with head.drop_context=0.1"
            )
        everyone = torch.ones(count, dtype=torch.bool, device=self.anchor.device)
        hidden = network.begin(self._droppable(context).dropped(everyone))

        def extrapolated(tokens: Tensor | None) -> Tensor:
            without = hidden(tokens)
            return without + guidance * (given(tokens) - without)

        return extrapolated

    def _note(self, error: Float[Tensor, "b l"], actions: Float[Tensor, "b k a"], mask: Mask) -> None:
        """Each number's cross-entropy, where somebody looks at parts of the loss; none of mixed ones."""
        if self.tokenizer.mixes:
            return
        first, _ = getattr(self.tokenizer, "around", (0, 0))
        count = actions[0].numel()
        visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
        note(error[:, first : first + count].reshape(actions.shape), visible)

    def _token_weights(
        self, mask: Mask, actions: Float[Tensor, "b k a"]
    ) -> Float[Tensor, "b l"] | Float[Tensor, "b 1"]:
        """How much each token counts: one weight for all of a sample's tokens where they mix numbers."""
        visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
        if self.tokenizer.mixes:
            return visible.flatten(1).any(dim=1, keepdim=True).float()
        weights = visible.float() if self.dim_weights is None else visible * self.dim_weights.float()
        flat = rearrange(weights, "b k a -> b (k a)")
        around = getattr(self.tokenizer, "around", None)  # words of a language model, before and behind
        return flat if around is None else padded_weights(flat, around)


def logits_of_real(
    network: Decoder, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], context: Any
) -> Float[Tensor, "n v"]:
    """Logits of the real tokens, sample by sample: none of padding, which a vocabulary makes dear."""
    of_real: Any = getattr(network, "of_real", None)
    return network(tokens, context)[real] if of_real is None else of_real(tokens, real, context)
