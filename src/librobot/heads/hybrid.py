"""Two heads over one context: a continuous one that acts, and action tokens that train the backbone.

    loss = flow_weight * flow_loss(stop_gradient(context)) + token_weight * token_loss(context)

This is the knowledge insulation of pi0.5 (Driess et al. 2025, "Knowledge Insulating Vision-Language-Action
Models"): the gradient of the action expert, which starts from nothing, does not reach the backbone, which
learns about actions by predicting their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from librobot.heads.base import ActionHead, Mask, NetworkKind
from librobot.losses import recorded

Part = Literal["flow", "tokens"]


class Hybrid(ActionHead):
    """`flow` is any head over a denoiser, `tokens` any head over a decoder; the loss is their weighted sum.

    With `insulate` the flow head's loss sees the context without its gradient. `sample_from` names the head
    that acts.
    """

    network: ClassVar[NetworkKind] = "pair"
    tokens: Any  # an ActionHead, with the `vocabulary` and `max_tokens` that a decoder is built to

    def __init__(
        self,
        *,
        flow: ActionHead,
        tokens: ActionHead,
        flow_weight: float = 1.0,
        token_weight: float = 1.0,
        insulate: bool = True,
        sample_from: Part = "flow",
    ) -> None:
        super().__init__()
        for part, head, kind in (("flow", flow, "denoiser"), ("tokens", tokens, "decoder")):
            if head.network != kind:
                raise ValueError(
                    f"{part} must be a head over a {kind}, found {type(head).__name__}, which needs a "
                    f"{head.network}"
                )
        for name, weight in (("flow_weight", flow_weight), ("token_weight", token_weight)):
            if weight <= 0:
                raise ValueError(f"{name} must be above 0, found {weight}; to train one head, take it alone")
        if sample_from not in get_args(Part):
            raise ValueError(f"sample_from must be one of {get_args(Part)}, found {sample_from!r}")
        self.flow, self.tokens = flow, tokens
        self.flow_weight, self.token_weight = flow_weight, token_weight
        self.insulate, self.sample_from = insulate, sample_from

    @property
    def generative(self) -> bool:  # type: ignore[override]  # the nested head's
        return self.flow.generative

    @property
    def stochastic(self) -> bool:
        return self._acting.stochastic

    def attach(self, *, horizon: int, action_dim: int, real_dim: int | None = None) -> None:
        super().attach(horizon=horizon, action_dim=action_dim, real_dim=real_dim)
        for head in self._parts.values():
            head.attach(horizon=horizon, action_dim=action_dim, real_dim=real_dim)

    @property
    def output_width(self) -> int:
        return self.flow.output_width

    @property
    def vocabulary(self) -> int:
        return self.tokens.vocabulary

    @property
    def max_tokens(self) -> int:
        return self.tokens.max_tokens

    @property
    def needs_fit(self) -> bool:
        return any(head.needs_fit for head in self._parts.values())

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        for head in self._parts.values():
            if head.needs_fit:
                head.fit(actions)

    def files(self) -> dict[str, str]:
        """Both heads' files, each name behind "flow." or "tokens."."""
        named = [(part, head.files()) for part, head in self._parts.items()]
        return {f"{part}.{name}": text for part, files in named for name, text in files.items()}

    def restore(self, files: Mapping[str, str]) -> None:
        for part, head in self._parts.items():
            own = {name: text for name, text in files.items() if name.startswith(f"{part}.")}
            head.restore({name.removeprefix(f"{part}."): text for name, text in own.items()})

    def loss(
        self,
        network: Mapping[str, Any],
        context: Any,
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        *,
        noise: Float[Tensor, "b k a"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        """`noise` and `time` are the flow head's."""
        seen = self._insulated(context) if self.insulate else context
        flow = self.flow.loss(network["denoiser"], seen, actions, mask, noise=noise, time=time)
        with recorded(None):  # nats beside squared errors: the parts of the loss are the flow's
            tokens = self.tokens.loss(network["decoder"], context, actions, mask)
        return self.flow_weight * flow + self.token_weight * tokens

    def sample(
        self,
        network: Mapping[str, Any],
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        own = network["denoiser" if self.sample_from == "flow" else "decoder"]
        return self._acting.sample(own, context, shape, noise=noise, num_steps=num_steps, guidance=guidance)

    @property
    def _parts(self) -> dict[Part, ActionHead]:
        return {"flow": self.flow, "tokens": self.tokens}

    @property
    def _acting(self) -> ActionHead:
        return self._parts[self.sample_from]

    @staticmethod
    def _insulated(context: Any) -> Any:
        if not hasattr(context, "detach"):
            raise ValueError(
                f"insulate needs a context with detach(), which this framework's {type(context).__name__} "
                f"lacks; take framework=custom, or set head.insulate=false"
            )
        return context.detach()
