"""Rules of the house that no linter knows: sizes, who may import whom, what may not be written."""

import ast
import enum
import importlib.util
import inspect
import re
import shutil
import subprocess
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import bilevel.methods
from bilevel import Problem
from bilevel.methods import EBLVM

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bilevel", "methods")
SCRIPTS = ("examples", "benchmarks")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
TORCH_NAMES = {"forward", "state_dict", "load_state_dict"}  # they mean here what they mean there

# In pieces, or this file would break its own rule.
PACKAGE_HOSTS = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("anaconda", "org"),
            ("anaconda", "com"),
            ("npmjs", "org"),
            ("npmjs", "com"),
            ("unpkg", "com"),
            ("jsdelivr", "net"),
            ("download", "pytorch", "org"),
        )
    ),
    re.IGNORECASE,
)
# A path that exists on one machine only.
PRIVATE_PATHS = re.compile(r"(?<![\w./])/(?:home|root|work|Users)/\w|(?<![\w.])/tmp/\w")


@cache
def project_files(*, new: bool = True) -> tuple[Path, ...]:
    """What belongs to the project, relative to its root; links are listed, not followed.

    `new` adds what git neither tracks nor ignores: a file that is still being written.
    """
    if (ROOT / ".git").exists() and shutil.which("git"):
        kinds = ["--cached", "--others", "--exclude-standard"] if new else ["--cached"]
        listing = subprocess.run(
            ["git", "ls-files", "-z", *kinds], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found = [Path(name) for name in listing.stdout.split("\0") if name]
    else:  # an unpacked sdist
        rooms = (*PACKAGES, *SCRIPTS, "tests", "docs")
        found = [path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()]
        found += [path for path in ROOT.iterdir() if path.is_file() and path.name != "PKG-INFO"]
        found = [path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts]
    present = (path for path in found if (ROOT / path).is_file() or (ROOT / path).is_symlink())
    return tuple(sorted(present))


def python_files(*rooms: str) -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py" and path.parts[0] in rooms]


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, those inside functions included."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            for alias in node.names:
                yield node.lineno, f"{dots}{node.module or ''}.{alias.name}"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, signature included; its docstring may be as long as it has to be."""
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def test_files_and_functions_are_short() -> None:
    too_long = []
    for path in python_files(*PACKAGES, *SCRIPTS):
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE_LINES:
            too_long.append(f"{path}: {lines} lines")
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node)
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long, "\n".join(too_long)


def test_dependencies_point_one_way() -> None:
    allowed = {  # room: the rooms it may import from
        "bilevel": ("bilevel",),
        "methods": ("bilevel", "bilevel.methods"),
    }
    ours = ("bilevel", "bilevel.methods", "methods", "examples", "benchmarks", "tests")
    wrong = []
    for path in python_files(*PACKAGES):
        if path.parts[0] == "bilevel" and path.parts[1].startswith("cli"):
            continue  # the command line knows everybody
        for line, name in imported(path):
            room = max((room for room in ours if within(name, room)), key=len, default=None)
            if room is not None and room not in allowed[path.parts[0]]:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_compiling_knows_torch_alone() -> None:
    """Trees and linear solvers ask whether they are traced, so this is the lowest floor."""
    wrong = [
        f"{path}:{line} imports {name}"
        for path in python_files("bilevel")
        for line, name in imported(path)
        if path.parts[1] == "compile"
        and within(name, "bilevel")
        and not within(name, "bilevel.compile")
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute() -> None:
    relative = [
        f"{path}:{line} imports {name}"
        for path in python_files(*PACKAGES)
        for line, name in imported(path)
        if name.startswith(".")
    ]
    assert not relative, "\n".join(relative)


# From the top down; what stands on one line does not know each other.
FLOORS = (
    ("suite", "presets"),
    ("catalogue",),
    ("report",),
    ("a paper", "evaluation"),
    ("eblvm",),
    ("models",),
    ("objectives", "likelihood", "samplers"),
    ("variational",),
    ("training",),
    ("machines",),
    ("networks",),
    ("data",),
)
FLOOR = {room: height for height, rooms in enumerate(reversed(FLOORS)) for room in rooms}
FOR_PAPERS = ("bilevel.methods.data.sides", "bilevel.methods.data.visibles")  # nothing that loads
FOR_NETWORKS = ("bilevel.methods.data.sides",)


def room_of(module: str) -> str | None:
    """The room of `bilevel.methods` that a module is in, `None` for the package itself."""
    first = module.removeprefix("bilevel.methods").removeprefix(".").split(".")[0]
    if first in FLOOR:
        return first
    return "a paper" if (ROOT / "methods" / f"{first}.py").is_file() else None


def stands_below(module: str, here: str) -> bool:
    """Whether a module may be imported in a room."""
    there = room_of(module)
    if there is None:
        return False
    if there == "data" and here in ("a paper", "networks"):
        return module.startswith(FOR_PAPERS if here == "a paper" else FOR_NETWORKS)
    return FLOOR[there] < FLOOR[here] or (there == here and here != "a paper")


def test_every_room_of_the_methods_imports_from_below_only() -> None:
    wrong = []
    for path in python_files("methods"):
        if path == Path("methods/__init__.py"):
            continue  # it shows everything that is public
        here = room_of("bilevel." + ".".join(path.with_suffix("").parts))
        assert here is not None, f"{path} is in no room; give it a place in `FLOORS`"
        for line, name in imported(path):
            module = name.rpartition(".")[0]
            if not within(module, "bilevel.methods"):
                continue
            if not stands_below(name, here):
                wrong.append(f"{path}:{line} ({here}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_page_of_the_rooms_tells_the_truth() -> None:
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:bilevel|methods|benchmarks|docs)/[\w./]*)`", page)
    paths = [ROOT / name for name in named if "NAME" not in name and "COMMAND" not in name]
    assert not [path for path in paths if not path.exists()]
    table = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    told = [line.split("|")[2] for line in table]
    assert len(told) == len(FLOORS)
    for rooms, line in zip(FLOORS, told, strict=True):
        assert all(room.removeprefix("a ") in line for room in rooms), f"{rooms} and {line}"


# ---------------------------------------------------------------- classes: abstract or final

RULED = ("bilevel", "methods", "benchmarks")  # packages whose classes obey
ELSEWHERE = Path(
    "benchmarks", "in_jax"
)  # runs in JAX's environment: cannot be imported in this one
HOOKS = {  # concrete methods that are made to be overridden, by the class that says so
    "LinearSolver": {"prepared", "separates", "unwatched"},
    "Problem": {
        "draw",
        "begin_draw",
        "finish_draw",
        "draw_lower",
        "share",
        "shard",
        "best_response",
        "lower_condition",
        "lower_constraints",
        "initial_lower",
        "gives_initial_lower",
    },
    "EBLVM": {"lower_loss", "optimizers", "default_solver", "rewritings"},
    "LatentModel": {"abilities"},
    "VariationalPosterior": {"mean", "exact", "known_score", "rewriting"},
    "VariationalJoint": {"exact_draws", "visible_mean", "rewriting", "code_noise", "bound"},
    "Solver": {
        "at_once",
        "begin",
        "bound",
        "context",
        "check",
        "rehearse",
        "num_lower_batches",
        "separates",
        "unrolled_steps",
        "approximates",
    },
}
ASKED_FOR_ITS_CLASS = {  # "file: class", why nobody could be asked instead; this list only shrinks
    "bilevel/compile/guards.py: _Same": "`==` with whatever it is compared with",
    "bilevel/moved.py: _Moved": "finders of others stand in the same list",
    "bilevel/problem.py: Problem": "an argument: the refusal says what to give",
    "bilevel/lower_field.py: Constraint": "what a user's method returned: the refusal says what to give",
    "bilevel/solvers/given.py: LinearSolver": "an argument: the refusal says what to give",
    "bilevel/solvers/given.py: Solver": "an argument: the refusal says what to give",
    "bilevel/solvers/implicit.py: LinearSolver": "the argument may be a function",
    "bilevel/second_order.py: SyncBatchNorm": "a user's layers are looked at, torch's among them",
    "bilevel/sync_batch_norm.py: SyncBatchNorm": "a user's layers are replaced, torch's among them",
    "bilevel/batches.py: hasattr": "data of the user's",
    "methods/data/containers.py: hasattr": "data of the user's",
    "methods/machines/base.py: BoltzmannMachine": "`as_machine`, which tells one from a user's energy",
    "bilevel/loaders.py: hasattr": "samplers of the user's",
    "bilevel/optimizers.py: hasattr": "an argument, of torch or torchopt",
    "bilevel/twins/functional.py: hasattr": "torchopt has no class for a chain",
}


@cache
def ruled_files() -> dict[Path, ModuleType]:
    """The modules under the rules about classes, by their files."""
    found = {}
    for path in python_files(*RULED):
        parts = path.with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        name = ".".join(("bilevel", *parts) if parts[0] == "methods" else parts)
        if parts[-1] != "__main__" and ELSEWHERE not in path.parents:
            found[path] = importlib.import_module(name)
    return found


def is_ours(kind: object) -> bool:
    """Whether it is a class of the project that somebody could derive from."""
    return (
        inspect.isclass(kind)
        and any(within(kind.__module__, package) for package in ("bilevel", "benchmarks"))
        and not getattr(kind, "_is_protocol", False)
        and not issubclass(kind, BaseException | enum.Enum)
    )


def our_classes() -> list[type]:
    found = {
        member
        for module in ruled_files().values()
        for member in vars(module).values()
        if is_ours(member) and member.__module__ == module.__name__
    }
    return sorted(found, key=lambda kind: (kind.__module__, kind.__qualname__))


def test_a_class_is_abstract_or_final() -> None:
    wrong = [
        f"{kind.__module__}.{kind.__qualname__} is neither: give it `@final`, or what it lacks"
        for kind in our_classes()
        if not inspect.isabstract(kind) and not getattr(kind, "__final__", False)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_method_overrides_a_concrete_one() -> None:
    wrong = []
    for kind in our_classes():
        for base in filter(is_ours, kind.__mro__[1:]):
            for name in vars(kind).keys() & vars(base).keys():
                theirs, mine = vars(base)[name], vars(kind)[name]
                code = inspect.isroutine(mine) or isinstance(mine, property | classmethod)
                made_for_it = name in HOOKS.get(base.__name__, set()) or name.startswith("__")
                abstract = getattr(theirs, "__isabstractmethod__", False)
                if code and not abstract and not made_for_it and theirs is not mine:
                    where = f"{kind.__module__}.{kind.__qualname__}.{name}"
                    wrong.append(f"{where} overrides that of `{base.__name__}`")
    assert not wrong, "\n".join(wrong)


def test_no_method_is_called_past_its_object() -> None:
    """`Base.method(self, ...)` is a `super()` in disguise."""
    wrong = []
    for path, module in ruled_files().items():
        for node in ast.walk(syntax(path)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            first = node.args[0] if node.args else None
            passed = isinstance(first, ast.Name) and first.id == "self"
            if passed and any(map(is_ours, meant(node.func.value, module))):
                wrong.append(f"{path}:{node.lineno} {ast.unparse(node.func)}(self, ...)")
    assert not wrong, "\n".join(wrong)


def meant(expression: ast.expr, module: ModuleType) -> list[object]:
    """The classes that an expression of a module names: one, a tuple or a union of them."""
    try:
        value = eval(ast.unparse(expression), dict(vars(module)))
    except (NameError, AttributeError, TypeError):  # it names something local
        return []
    waiting, found = [value], []
    while waiting:
        one = waiting.pop()
        parts = one if isinstance(one, tuple) else typing.get_args(one)
        waiting += parts
        found += [] if parts else [one]
    return found


def class_tests(path: Path, module: ModuleType) -> Iterator[tuple[int, str]]:
    """Line and class (or "hasattr") of every place that asks an object what it is."""
    for node in ast.walk(syntax(path)):
        kinds: list[object] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "hasattr":
                yield node.lineno, "hasattr"
            elif node.func.id in ("isinstance", "issubclass"):
                kinds = meant(node.args[1], module)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(ast.unparse(side).startswith("type(") for side in sides):
                kinds = [kind for side in sides for kind in meant(side, module)]
                if any(ast.unparse(side).endswith(").__name__") for side in sides):
                    yield node.lineno, "__name__"
        elif isinstance(node, ast.MatchClass):
            kinds = meant(node.cls, module)
        for kind in filter(is_ours, kinds):
            yield node.lineno, getattr(kind, "__name__", "")


def test_objects_are_asked_not_their_class() -> None:
    found = [
        (f"{path}: {what}", line)
        for path, module in ruled_files().items()
        for line, what in class_tests(path, module)
    ]
    wrong = [f"{where}, line {line}" for where, line in found if where not in ASKED_FOR_ITS_CLASS]
    assert not wrong, "ask the object, not for its class:\n" + "\n".join(wrong)
    stale = ASKED_FOR_ITS_CLASS.keys() - {where for where, _ in found}
    assert not stale, f"take these from `ASKED_FOR_ITS_CLASS`: {sorted(stale)}"


# ---------------------------------------------------------------- a paper is a paper

PAPERS = tuple(
    path
    for path in python_files("methods")
    if len(path.parts) == 2 and path.stem not in ("__init__", "eblvm", "catalogue")
)
PAPER_HELPERS = {
    "draw",
    "begin_draw",
    "finish_draw",
    "draw_lower",
    "share",
    "shard",
    "upper_loss",
    "lower_loss",
    "best_response",
}
A_PAPERS_SHARE = 0.4


def paper_class(path: Path) -> type:
    module = importlib.import_module("bilevel." + ".".join(path.with_suffix("").parts))
    public = [
        member
        for name, member in vars(module).items()
        if inspect.isclass(member)
        and issubclass(member, EBLVM)
        and member.__module__ == module.__name__
    ]
    assert len(public) == 1, f"{path} holds {len(public)} methods; a paper has a file of its own"
    return public[0]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_module_of_the_methods_is_a_paper(path: Path) -> None:
    """One final class, right above `EBLVM`, that says where it is from and where it differs."""
    kind = paper_class(path)
    assert getattr(kind, "__final__", False)
    assert kind.__bases__ == (EBLVM,)
    assert kind.__name__ in bilevel.methods.__all__
    assert "References:" in (kind.__doc__ or "")
    above = [base for base in kind.__mro__[1:] if within(base.__module__, "bilevel")]
    assert above == [EBLVM, Problem]


def code(node: ast.AST) -> set[int]:
    """Lines of code of a node: no docstrings, no comments, no blanks."""
    lines = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.expr | ast.stmt | ast.arg | ast.keyword)
        for line in (inner.lineno, inner.end_lineno or inner.lineno)
    }
    for inner in ast.walk(node):
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
            lines -= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def share_of_the_paper(path: Path) -> float:
    """Code of draws, losses and what they call, over all code but that of imports and constructors."""
    tree = syntax(path)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    waiting, paper = [name for name in functions if name in PAPER_HELPERS], set()
    while waiting:
        name = waiting.pop()
        if name in functions and name not in paper:
            paper.add(name)
            waiting += [n.attr for n in ast.walk(functions[name]) if isinstance(n, ast.Attribute)]
            waiting += [n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)]
    batches = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(b) == "NamedTuple" for b in node.bases)
    ]
    lines = set().union(*(code(functions[name]) for name in paper), *map(code, batches))
    making: list[ast.AST] = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    making += [f for name, f in functions.items() if name == "__init__" or name.startswith("for_")]
    rest = code(tree) - set().union(*map(code, making))
    return len(lines) / len(rest | lines)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_papers_file_is_mostly_the_paper(path: Path) -> None:
    """What it does not need for its draws and losses belongs to a room."""
    assert share_of_the_paper(path) >= A_PAPERS_SHARE


def public_modules() -> Iterator[str]:
    for path in python_files(*PACKAGES):
        parts = path.with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts if parts[0] == "bilevel" else ("bilevel", *parts))


def public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The classes and functions a module defines, and the methods of its classes."""
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(member) or inspect.isclass(member):
            yield f"{module.__name__}.{name}", member
        # A protocol repeats names that somebody else documents.
        if inspect.isclass(member) and not getattr(member, "_is_protocol", False):
            for method_name in vars(member).keys() - TORCH_NAMES:
                method = getattr(member, method_name)
                if not method_name.startswith("_") and inspect.isroutine(method):
                    yield f"{module.__name__}.{name}.{method_name}", method


TOLD_APART = {"Batch", "command"}  # each paper's own, each command's own


def test_a_public_name_means_one_thing() -> None:
    homes: dict[str, set[str]] = {}
    for module in public_modules():
        for name, member in public_members(importlib.import_module(module)):
            if name.rpartition(".")[0] == module:  # a class or a function, and no alias of one
                homes.setdefault(getattr(member, "__name__", ""), set()).add(module)
    double = {name: sorted(where) for name, where in homes.items() if len(where) > 1}
    assert double.keys() <= TOLD_APART, double


def test_public_names_are_documented() -> None:
    """An overridden method may stay bare: it inherits the docstring of the abstract one."""
    members = (
        member
        for name in public_modules()
        for member in public_members(importlib.import_module(name))
    )
    bare = [name for name, member in members if not inspect.getdoc(member)]
    assert not bare, "\n".join(sorted(bare))


@pytest.mark.parametrize(
    ("pattern", "what"),
    [(PACKAGE_HOSTS, "a package host"), (PRIVATE_PATHS, "a private path")],
    ids=["package hosts", "private paths"],
)
def test_nothing_ties_the_tree_to_one_place(pattern: re.Pattern[str], what: str) -> None:
    """Where packages come from and where the checkout lies is the user's choice."""
    found = []
    for path in project_files():
        if (ROOT / path).is_symlink():
            continue
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or an array
        found += [f"{path}: names {what}, {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)


# ---------------------------------------------------------------------- how tests reach the code

# A disk that fails is an `open` of the module that writes; no argument stands for it.
PATCHED = {("tests/faults.py", "bilevel.files.open")}
PATCHING = ("setattr", "delattr", "patch")


def import_names(path: Path) -> dict[str, str]:
    """The names that imports give in a file, and what they stand for."""
    names = {}
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = before + alias.name
                names[alias.asname or alias.name] = whole if alias.asname or before else alias.name
    return names


def replaced(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, owner and name of every attribute that a file replaces in what it did not make itself."""
    names = import_names(path)

    def owner(node: ast.expr) -> str:
        text = ast.unparse(node)
        known = max((n for n in names if within(text, n)), key=len, default=None)
        return text if known is None else names[known] + text[len(known) :]

    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(PATCHING):
            match node.args:
                case [ast.Constant(value=str(target)), *_] if "." in target:
                    yield node.lineno, *target.rsplit(".", 1)
                case [first, ast.Constant(value=str(name)), *_]:
                    yield node.lineno, owner(first), name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and is_module(owner(target.value)):
                    yield node.lineno, owner(target.value), target.attr


def is_module(name: str) -> bool:
    """Whether this is the name of a module of ours."""
    try:
        return within(name, "bilevel") and importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a class, or one of its members
        return False


def test_tests_use_arguments_and_turn_no_private_knob() -> None:
    """What only a patch can reach nobody else can reach either."""
    turned = []
    for path in python_files("tests"):
        others = {name.split(".")[0] for name in import_names(path).values()} - {"bilevel", "tests"}
        for line, owner, name in replaced(path):
            private = name.startswith("_") and not name.startswith("__")
            foreign = owner.split(".")[0] in others
            excused = (path.as_posix(), f"{owner}.{name}") in PATCHED
            if ((private and not foreign) or is_module(owner)) and not excused:
                turned.append(f"{path}:{line} replaces `{owner}.{name}`")
    assert not turned, "\n".join(turned)
