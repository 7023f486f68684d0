"""README and docs/: the commands run, links have targets, flags and codes exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from cohort import gpuprep as run_here

import gpuprep
from gpuprep import errors
from gpuprep.cli.app import app
from gpuprep.cli.demo import write_cohort, write_outlines

TOP = Path(__file__).parents[2]
README, DOCS = TOP / "README.md", TOP / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]

DEMO = "&& gpuprep demo demo\n"
"""End of the README's first installation command, which writes the files that the other commands need."""


class Block(NamedTuple):
    """A fenced block of Markdown."""

    kind: str
    """``console``: commands after ``$`` are run; a comment may state the exit code. ``python``: is run. The others are
    not run: ``sh`` needs a network or a cluster, ``text`` and ``toml`` are no commands."""
    lines: list[str]


def blocks(page: Path) -> Iterator[Block]:
    for found in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text("utf-8")):
        yield Block(found[1], found[2].splitlines())


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))


def inline_code(page: Path) -> list[str]:
    return [code.replace(r"\|", "|") for code in re.findall(r"`([^`\n]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a page."""
    titles = re.findall(r"(?m)^#+ +(.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]+`", "", prose(page).replace("[`", "[").replace("`](", "]("))
    return [to for to in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in to]


def test_the_readme_has_at_most_10_000_bytes() -> None:
    assert len(README.read_bytes()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_has_a_file_and_a_heading_as_target(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    assert "docs/index.md" in links(README)
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= set(links(DOCS / "index.md"))


def test_the_examples_of_the_readme_and_of_two_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "gpuprep"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gpuprep "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    package = os.path.dirname(os.path.dirname(str(gpuprep.__file__)))
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", "")))),
        "OPENBLAS_NUM_THREADS": "1",  # more threads would wait for each other while other tests use the cores
    }
    folder = tmp_path / "work"
    folder.mkdir()

    monkeypatch.chdir(folder)

    def run(arguments: list[str], code: int) -> None:
        ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == code, f"{arguments}\n{ended.stdout}\n{ended.stderr}"

    def run_command(line: str, code: int) -> None:
        words = shlex.split(line, comments=True)
        if words[0] != "gpuprep" or not {">", "|", "&&"}.isdisjoint(words):
            run(["bash", "-c", line], code)
            return
        ended = run_here(*words[1:], loops=True)
        assert ended.returncode == code, f"{line}\n{ended.stdout}\n{ended.stderr}"

    assert DEMO in README.read_text("utf-8")
    write_cohort(folder / "demo" / "dicom")
    write_outlines(folder / "demo" / "masks")
    ran = 0
    for page in (README, DOCS / "usage.md", DOCS / "restore.md"):
        for kind, lines in blocks(page):
            if kind == "console":
                for command in (line.removeprefix("$ ") for line in lines if line.startswith("$ ")):
                    stated = re.search(r"# exit code (\d+)", command)
                    run_command(command, int(stated[1]) if stated else 0)
                    ran += 1
            elif kind == "python" and (find_spec("torch") or not any("gpuprep.torch" in line for line in lines)):
                script = tmp_path / "example.py"
                script.write_text("\n".join(lines), "utf-8")
                run([sys.executable, str(script)], 0)
                ran += 1
    assert ran >= 15
    assert (folder / "show.png").read_bytes().startswith(b"\x89PNG")
    tree = [line.split() for kind, lines in blocks(README) for line in lines if kind == "text"]
    assert len(tree) == 10
    for place, *_ in tree:
        assert list(folder.glob(place.replace("…", "*"))), place


def flags() -> dict[str, set[str]]:
    """Return the flags of each command, and under "" those of the program itself."""
    group: Any = typer.main.get_command(app)
    found = {name: {o for p in command.params for o in p.opts} for name, command in group.commands.items()}
    return found | {"": {o for p in group.params for o in p.opts}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_flag_exists(page: Path) -> None:
    known = flags()
    assert {"--out", "--policy", "--masks"} <= known["convert"]
    texts = [
        *inline_code(page),
        *(line for b in blocks(page) if b.kind in ("sh", "console", "text") for line in b.lines),
    ]
    for text in texts:
        for command, rest in re.findall(r"(?:^|\s|\")gpuprep ([a-z]+)\b([^\"#]*)", text):
            assert command in known, text
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*|(?<=\|)--[a-z-]+", rest)) <= known[command], text
    bare = {flag for text in inline_code(page) if (flag := text.split()[0]).startswith("--")}
    every = {"--help"}.union(*known.values())
    assert {f for flag in bare for f in flag.split("|")} <= every


def strings(expression: ast.expr, constants: dict[str, str]) -> set[str]:
    """Return the possible values of a code expression: a string, a named constant, both branches of a choice."""
    match expression:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Name(id=name):
            return {constants[name]} if name in constants else set()
        case ast.IfExp(body=body, orelse=other):
            return strings(body, constants) | strings(other, constants)
        case ast.Tuple(elts=parts):
            return set().union(*(strings(part, constants) for part in parts))
    return set()


def codes_in(tree: ast.Module) -> set[str]:
    """Return the codes that a module records or raises as literals."""
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name in ("Irregularity", "SeriesWarning", "LeftOut"):
                found |= strings(node.args[0], constants)
            elif name in vars(errors) and len(node.args) > 1:
                found |= strings(node.args[1], constants)
            found |= {s for k in node.keywords if k.arg in ("code", "codes") for s in strings(k.value, constants)}
        elif isinstance(node, ast.Assign) and any(ast.unparse(t).split(".")[-1] == "code" for t in node.targets):
            found |= strings(node.value, constants)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Tuple) and isinstance(node.iter, ast.Tuple):
            first = node.target.elts[0]
            if isinstance(first, ast.Name) and first.id == "code":
                found |= {s for row in node.iter.elts if isinstance(row, ast.Tuple) for s in strings(row.elts[0], {})}
    return found


def test_every_verdict_code_has_a_row_in_the_documentation_and_every_row_a_code() -> None:
    package = Path(str(gpuprep.__file__)).parent
    found: set[str] = set()
    for module in package.rglob("*.py"):
        if module.name != "errors.py":
            found |= codes_in(ast.parse(module.read_text("utf-8")))
    rows = re.findall(r"(?m)^\| (`[^|]+`) \|", (DOCS / "irregular-series.md").read_text("utf-8"))
    documented = {code for row in rows for code in re.findall(r"`([a-z][a-z0-9-]*)`", row)}
    verdicts = {"ok", "fixed", "rejected", "failed"}
    policies = {"fix", "strict", "keep"}
    default = {str(error.code) for error in vars(errors).values() if hasattr(error, "code")}
    assert {"gap", "hu-range", "mask-frame", "worker-died", "rescale-type"} <= found
    assert found - documented == set()
    assert documented - found - default - verdicts - policies == set()
