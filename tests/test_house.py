"""The house rules: lengths, captions, the page of the house, quiet imports, configurations that
load.
"""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qsearch.stages.config

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("qsearch/**/*.py"), *ROOT.glob("kernels/**/*.py")])
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
WRITTEN = {".cff", ".css", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}
HEAVY = {"torch", "shap", "optuna", "diffusers", "triton", "pandas", "scipy"}


def name(path: Path) -> str:
    """Path from the root; a package goes by its folder, as in `qsearch/core/`."""
    return path.relative_to(ROOT).as_posix().removesuffix("__init__.py")


def caption(path: Path) -> str:
    """First paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def public_files() -> list[Path]:
    """The files of the repository: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [
        path
        for path in (ROOT / line for line in listed.stdout.split("\0") if line)
        if path.is_file()
    ]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_file_stays_under_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_opens_with_a_caption(path: Path) -> None:
    assert caption(path).strip(), "the docstring's first paragraph is the caption"


def test_the_page_of_the_house_is_what_its_script_makes() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "house.py"))

    assert (ROOT / "docs" / "house.md").read_text(encoding="utf-8") == names["page"](), (
        "run `python docs/house.py`"
    )
    assert sorted(names["modules"]()) == MODULES


def test_the_readme_names_the_command_that_ci_runs() -> None:
    assert "bash tests/run.sh" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[
        -1
    ] == "bash tests/run.sh"


