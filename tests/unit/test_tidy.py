"""The project's rules, executable. Each rule is a function from text to complaints, and each is shown to fire."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    "model",
    "nbd",
    "tap",
    "seal",
    "store",
    "rights",
    "journal",
    "link",
    "vdsa",
    "stack",
    "recovery",
    "site",
    "manager",
    "api",
    "client",
    "actors",
    "demo",
    "cli",
)
"""A folder of dr_cloud/ imports only folders that stand before it here. bench/ stands on top of all."""
LINES_MAX = 500
IGNORED = re.compile(r"\..*|__pycache__|build|results|.*\.egg-info")
KEPT = (".ci", ".gitignore", ".github")
ABSOLUTE = re.compile(r"(?<![\w.})>\-])/(?:work|root|home|Users)/\w")
REGISTRIES = re.compile(
    r"pypi[.]org|pythonhosted[.]org|proxy[.]golang|registry[.]npmjs|crates[.]io|docker[.]io|ghcr[.]io|quay[.]io|"
    r"deb[.]debian|(?:archive|security)[.]ubuntu|--(?:extra-)?index[-]url[ =]|\bGOPROXY\s*[:=]"
)


def all_files() -> Iterator[Path]:
    """Every file that is, or could be, in the repository."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name in KEPT or not IGNORED.fullmatch(name))
        yield from (Path(folder) / name for name in sorted(names) if name in KEPT or not IGNORED.fullmatch(name))


def sources(*tops: str) -> list[Path]:
    return [path for path in all_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in tops]


