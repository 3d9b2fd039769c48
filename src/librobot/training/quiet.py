"""Messages of Lightning and torch that a user can do nothing about: these, word for word, and no others.

Imports neither of them; what is filtered here may be said again by a later version in other words.
"""

from __future__ import annotations

import logging
import warnings

LOGGER = "lightning.pytorch.utilities.rank_zero"  # of every rank_zero_info
NOISE = (
    "💡 Tip: ",  # advertises packages
    "`Trainer(limit_train_batches=1.0)` was configured",  # all of them is what nobody doubted
    "`Trainer(limit_val_batches=1.0)` was configured",
    "`Trainer(val_check_interval=1.0)` was configured",
)
WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Meant so: Framework seeds and moves a batch, DataModule augments it.
    (r"You have overridden `(on_before_batch_transfer|transfer_batch_to_device)` in `Lightning", UserWarning),
    # Lightning's own use of torch's pytree.
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a record of Lightning's logger is for the user."""
    return not record.getMessage().startswith(NOISE)


def quieten() -> None:
    """Filter these messages in this process."""
    logging.getLogger(LOGGER).addFilter(is_news)
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
