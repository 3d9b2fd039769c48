"""A denoiser and a decoder over the same context, for heads that train both."""

from __future__ import annotations

from typing import ClassVar, Literal

from librobot.networks.base import Network, NetworkFactory, Sizes


class Pair(Network):
    """A mapping of "denoiser" and "decoder" to a network of that kind."""

    kind: ClassVar[Literal["pair"]] = "pair"

    def __init__(self, *, sizes: Sizes, denoiser: NetworkFactory, decoder: NetworkFactory) -> None:
        super().__init__()
        self.denoiser, self.decoder = denoiser(sizes=sizes), decoder(sizes=sizes)
        for name in self.keys():
            if self[name].kind != name:
                raise ValueError(
                    f"{name} must be a network of that kind, found {type(self[name]).__name__}, which is a "
                    f"{self[name].kind}"
                )

    def keys(self) -> tuple[str, str]:
        return "denoiser", "decoder"

    def __getitem__(self, name: str) -> Network:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)
