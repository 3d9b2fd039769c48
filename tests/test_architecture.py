"""What each room of the package may import, and at module level; the size of files; how YAML files open."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SRC = REPOSITORY / "src"
FILES = sorted((SRC / "librobot").rglob("*.py"))
YAMLS = sorted([*(REPOSITORY / "conf").rglob("*.yaml"), *(REPOSITORY / "experiments").rglob("*.yaml")])
OPTIONAL = {"mujoco", "lerobot", "wandb", "tensorflow", "deepspeed", "metaworld", "bitsandbytes"}

# Room -> the rooms that it may import, besides itself. `config` builds the object graph and so names every
# room, but only inside functions (below).
BASE = {"types", "errors", "replicas", "checkpoint_path"}
NN = BASE | {"nn"}
HEADS = NN | {"losses", "tokenizers"}
ACTIONS = BASE | {"rotations", "relative_actions", "action_groups", "representation"}
FRAMEWORKS = HEADS | ACTIONS | {"heads", "networks", "vlms", "normalize", "frameworks"}
POLICY = FRAMEWORKS | {"policy", "chunking", "requests", "progress", "config"}
DATA = ACTIONS | {"progress", "data", "sim"}
ARROWS = {
    "types": set(),
    "errors": set(),
    "replicas": set(),
    "progress": BASE,
    "checkpoint_path": BASE,
    "chunking": BASE,
    "requests": BASE,
    "rotations": BASE,
    "relative_actions": BASE,
    "action_groups": ACTIONS,
    "representation": ACTIONS,
    "losses": BASE,
    "normalize": BASE,
    "nn": BASE,
    "vlms": NN,
    "tokenizers": NN | {"progress"},
    "networks": NN,
    "heads": HEADS,
    "frameworks": FRAMEWORKS,
    "policy": POLICY,
    "two_rates": POLICY,
    "data": DATA,
    "sim": DATA,
    "evaluation": POLICY | DATA,
    "training": POLICY | DATA | {"evaluation"},  # episodes while training
    "interchange": POLICY | {"training"},
    "export": POLICY | {"training"},
    "bench": POLICY | DATA | {"training", "evaluation", "interchange"},
    "cli": POLICY | DATA | {"training", "evaluation", "bench", "interchange", "export"},
}
# A command's own entry into a room builds what its configuration names.
ENTRIES = {("librobot.sim.record", "librobot.config.build"), ("librobot.policy", "librobot.config.build")}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """'nn' for librobot.nn.attention; '' for the package itself, which holds only the version."""
    return module.split(".")[1] if "." in module else ""


def names_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name their module in full"
        for alias in node.names:
            yield f"{node.module}.{alias.name}"


def imports(tree: ast.AST) -> Iterator[str]:
    """Every import, wherever it stands, as dotted names (of a module, or of what is taken from it)."""
    for node in ast.walk(tree):
        yield from names_of(node)


def at_module_level(node: ast.AST) -> Iterator[str]:
    """What importing the file imports: not inside functions, not under `if TYPE_CHECKING`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from at_module_level(child)
        return
    yield from names_of(node)
    for child in ast.iter_child_nodes(node):
        yield from at_module_level(child)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def wrong_arrows(module: str, tree: ast.AST) -> list[str]:
    """Imports of librobot's rooms that `module` may not have."""
    room = room_of(module)
    if room == "config":
        found = [name for name in at_module_level(tree) if room_of(name) not in BASE | {"config"}]
        found += [name for name in imports(tree) if room_of(name) == "cli"]
    else:
        allowed = ARROWS[room] | {room} if room else set()
        found = [name for name in imports(tree) if room_of(name) not in allowed]
    return [
        f"{module} imports {name}"
        for name in found
        if name.startswith("librobot.")
        and name != "librobot.__version__"
        and not any(module == who and name.startswith(f"{what}.") for who, what in ENTRIES)
    ]


def test_the_arrows_between_rooms_run_one_way():
    assert [wrong for path in FILES for wrong in wrong_arrows(module_name(path), parsed(path))] == []


def test_every_room_is_in_the_table():
    assert {room_of(module_name(path)) for path in FILES} == {*ARROWS, "config", ""}


def test_the_simulation_writes_datasets_and_reads_none():
    names = {name for path in (SRC / "librobot/sim").rglob("*.py") for name in imports(parsed(path))}
    assert {name for name in names if room_of(name) == "data"} == {"librobot.data.writer.LeRobotWriter"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("librobot.nn.text", "from librobot.vlms.base import VLM"),
        ("librobot.heads.base", "def f():\n    import librobot.frameworks.act"),
        ("librobot.data.tables", "from librobot.frameworks.base import Framework"),
        ("librobot.sim.base", "from librobot import policy"),
        ("librobot.training.run", "from librobot.cli import app"),
        ("librobot.config.build", "from librobot.frameworks.base import Framework"),
        ("librobot.config.build", "def f():\n    from librobot.cli.app import start"),
    ],
)
def test_a_wrong_arrow_is_seen(module, line):
    assert wrong_arrows(module, ast.parse(line))


def test_optional_packages_are_imported_where_they_are_needed():
    found = []
    for path in FILES:
        light = room_of(module_name(path)) in ("cli", "config")
        heavy = OPTIONAL | ({"torch", "lightning", "numpy"} if light else set())
        names = {name.split(".")[0] for name in at_module_level(parsed(path))}
        found += [f"{module_name(path)} imports {name}" for name in sorted(names & heavy)]
    assert found == []


def test_module_level_is_more_than_the_first_lines():
    code = "try:\n    import wandb\nexcept ImportError:\n    pass\nclass A:\n    import mujoco\n"
    code += "if TYPE_CHECKING:\n    import lerobot\ndef f():\n    import torch\n"
    assert set(at_module_level(ast.parse(code))) == {"wandb", "mujoco"}


def test_only_build_instantiates():
    users = {
        module_name(path)
        for path in FILES
        for node in ast.walk(parsed(path))
        if any(name in ("hydra.utils.instantiate", "hydra.utils.call") for name in names_of(node))
        or (isinstance(node, ast.Attribute) and node.attr == "instantiate")
    }
    assert users == {"librobot.config.build"}


def test_files_stay_small():
    lengths = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_yaml_opens_with_what_it_is_and_its_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    opening = [line for line in lines[:end] if not line.startswith("# @package")]
    assert len(opening) >= 2
    assert any("librobot-" in line for line in opening)
