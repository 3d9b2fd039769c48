"""What the documentation names is there: files, options of groups, commands, make targets."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from librobot.config.compose import compose
from librobot.errors import LibrobotError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("*.md"))
YAMLS = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")])
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")
PLACES = [ROOT, ROOT / "src/librobot", ROOT / "conf", ROOT / "tests"]
EXAMPLES = {"mine", "mine_writer", "mylab", "bench", "both", "OPTION", "NAME", "TYPE"}
"""What pages call a file that the reader is to write, or an option to choose."""
ELSEWHERE = {"models/pi0.py", "examples/convert_jax_model_to_pytorch.py"}
"""Files of openpi."""
COMMAND = re.compile(r"librobot-(train|eval|record)\b")


def code_of(path: Path) -> list[str]:
    """The lines of a page's code: fenced ones (those that go on joined) and spans; a YAML file's comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    lines: list[str] = []
    for number, part in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if number % 2:
            lines += re.sub(r"\\\n\s*", " ", part).splitlines()
        else:
            lines += re.findall(r"`([^`]+)`", part.replace("\n", " "))
    return lines


def everywhere(paths: list[Path]) -> list[tuple[str, str]]:
    return [(str(path.relative_to(ROOT)), line) for path in paths for line in code_of(path)]


def lost_files(path: Path) -> list[str]:
    """Files that a page names, by the repository's folders or those of `PLACES`, or links to."""
    text = path.read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w/.$~{-])((?:[\w.-]+/)+[\w*.-]+\.(?:py|yaml|md|ipynb))\b", "\n".join(code_of(path))
    )
    links = re.findall(r"\]\(([^)#:\s]+)", text) if path.suffix == ".md" else []
    lost = [name for name in named if not any(any(place.glob(name)) for place in (*PLACES, path.parent))]
    lost = [name for name in lost if Path(name).stem not in EXAMPLES and name not in ELSEWHERE]
    return lost + [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(path):
    assert lost_files(path) == []


def test_files_that_configurations_name_are_there():
    assert {str(path): lost for path in YAMLS if (lost := lost_files(path))} == {}


def options(group: str) -> set[str]:
    folders = [ROOT / "conf" / group, *([ROOT / "experiments"] if group == "experiment" else [])]
    return {str(p.relative_to(f).with_suffix("")) for f in folders for p in f.rglob("*.yaml")}


def test_options_that_are_named_are_there():
    pattern = re.compile(rf"(?<![\w./])({'|'.join(GROUPS)})=(\[[^\]]*\]|[a-z][\w/,]*)")
    lost = []
    for page, line in everywhere([*PAGES, *YAMLS]):
        for group, given in pattern.findall(line):
            for name in re.findall(r"[A-Za-z_][\w/]*", given):
                if name not in options(group) | EXAMPLES | {"null", "None", "glob"}:
                    lost.append(f"{page}: {group}={name}")
    assert lost == []


def test_commands_and_make_targets_are_there():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    lost = []
    for page, line in everywhere([*PAGES, *YAMLS]):
        commands = re.findall(r"(?<![\w/.-])(librobot-[a-z-]+[a-z])\b(?![/.@])", line)
        made = re.match(r"make((?: [a-z-]+)+)", line)
        lost += [f"{page}: {name}" for name in commands if name not in known]
        lost += [f"{page}: make {name}" for name in (made[1].split() if made else []) if name not in targets]
    assert lost == []


def overrides_of(command: str) -> list[str]:
    """What a command line sets: of a sweep the first value, and nothing that a sweeper draws."""
    words = shlex.split(re.split(r"\s#|\s[&|>;]|\s{3,}", command)[0])[1:]
    given = [word for word in words if "=" in word and not word.startswith(("-", "GROUP=", "experiment=$"))]
    if "-m" in words:
        drawn = re.compile(r"=\w+\(|^hydra[./]")
        given = [word for word in given if not drawn.search(word)]
        given = [word if "[" in word else word.partition(",")[0] for word in given]
    return [re.sub("=FORMAT$", "=lerobot", word).replace("$", "") for word in given]


def test_overrides_of_a_sweep():
    line = (
        "librobot-train -m hydra/sweeper=optuna vlm=tiny,smolvlm2 'optim.lr=interval(1e-5,1)' a=[1,2]   # b=3"
    )
    assert overrides_of(line) == ["vlm=tiny", "a=[1,2]"]


@pytest.mark.slow
def test_commands_compose():
    """Every option and key that a written command sets is one: about forty seconds for all of them."""
    wrong, seen = [], set()
    for page, line in everywhere([*PAGES, *YAMLS]):
        found = COMMAND.match(line)
        if found is None or "..." in line:
            continue
        given = overrides_of(line)
        if (found[1], *given) in seen:
            continue
        seen.add((found[1], *given))
        try:
            compose(given, found[1])
        except LibrobotError as error:
            wrong.append(f"{page}: {line}: {error}")
    assert wrong == []
    assert len(seen) > 250
