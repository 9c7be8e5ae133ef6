"""Wheel, sdist and checkouts all hold `methods/`, as `bilevel.methods` and nothing else."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import bilevel
from tests.test_house_rules import ROOT, project_files, python_files

# One test process for all of them: they share the built archives.
pytestmark = pytest.mark.xdist_group("packaging")

# Says where a fresh interpreter got the packages from, and that every public class knows its name.
PROBE = """
import sys, inspect
import bilevel, bilevel.methods as methods
for member in vars(methods).values():
    if inspect.isclass(member) and member.__module__.split(".")[0] in ("bilevel", "methods"):
        assert member.__module__.startswith("bilevel."), member
assert methods.__name__ == methods.__spec__.name == "bilevel.methods"
assert "methods" not in sys.modules
print(bilevel.__file__)
print(methods.__file__)
"""


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "COV"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def succeed(*command: object, cwd: Path, **env: str) -> str:
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, a wheel made from it, and a wheel made from the checkout."""
    for module in ("build", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"`{module}` is not installed; the `dev` extra brings it")
    project_files()  # listed before the build, so that what comes later is not missed in it
    out = tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    succeed(*build, out / "sdist", ROOT, cwd=out)  # the sdist, then the wheel from it
    succeed(*build, out / "direct", "--wheel", ROOT, cwd=out)
    return {
        "sdist": next((out / "sdist").glob("*.tar.gz")),
        "wheel from the sdist": next((out / "sdist").glob("*.whl")),
        "wheel": next((out / "direct").glob("*.whl")),
    }


WHEELS = pytest.mark.parametrize("kind", ["wheel", "wheel from the sdist"])


@WHEELS
def test_wheel_holds_every_module_as_a_real_file(built: dict[str, Path], kind: str) -> None:
    with zipfile.ZipFile(built[kind]) as wheel:
        modes = {info.filename: info.external_attr >> 16 for info in wheel.infolist()}
    expected = {"bilevel/py.typed"}
    for path in python_files("bilevel", "methods"):
        inside = path if path.parts[0] == "bilevel" else Path("bilevel") / path
        expected.add(inside.as_posix())
    assert "bilevel/methods/__init__.py" in expected
    assert expected <= modes.keys()
    assert not [name for name, mode in modes.items() if mode & 0o170000 == 0o120000], "a link"
    tops = {name.split("/")[0] for name in modes}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bilevel"}


def test_sdist_holds_everything_that_is_tracked(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        members = sdist.getmembers()
    names = {"/".join(Path(member.name).parts[1:]) for member in members}
    left_out = {".gitattributes", "bilevel/methods"}  # the link: `methods/` itself is there
    assert {path.as_posix() for path in project_files(new=False)} - left_out <= names
    for needed in ("Makefile", "constraints.txt", "LICENSE", "README.md", "methods/__init__.py"):
        assert needed in names
    assert not [member.name for member in members if member.issym() or member.islnk()]


@WHEELS
def test_installed_wheel_imports_away_from_the_checkout(
    built: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    scheme = {"base": str(environment), "platbase": str(environment)}
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / Path(sys.executable).name
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # torch and the others are borrowed from this environment instead of being installed again.
    # Links to the checkout (.pth files) in borrowed folders are not followed.
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    succeed(*pip, "install", "--no-deps", "--no-index", "--no-compile", built[kind], cwd=tmp_path)
    for origin in succeed(python, "-W", "error", "-c", PROBE, cwd=tmp_path).splitlines():
        assert Path(origin).is_relative_to(packages), origin
    script = python.with_name("bilevel" + python.suffix)
    assert script.is_file()


def test_one_version_everywhere() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert bilevel.__version__ == version
    assert f"\nversion: {version}\n" in citation


def test_checkout_without_links_imports(tmp_path: Path) -> None:
    for path in project_files():
        if path.parts[0] in ("bilevel", "methods") and not (ROOT / path).is_symlink():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    # git writes a link this way where it cannot make one
    (tmp_path / "bilevel" / "methods").write_text("../methods", encoding="utf-8")
    origins = succeed(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert origins.splitlines() == [
        str(tmp_path / "bilevel" / "__init__.py"),
        str(tmp_path / "methods" / "__init__.py"),
    ]


def test_methods_refuses_its_other_name() -> None:
    done = run(sys.executable, "-c", "import methods", cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "ImportError: import `bilevel.methods`, not `methods`" in done.stderr


def test_a_first_look_needs_neither_linters_nor_documentation_tools(tmp_path: Path) -> None:
    """`make demo` installs less than the other targets; each works after the other."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)

    def planned(target: str) -> str:
        return succeed("make", "--dry-run", f"PYTHON={sys.executable}", target, cwd=tmp_path)

    def has(stamp: str) -> None:
        (tmp_path / ".venv").mkdir(exist_ok=True)
        (tmp_path / ".venv" / stamp).touch()

    constrained = "--constraint constraints.txt --editable"
    assert f"{constrained} '.[report]'" in planned("demo")
    assert "[dev]" not in planned("demo")
    assert f"{constrained} '.[dev]'" in planned("unit")
    has(".look")
    assert "pip" not in planned("demo")
    assert f"{constrained} '.[dev]'" in planned("unit")
    has(".ok")
    assert "pip" not in planned("unit")
    (tmp_path / ".venv" / ".look").unlink()
    assert "pip" not in planned("demo")


def test_importing_loads_nothing_that_is_not_needed() -> None:
    heavy = (
        "torch._inductor torch._dynamo torchvision torchmetrics sklearn matplotlib rich pandas PIL "
        "IPython"
    )
    code = f"import sys, bilevel.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
