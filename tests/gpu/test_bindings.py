"""Binds every call into CuPy, cupyx and cuCIM to the signature of the installed version; needs the wheels but no GPU.

The calls are read from the source, so a new one is bound as soon as it is written.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
BACKEND = "gpuprep/compute/cupy_backend.py"
FILES = (BACKEND, "tests/gpu/test_gpu.py")
LIBRARIES = ("cupy", "cupyx", "cucim")

OBJECTS = {
    "compile": "cupy.RawKernel.compile",
    "cucim_resize": "cucim.skimage.transform.resize",
    "free_all_blocks": "cupy.cuda.MemoryPool.free_all_blocks",
    "gaussian_filter": "cupyx.scipy.ndimage.gaussian_filter",
    "get": "cupy.ndarray.get",
    "kernel": "cupy.RawKernel.__call__",
    "record": "cupy.cuda.Event.record",
    "set": "cupy.ndarray.set",
    "synchronize": "cupy.cuda.Event.synchronize",
    "zoom": "cupyx.scipy.ndimage.zoom",
}
"""What the backend calls through variables, by the last name: methods, and functions that are imported when needed."""

NOT_CUPYS = {"decode", "empty", "free_bytes", "on", "split", "startswith", "work"}
"""What else it calls through variables."""

needs_cupy = pytest.mark.skipif(
    find_spec("cupy") is None or find_spec("cucim") is None, reason="CuPy or cuCIM is not installed"
)


class Aliases(dict[str, str]):
    """Names in a file that stand for something in CuPy, cupyx or cuCIM, and the dotted names of what they stand for."""

    def __init__(self, tree: ast.Module) -> None:
        super().__init__({name: name for name in LIBRARIES})
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.update({n.asname: n.name for n in node.names if n.asname and self._is_theirs(n.name)})
            elif isinstance(node, ast.ImportFrom) and self._is_theirs(node.module or ""):
                self.update({n.asname or n.name: f"{node.module}.{n.name}" for n in node.names})
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (name := self.of(node.value)):
                self[node.targets[0].id] = name

    @staticmethod
    def _is_theirs(module: str) -> bool:
        return module.split(".")[0] in LIBRARIES

    def of(self, node: ast.expr) -> str | None:
        """Return the full dotted name that an expression stands for; None if it is nothing of these libraries."""
        written = ast.unparse(node)
        if not re.fullmatch(r"\w+(\.\w+)*", written) or (first := written.split(".")[0]) not in self:
            return None
        return self[first] + written[len(first) :]


def parsed(file: str) -> ast.Module:
    return ast.parse((PROJECT / file).read_text("utf-8"))


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def found(name: str) -> Any:
    """Return what a dotted name stands for."""
    first, *parts = name.split(".")
    path = first

    def step(owner: Any, part: str) -> Any:
        nonlocal path
        path += f".{part}"
        if isinstance(owner, ModuleType) and not hasattr(owner, part):
            return import_module(path)
        return getattr(owner, part)

    return reduce(step, parts, import_module(first))


def signature_of(function: Any) -> Signature:
    """Return the signature; of compiled code it is in the first line of the docstring."""
    try:
        return inspect.signature(function)
    except ValueError:
        first_line = (function.__doc__ or "").strip().split("\n")[0].replace("\\", "")
    written = re.match(r"[\w.]+\((.*)\)(?: -> \w+)?$", first_line)
    assert written, f"no signature of {function} in {first_line!r}"
    untyped = re.sub(r"(^|, )\w+ (?=\w)", r"\1", written[1])  # "str code, int device=-1": names of types precede
    (defined,) = ast.parse(f"def function({untyped}): ...").body
    assert isinstance(defined, ast.FunctionDef)
    args = defined.args
    before, after = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
    positional = [(before, a) for a in args.posonlyargs] + [(after, a) for a in args.args]
    required = len(positional) - len(args.defaults)
    parameters = [
        Parameter(a.arg, kind, default=Parameter.empty if n < required else None)
        for n, (kind, a) in enumerate(positional)
    ]
    if args.vararg:
        parameters.append(Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    for name, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parameters.append(
            Parameter(name.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None)
        )
    if args.kwarg:
        parameters.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def bind(signature: Signature, call: ast.Call, *, bound: bool = False) -> None:
    """Bind the arguments of a call; `bound` if it is one of a method, whose object is the first argument."""
    given = [a for a in call.args if not isinstance(a, ast.Starred)]
    named = {k.arg: k.value for k in call.keywords if k.arg}
    complete = len(given) == len(call.args) and len(named) == len(call.keywords)
    try:
        (signature.bind if complete else signature.bind_partial)(*[None] * bound, *given, **named)
    except TypeError as exc:
        raise AssertionError(f"line {call.lineno}: {ast.unparse(call)} does not fit {signature}: {exc}") from None


@needs_cupy
@pytest.mark.parametrize("file", FILES)
def test_every_name_of_cupy_and_cucim_that_is_used_exists(file: str) -> None:
    tree = parsed(file)
    aliases = Aliases(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)]
    names = {name for node in nodes if (name := aliases.of(node))}
    assert names
    for name in names:
        found(name)


@needs_cupy
@pytest.mark.parametrize("file", FILES)
def test_every_call_of_a_function_of_cupy_and_cucim_fits_its_signature(file: str) -> None:
    tree = parsed(file)
    aliases = Aliases(tree)
    called = [(name, call) for call in calls(tree) if (name := aliases.of(call.func))]
    assert called
    for name, call in called:
        bind(signature_of(found(name)), call)


def calls_through_variables() -> dict[ast.Call, str]:
    """Return calls of the backend of what it has neither imported nor defined, with the last name of each."""
    tree = parsed(BACKEND)
    known = {"self", *vars(builtins), *Aliases(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
    last = {}
    for call in calls(tree):
        owner = call.func
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        if not isinstance(owner, ast.Name) or owner.id not in known:
            last[call] = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    return last


def test_it_is_known_of_every_call_through_a_variable_whether_it_is_one_of_cupy() -> None:
    called = set(calls_through_variables().values())
    assert called <= {*OBJECTS, *NOT_CUPYS}, "add the new ones to OBJECTS or NOT_CUPYS"
    assert called >= set(OBJECTS), "remove from OBJECTS what is not called"


@needs_cupy
def test_every_call_through_a_variable_fits_its_signature() -> None:
    for call, name in calls_through_variables().items():
        if full_name := OBJECTS.get(name):
            is_method = inspect.isclass(found(full_name.rpartition(".")[0]))
            bind(signature_of(found(full_name)), call, bound=is_method)


@needs_cupy
def test_every_call_of_an_array_namespace_fits_the_one_of_cupy() -> None:
    # Code for both backends calls `xp.name(...)`, with xp = array_api_compat.array_namespace(array).
    called = 0
    for path in sorted((PROJECT / "gpuprep").rglob("*.py")):
        for call in calls(ast.parse(path.read_text("utf-8"))):
            if match := re.fullmatch(r"(?:xp|array_namespace\(.*\))\.(\w+)", ast.unparse(call.func)):
                bind(signature_of(found(f"array_api_compat.cupy.{match[1]}")), call)
                called += 1
    assert called >= 20


@pytest.mark.parametrize(
    ("signature", "call", "fits"),
    [
        ("f(str code, tuple options=(), *, bool jitify=False)", "f('x', ())", True),
        ("f(str code, tuple options=(), *, bool jitify=False)", "f('x', (), True)", False),
        ("f(str code, tuple options=(), *, bool jitify=False)", "f(options=())", False),
        ("f(int device) -> int", "f(*devices)", True),
        ("f(int device) -> int", "f(*devices, ordinal=1)", False),
        ("f(x1, x2, /, out=None, \\*, dtype=None)", "f(a, b, out=c)", True),
        ("f(x1, x2, /, out=None, \\*, dtype=None)", "f(x1=a, x2=b)", False),
        ("f(self, grid, block, args, **kwargs)", "f(s, g, b, a, shared_mem=0)", True),
    ],
)
def test_signatures_of_compiled_code_are_read_from_docstrings(signature: str, call: str, fits: bool) -> None:
    class Compiled(dict[str, str]):  # inspect knows no signature of dict
        __doc__ = signature

    parsed_call = ast.parse(call, mode="eval").body
    assert isinstance(parsed_call, ast.Call)
    try:
        bind(signature_of(Compiled), parsed_call)
    except AssertionError:
        assert not fits
    else:
        assert fits
