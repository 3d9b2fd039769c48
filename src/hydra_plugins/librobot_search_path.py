"""Where librobot's commands find their configuration, beside librobot.conf itself:

- packages that declare an entry point in the group `librobot.conf`, whose value is the package that holds
  their config groups: `[project.entry-points."librobot.conf"]  mylib = "mylib.conf"`;
- the folder `experiments/` of the current directory, as the group `experiment`: the file
  experiments/tabletop/act.yaml is `experiment=tabletop/act`.

Hydra imports every module of the namespace package `hydra_plugins`; other Hydra applications are left alone.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

OURS = "pkg://librobot.conf"
SCHEME = "librobot-experiments"


class LibrobotSearchPath(SearchPathPlugin):
    """Adds third-party packages and experiments/ to the search path of librobot's commands."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if not any(element.path == OURS for element in search_path.get_path()):
            return
        for entry in entry_points(group="librobot.conf"):
            search_path.append(provider=entry.name, path=f"pkg://{entry.value}")
        folder = Path("experiments")
        if folder.is_dir():
            search_path.append(provider="experiments", path=f"{SCHEME}://{folder.absolute()}")


class ExperimentSource(FileConfigSource):
    """A folder of YAML files that appears as the config group `experiment`."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return super().is_group("")

    def is_group(self, config_path: str) -> bool:
        inner = _inside(config_path)
        return config_path == "" or (inner is not None and super().is_group(inner))

    def is_config(self, config_path: str) -> bool:
        inner = _inside(config_path)
        return inner is not None and inner != "" and super().is_config(inner)

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_inside(config_path) or config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else ["experiment"]
        found: list[str] = []
        for entry in sorted((Path(self.path) / (_inside(config_path) or "")).iterdir()):
            self._list_add_result(
                files=found,
                file_path=f"{config_path}/{entry.name}",
                file_name=entry.name,
                results_filter=results_filter,
            )
        return sorted(set(found))


def _inside(config_path: str) -> str | None:
    """The path below the group `experiment`; None for other groups."""
    head, _, rest = config_path.partition("/")
    return rest if head == "experiment" else None
