"""A published checkpoint becomes a librobot one: what a layout's reader gives, and what is done with it.

A layout is a module of this package with `fits(folder) -> bool` and `read(folder, options) -> Imported`. It
says which options of `conf/` the published model is, and gives its weights by our names; everything else
(composition, a strict load, statistics, a self-contained checkpoint) is the same for all and is here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from librobot.config.build import build_framework
from librobot.config.check import check
from librobot.config.compose import compose, resolve
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.nn.pretrained import skip_pretrained
from librobot.normalize import Statistics
from librobot.training.checkpoints import AtomicCheckpointIO
from librobot.types import RobotSpec


@dataclass(frozen=True)
class ImportOptions:
    """What a published folder does not say, or says of several robots.

    `tokenizer` is a folder or a name of the model hub, `control_hz` the robot's rate in 1/s, `robot` its
    name, `embodiment` which of the checkpoint's robots is wanted (None: its only one, or all). `horizon` is
    the number of actions in a chunk and `cameras` their names in the model's order, where no file holds them.
    """

    tokenizer: str | None = None
    control_hz: float = 30.0
    robot: str | None = None
    embodiment: str | None = None
    horizon: int | None = None
    cameras: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Imported:
    """What a published folder becomes.

    `choices` are options of the config groups ({"framework": "pi0", "vlm": "paligemma"}), `values` dotted
    keys and what stands there over the composed configuration ({"framework.horizon": 50}). `weights` have our
    names and lack the normalizer's buffers, which are fitted to `statistics` (one for each of `embodiments`,
    where they are several). `files` are what `VLM.files` would give: the backbone's configuration,
    tokenizer and picture processor as text. `minimum_spread` is the normalizer's; None: as
    usual.
    """

    choices: Mapping[str, str]
    values: Mapping[str, Any]
    spec: RobotSpec
    weights: Mapping[str, Tensor]
    statistics: Statistics | list[Statistics]
    files: Mapping[str, str] = field(default_factory=dict)
    embodiments: tuple[RobotSpec, ...] | None = None
    minimum_spread: float | None = None


def import_checkpoint(
    folder: str | Path, output: str | Path, options: ImportOptions | None = None
) -> tuple[Path, Framework]:
    """Write the published checkpoint in `folder` as a librobot checkpoint; returns the file and the policy.

    Raises LibrobotError where no layout is known for the folder, where a tensor is missing, of another shape
    or left over (with its name), where an option says what the checkpoint contradicts, and where `output`
    exists.
    """
    folder, output = Path(folder), Path(output)
    if output.exists():
        raise LibrobotError(f"{output}: expected a new file, found one; name another, or remove it")
    layout = layout_of(folder)
    options = options or ImportOptions()
    framework = assemble(layout.read(folder, options), folder)
    for name, wanted, found in (
        ("horizon", options.horizon, framework.horizon),
        ("cameras", options.cameras, framework.spec.camera_names),
    ):
        if wanted is not None and wanted != found:
            raise LibrobotError(
                f"{folder}: {name} is {found} by its own files, and {wanted} by --{name}; leave that out"
            )
    contents: dict[str, Any] = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(contents)
    output.parent.mkdir(parents=True, exist_ok=True)
    AtomicCheckpointIO().save_checkpoint(contents, output)
    return output, framework


def layout_of(folder: Path) -> Any:
    """The module that reads this folder."""
    if not folder.is_dir():
        raise LibrobotError(f"{folder}: expected the folder of a published checkpoint, found none")
    names = []
    for module in layouts():
        if module.fits(folder):
            return module
        names.append(module.__name__.rpartition(".")[2])
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise LibrobotError(
        f"{folder}: not the folder of a published checkpoint that librobot reads "
        f"({', '.join(names)}); it holds {found}"
    )


def layouts() -> Iterator[ModuleType]:
    """Every module of this package that reads a layout."""
    import librobot.interchange as package

    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "fits"):
            yield module


def assemble(imported: Imported, place: Path) -> Framework:
    """The policy with its weights and statistics. Raises LibrobotError that names `place`."""
    cfg = configuration(imported)
    with skip_pretrained(imported.files):
        framework = build_framework(cfg, imported.spec, imported.embodiments)
    statistics = {
        name: value for name, value in framework.state_dict().items() if name.startswith("normalizer.")
    }
    if imported.minimum_spread is not None:
        framework.normalizer.minimum_spread = imported.minimum_spread
    try:
        framework.load_weights({**imported.weights, **statistics})
        framework.normalizer.fit(imported.statistics)
    except LibrobotError as error:
        raise LibrobotError(f"{place}: {error}") from error
    framework.attach_run(config=resolve(cfg), provenance={"imported_from": str(place)})
    return framework


def configuration(imported: Imported) -> DictConfig:
    # A logger would want a run's folder.
    cfg = compose(["logger=none", *(f"{group}={option}" for group, option in imported.choices.items())])
    for key, value in imported.values.items():
        OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    check(cfg)
    return cfg