@pytest.mark.parametrize(
    "call",
    ["import qsearch", "runpy.run_module('qsearch.cli', run_name='__main__')"],
    ids=["import", "help"],
)
def test_starting_up_loads_nothing_heavy(call: str) -> None:
    script = (
        "import contextlib, runpy, sys\nsys.argv = ['qsearch', '--help']\nwith "
        f"contextlib.suppress(SystemExit):\n    {call}\nprint('loaded:', *sorted(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    loaded = {module.partition(".")[0] for module in done.stdout.rpartition("loaded:")[2].split()}
    assert "qsearch" in loaded
    assert loaded & HEAVY == set()


def test_kernels_is_a_folder_and_no_package() -> None:
    assert (ROOT / "kernels" / "qsearch_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_there_are_configurations() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    assert qsearch.stages.config.load(path).model


def test_no_file_names_the_host_of_a_package_registry() -> None:
    hosts = re.compile(
        rb"[p]ypi\.(org|python)|[p]ythonhosted|[d]ownload\.pytorch|[a]naconda\.(org|com)|[n]pmjs"
    )  # brackets, not to name them here

    assert hosts.search(b"files.%s.org" % b"".join([b"python", b"hosted"])) is not None
    assert [name(path) for path in public_files() if hosts.search(path.read_bytes())] == []


def test_no_file_says_to_install_this_package_by_its_name() -> None:
    """Until it is published the index knows no package of that name."""
    said = re.compile(rb"pip install [^`\n]*\b[q]search-diffusion")
    assert said.search(b"pip install '%s[ray]'" % b"-".join([b"qsearch", b"diffusion"])) is not None
    assert [name(path) for path in public_files() if said.search(path.read_bytes())] == []


def test_a_file_that_is_named_is_there() -> None:
    """In prose, docstrings and comments; `NAME` and `*` stand for any."""
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    texts += [
        p for d in ("qsearch", "kernels", "tests", "configs", "docs") for p in (ROOT / d).rglob("*")
    ]
    named = re.compile(r"`((?:tests|qsearch|kernels|configs|docs)/[\w/.-]+\.(?:py|md|yaml|json))`")
    lost = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        if path.suffix in (".py", ".md", ".yaml")
        for name in named.findall(path.read_text(encoding="utf-8"))
        if "NAME" not in name and not (ROOT / name).exists()
    }

    assert lost == set()


def too_long(path: Path) -> list[int]:
    """Numbers of the lines over 100 columns; rows of Markdown tables, and what type checkers and
    linters are told at a line's end, cannot be broken.
    """
    text = path.read_text(encoding="utf-8")
    lines = [re.sub(r"\s+# (type: ignore|noqa).*", "", line) for line in text.splitlines()]
    table = "|" if path.suffix == ".md" else "\0"
    return [
        number
        for number, line in enumerate(lines, 1)
        if len(line) > 100 and not line.startswith(table)
    ]


def test_lines_have_at_most_100_columns(tmp_path: Path) -> None:
    written = [p for p in public_files() if p.suffix in WRITTEN or p.parent.name == ".ci"]
    assert {name(p): lines for p in written if (lines := too_long(p))} == {}

    (tmp_path / "page.md").write_text(f"| {'x' * 100} |\n{'word ' * 21}\n")
    assert too_long(tmp_path / "page.md") == [2]


def documented(node: ast.FunctionDef) -> set[str]:
    """What the docstring of a public function lacks: `Args`, `Returns`."""
    taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given = [a.arg for a in taken if a.arg not in ("self", "cls")]
    words = ast.get_docstring(node) or ""
    returns = node.returns is not None and ast.unparse(node.returns) != "None"
    lacks = {"Args"} if given and "Args:" not in words else set()
    if returns and not re.search("^(Returns|Yields):", words, re.MULTILINE):
        lacks.add("Returns")
    return lacks


def public_functions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods that the reference shows; properties are read like attributes."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner, method in public_functions(node.body):
                if not any("property" in ast.unparse(d) for d in method.decorator_list):
                    yield f"{node.name}.{inner}", method


def test_what_the_reference_shows_says_what_it_takes_and_gives_back() -> None:
    shown = runpy.run_path(str(ROOT / "docs" / "site_pages" / "python_api.py"))["shown"](ROOT)
    assert len(shown) > 30
    lacking = {}
    for module, names in shown.items():
        path = ROOT.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not names or getattr(node, "name", "") in names:
                for title, function in public_functions([node]):
                    if lacks := documented(function):
                        lacking[f"{module}.{title}"] = sorted(lacks)

    assert lacking == {}
    [bare] = ast.parse('def f(x: int) -> int:\n    """Words."""').body
    assert isinstance(bare, ast.FunctionDef)
    assert documented(bare) == {"Args", "Returns"}


def test_the_version_is_the_same_wherever_it_stands() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert f"\nversion: {project['version']}\n" in cited
    newest = re.search(r"^## (\S+) \((\S+)\)$", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["version"]
    assert f"\ndate-released: {newest[2]}\n" in cited


#: what was written before -> the field's word
RETIRED = {
    r"\bclass (Shares|Question|Answer|Clean|Sampled|Lesson|Line)\b": "see the glossary",
    r"\btrust_of\b": "shrinkage_weight",
    r"\bkept_bytes\b": "saved_activation_bytes",
    r"\btreatments?\b": "input quantizer",
    r"\b[Cc]ampaigns?\b": "evaluation of plans",
    r"\b_meet\w*\(": "contract",
    r"\bspanning\(": "qparams_from_range",
    r"\bstands? few bits\b": "tolerates few bits",
    r"\b(goes|go|gone) on (where|with as)\b": "resumes",
    r"\bsigns? of life\b": "heartbeat",
    r"\bheard\b": "called, recorded",
    r"\bnobody (says|looked|tells)\b": "unknown",
    r"\bsomebody else\b": "another package, another worker",
    r"\bplans? (that )?(was|is|were|are) given up\b": "stopped early",
}
#: the word that stored keys have
_STORED = 'setting_of(run, "campaign"'


def retired(text: str) -> list[str]:
    """The retired words that a text still has."""
    text = text.replace(_STORED, "")
    return [found[0] for pattern in RETIRED for found in re.finditer(pattern, text)]


def test_words_that_were_replaced_do_not_come_back() -> None:
    old_names = ROOT / "qsearch" / "__init__.py"  # holds them on purpose
    said = [*MODULES, ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    said.remove(old_names)
    lines = {name(p): found for p in said if (found := retired(p.read_text(encoding="utf-8")))}

    assert lines == {}, f"in the field's words: {RETIRED}"
    assert retired("a campaign: plans that were given up") == [
        "campaign",
        "plans that were given up",
    ]


def imported_at_once(body: list[ast.stmt]) -> set[str]:
    """Top-level packages that a module imports when it is imported itself."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_no_module_imports_what_windows_lacks() -> None:
    posix = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
    imports = {p: imported_at_once(ast.parse(p.read_text(encoding="utf-8")).body) for p in MODULES}

    assert {name(p): held & posix for p, held in imports.items() if held & posix} == {}
    assert imported_at_once(ast.parse("import fcntl\nfrom pwd import getpwnam").body) & posix
