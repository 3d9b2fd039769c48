"""FAST: frequency-space action sequence tokenization (Pertsch et al. 2025, arXiv 2501.09747, section V).

    C = DCT-II of each dimension along the chunk, orthonormal      (k, a) coefficients
    q = round(scale * C), flattened from the lowest frequency up, all dimensions of a frequency together
    text = characters chr(q - min_token)                           min_token is the smallest q of the data
    tokens = byte-pair encoding of the text, then a stop token

Folders are those of the published processor (physical-intelligence/fast): what is fitted here loads there
and the reverse. A tokenizer fitted here merges characters, so no token is part of a character; published ones
merge the bytes of UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from librobot.tokenizers.pieces import Fill, PieceTable

TOKENIZER_FILE, PROCESSOR_FILE = "tokenizer.json", "processor_config.json"
PROCESSOR_CLASS = "UniversalActionProcessor"
# Where transformers finds the published processor's code.
PROCESSOR_CODE = f"physical-intelligence/fast--processing_action_tokenizer.{PROCESSOR_CLASS}"
# Code points from here on are surrogates, which no text can hold.
NUM_CODES = 0xD800


class FAST:
    """`checkpoint` is a folder of a fitted tokenizer, published or saved by `save`; it brings its own scale,
    and its `vocab_size` has to be given. Without one, `fit` defines the tokens."""

    mixes = True
    tokenizer: Any = None  # a tokenizers.Tokenizer, once fitted
    pieces: PieceTable

    def __init__(self, *, vocab_size: int = 1024, scale: float = 10.0, checkpoint: str | None = None) -> None:
        if not 2 <= vocab_size <= NUM_CODES:
            raise ValueError(f"vocab_size must lie between 2 and {NUM_CODES}, found {vocab_size}")
        if scale <= 0:
            raise ValueError(f"scale must be above 0, found {scale}")
        self.vocab_size, self.scale, self.checkpoint = vocab_size, scale, checkpoint
        self.min_token = 0
        # A policy's own checkpoint restores the tokenizer on machines that lack the folder.
        if checkpoint is not None and Path(checkpoint).is_dir():
            self.restore(_read(Path(checkpoint)))

    @property
    def fitted(self) -> bool:
        return self.tokenizer is not None

    @property
    def vocabulary(self) -> int:
        return self.vocab_size + 1

    @property
    def stop(self) -> int:
        return self.vocab_size

    @property
    def max_tokens(self) -> int:
        """One token per character at most, or one per byte of the two that a published character takes."""
        longest = 1 if self.checkpoint is None else 2
        return longest * self.horizon * self.action_dim + 1

    def attach(self, *, horizon: int, action_dim: int) -> None:
        self.horizon, self.action_dim = horizon, action_dim

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        """Learn the vocabulary: every coefficient between the extremes, then the most frequent pairs.

        Raises ValueError where `checkpoint` was to bring it, or where the coefficients alone exceed it.
        """
        if self.checkpoint is not None:
            raise ValueError(self._unfitted())
        from tokenizers import Tokenizer, decoders, models, trainers

        coefficients = quantised(actions, self.scale)
        self.min_token = int(coefficients.min())
        codes = coefficients - self.min_token
        size = int(codes.max()) + 1
        if size > self.vocab_size:
            raise ValueError(
                f"vocab_size must be at least {size}, the number of rounded coefficients that these actions "
                f"span at scale={self.scale:g}, found {self.vocab_size}; raise vocab_size or lower scale"
            )
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(code) for code in range(size)],
        )
        tokenizer.train_from_iterator(_texts(codes), trainer=trainer)
        self._adopt(tokenizer)

    def encode(self, actions: Float[Tensor, "b k a"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Coefficients beyond those that the vocabulary knows count as the nearest one that it does."""
        tokenizer = self._tokenizer()
        codes = self.pieces.nearest_code(quantised(actions, self.scale) - self.min_token)
        rows = [encoding.ids for encoding in tokenizer.encode_batch(_texts(codes), add_special_tokens=False)]
        lengths = torch.tensor([len(row) + 1 for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.stop)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(actions.device), mask.to(actions.device)

    def decode(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b k a"]:
        """Missing coefficients, which are the highest frequencies, count as 0; surplus ones are cut off."""
        self._tokenizer()
        wanted = self.horizon * self.action_dim
        coefficients = np.zeros((len(ids), wanted))
        for row, tokens, real in zip(coefficients, ids.tolist(), mask.tolist(), strict=True):
            kept = [token for token, keep in zip(tokens, real, strict=True) if keep]
            kept = kept[: kept.index(self.stop)] if self.stop in kept else kept
            codes = self.pieces.codes_of(kept)[:wanted]
            row[: len(codes)] = np.asarray(codes) + self.min_token
        actions = dequantised(coefficients, self.scale, self.horizon)
        return torch.from_numpy(actions).to(device=ids.device, dtype=torch.float32)

    def constrain(self, count: int, device: torch.device) -> Fill:
        self._tokenizer()
        return Fill(self.pieces, count, self.horizon * self.action_dim, self.stop, device)

    def files(self) -> dict[str, str]:
        """The files of the published folder format; none before the tokens are known."""
        if not self.fitted:
            return {}
        processor = {
            "action_dim": self.action_dim,
            "auto_map": {
                "AutoProcessor": f"physical-intelligence/fast--processing_action_tokenizer.{PROCESSOR_CLASS}"
            },
            "min_token": self.min_token,
            "processor_class": PROCESSOR_CLASS,
            "scale": self.scale,
            "time_horizon": self.horizon,
            "vocab_size": self.vocab_size,
        }
        tokenizer = {
            "added_tokens_decoder": {},
            "clean_up_tokenization_spaces": False,
            "processor_class": PROCESSOR_CLASS,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return {
            TOKENIZER_FILE: self.tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(tokenizer, indent=2),
            "special_tokens_map.json": "{}",
            PROCESSOR_FILE: json.dumps(processor, indent=2),
        }

    def restore(self, files: Mapping[str, str]) -> None:
        """Raises ValueError where the files hold a vocabulary of another size."""
        if TOKENIZER_FILE not in files:
            return
        from tokenizers import Tokenizer

        config = json.loads(files[PROCESSOR_FILE])
        if config["vocab_size"] != self.vocab_size:
            raise ValueError(
                f"vocab_size must be that of the tokenizer, {config['vocab_size']}, found {self.vocab_size}; "
                f"set head.tokenizer.vocab_size={config['vocab_size']}"
            )
        self.scale, self.min_token = config["scale"], config["min_token"]
        self._adopt(Tokenizer.from_str(files[TOKENIZER_FILE]))

    def save(self, folder: Path) -> None:
        """Write the folder that `checkpoint` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    def _adopt(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pieces = PieceTable.of(tokenizer, self.vocab_size)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(self._unfitted())
        return self.tokenizer

    def _unfitted(self) -> str:
        if self.checkpoint is not None:
            return (
                f"checkpoint must be a folder with {TOKENIZER_FILE} and {PROCESSOR_FILE}, found no folder "
                f"{self.checkpoint!r}"
            )
        return (
            "The FAST tokenizer has to be fitted before it is used, and it was not; librobot-train does it "
            "before training, or set head.tokenizer.checkpoint to a folder"
        )


def quantised(actions: Float[Tensor, "n k a"], scale: float) -> Int[np.ndarray, "n m"]:
    """Scaled and rounded coefficients, m = k * a, lowest frequencies first."""
    from scipy.fft import dct

    coefficients = dct(actions.detach().cpu().double().numpy(), type=2, axis=1, norm="ortho")
    return rearrange(np.around(scale * coefficients).astype(np.int64), "n k a -> n (k a)")


def dequantised(
    coefficients: Float[np.ndarray, "n m"], scale: float, horizon: int
) -> Float[np.ndarray, "n k a"]:
    """The actions of such coefficients."""
    from scipy.fft import idct

    return idct(rearrange(coefficients / scale, "n (k a) -> n k a", k=horizon), type=2, axis=1, norm="ortho")


def _texts(codes: Int[np.ndarray, "n m"]) -> list[str]:
    return ["".join(map(chr, row)) for row in codes.tolist()]


def _read(folder: Path) -> dict[str, str]:
    missing = [name for name in (TOKENIZER_FILE, PROCESSOR_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint must be a folder with {TOKENIZER_FILE} and {PROCESSOR_FILE}, found no "
            f"{' and no '.join(missing)} in {str(folder)!r}"
        )
    return {name: (folder / name).read_text(encoding="utf-8") for name in (TOKENIZER_FILE, PROCESSOR_FILE)}