def named(path: Path, complaints: list[str]) -> list[str]:
    return [f"{path.relative_to(ROOT)}: {complaint}" for complaint in complaints]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from dr_cloud.store import layout` may mean the module dr_cloud.store.layout.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def folder_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "dr_cloud" and len(parts) > 1 else ""


def floor_complaints(folder: str, text: str) -> list[str]:
    complaints = []
    for line, module in imported(ast.parse(text)):
        other = folder_of(module)
        if module.startswith("."):
            complaints.append(f"line {line}: relative import {module}")
        elif module.split(".")[0] in ("bench", "tests", "infra"):
            complaints.append(f"line {line}: the product imports {module}")
        elif module.split(".")[0] == "dr_cloud" and other not in FLOORS:
            complaints.append(f"line {line}: {module} is on no floor")
        elif other and FLOORS.index(other) > FLOORS.index(folder):
            complaints.append(f"line {line}: {folder}/ imports {module}, which stands above it")
    return complaints


def ray_complaints(folder: str, text: str) -> list[str]:
    return [
        f"line {line}: imports {module}; Ray lives in actors/"
        for line, module in imported(ast.parse(text))
        if module.split(".")[0] == "ray" and folder != "actors"
    ]


def inner_import_complaints(text: str) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sorted({f"line {line}: import of {module} in a function" for f in functions for line, module in imported(f)})


def docstring_complaints(text: str) -> list[str]:
    return [] if (ast.get_docstring(ast.parse(text)) or "").strip() else ["no module docstring"]


def length_complaints(text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{lines} lines, at most {LINES_MAX}"] if lines > LINES_MAX else []


def place_complaints(text: str) -> list[str]:
    return [
        f"line {number}: {match[0]!r} is of one machine or registry"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern in (ABSOLUTE, REGISTRIES)
        if (match := pattern.search(line))
    ]


def commands(text: str) -> set[str]:
    """Return every `make …` and `dr-cloud …` that a page shows as code, cut before its first argument."""
    spans = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for span in spans for line in span.splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = set()
    for line in lines:
        match = re.match(
            r"\s*(?:[$#] )?(?:sudo )?(?:\.venv/bin/)?(make|dr-cloud)((?: [a-z][a-z-]*(?![\w./=-]))+)", line
        )
        if match:
            found.add(match[1] + match[2])
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if ring := visit(other, [*path, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := visit(module, []))), [])


def folder_in_product(path: Path) -> str:
    return path.relative_to(ROOT / "dr_cloud").parts[0] if path.parent != ROOT / "dr_cloud" else "model"


def test_folders_import_only_what_stands_below_them():
    assert [
        c for p in sources("dr_cloud") for c in named(p, floor_complaints(folder_in_product(p), p.read_text()))
    ] == []


def test_every_folder_has_its_floor():
    folders = {path.relative_to(ROOT).parts[1] for path in sources("dr_cloud") if path.parent != ROOT / "dr_cloud"}
    assert sorted(folders - set(FLOORS)) == []


def test_ray_is_imported_in_actors_only():
    assert [c for p in sources("dr_cloud") for c in named(p, ray_complaints(folder_in_product(p), p.read_text()))] == []


def test_no_import_inside_a_function():
    paths = sources("dr_cloud", "bench", "infra")
    assert [c for p in paths for c in named(p, inner_import_complaints(p.read_text()))] == []


def test_modules_do_not_import_each_other_in_a_ring():
    texts = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in sources("dr_cloud")}
    texts = {name.removesuffix(".__init__"): text for name, text in texts.items()}
    graph = {}
    for name, text in texts.items():
        targets = {m if m in texts else m.rpartition(".")[0] for _, m in imported(ast.parse(text))}
        graph[name] = targets & set(texts) - {name}
    assert cycle(graph) == []


def test_every_module_says_what_it_is():
    paths = sources("dr_cloud", "bench", "infra")
    assert [c for p in paths for c in named(p, docstring_complaints(p.read_text()))] == []


def test_files_stay_readable_in_one_sitting():
    paths = sources("dr_cloud", "bench", "infra", "tests")
    assert [c for p in paths for c in named(p, length_complaints(p.read_text()))] == []


def test_no_machine_and_no_registry_is_named():
    complaints = []
    for path in all_files():
        if path.is_symlink() or b"\0" in (data := path.read_bytes()):
            continue
        complaints += named(path, place_complaints(data.decode()))
    assert complaints == []


def test_test_files_have_names_of_their_own():
    names = Counter(path.name for path in sources("tests") if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def shown_commands() -> dict[str, str]:
    pages = [path for path in all_files() if path.suffix == ".md"]
    return {command: str(page.relative_to(ROOT)) for page in pages for command in sorted(commands(page.read_text()))}


def test_every_make_target_that_a_page_shows_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        (word, page) for command, page in shown_commands().items() for word in command.split()[1:] if "make " in command
    }
    assert sorted((word, page) for word, page in shown if word not in targets) == []


def test_every_command_that_a_page_shows_exists():
    program = Path(sys.executable).parent / "dr-cloud"
    wrong = []
    for command, page in shown_commands().items():
        if command.startswith("dr-cloud "):
            done = subprocess.run(
                [program, *command.split()[1:], "--help"], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                wrong.append(f"{page}: {command}: {done.stderr.strip()[-200:]}")
    assert wrong == []


def test_the_page_of_formats_is_what_the_code_says():
    command = [sys.executable, str(ROOT / "infra" / "docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_tests_cannot_start_ray():
    with pytest.raises(RuntimeError, match="test the pure core"):
        ray.init()
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("complaints", "part"),
    [
        (floor_complaints("model", "from dr_cloud.stack.image import Image"), "stands above"),
        (floor_complaints("store", "import dr_cloud.journal"), "stands above"),
        (floor_complaints("store", "from dr_cloud import journal"), "stands above"),
        (floor_complaints("store", "from . import layout"), "relative"),
        (floor_complaints("store", "from dr_cloud.attic import x"), "no floor"),
        (floor_complaints("cli", "import bench.run"), "the product imports"),
        (ray_complaints("vdsa", "import ray.util"), "Ray lives in"),
        (ray_complaints("cli", "from ray import serve"), "Ray lives in"),
        (inner_import_complaints("class A:\n async def f(self):\n  if 1:\n   from os import path"), "line 4"),
        (docstring_complaints("import os"), "no module docstring"),
        (docstring_complaints('"""  """'), "no module docstring"),
        (length_complaints("x\n" * (LINES_MAX + 1)), "501 lines"),
        (place_complaints("a\ncd /" + "home/me"), "line 2"),
        (place_complaints("open('/" + "root/x')"), "line 1"),
        (place_complaints("https://pypi" + ".org/simple"), "line 1"),
        (place_complaints("pip install --index" + "-url x"), "line 1"),
    ],
)
def test_the_rules_fire(complaints, part):
    assert len(complaints) == 1
    assert part in complaints[0]


def test_the_rules_let_good_text_pass():
    assert floor_complaints("stack", "import numpy\nfrom dr_cloud.store.store import Store") == []
    assert ray_complaints("actors", "import ray") == []
    assert place_complaints("`<root>/work/x`, {home}/root/y, /var/lib/dr-cloud, --no-emit-index-url") == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"b"}}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_commands_are_found_where_a_page_shows_them():
    page = (
        "Run `make test`, not make haste. `dr-cloud site up -c site.yaml` and `make`.\n"
        "```sh\n$ make demo\n.venv/bin/dr-cloud vpg create erp --json\n"
        "dr-cloud tap /dev/sdb\nmake PYTHON=python3.12\n```\n"
    )
    assert commands(page) == {
        "make test",
        "make demo",
        "dr-cloud site up",
        "dr-cloud vpg create erp",
        "dr-cloud tap",
    }
