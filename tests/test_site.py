"""The site is built strictly, without a network; every page looks right in a browser; what is
missing ends the build with its name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.browser import CHROMIUM, WIDTHS, look_at

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from site_pages import (  # noqa: E402  # beside the pages
    claims,
    figures,
    markdown,
    maths,
    methods,
    notebooks,
    results,
    tables,
)
from site_pages.missing import MissingError  # noqa: E402

OUTSIDE = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(https?:)?//|"""
    r"""<link[^>]+rel=["']?(?:stylesheet|preconnect)["']?[^>]+href=["']?(https?:)?//"""
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `python docs/build.py` does; what it prints is in `built.txt` beside
    it.
    """
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder.parent / "built.txt").write_text(done.stdout)
    return folder


def test_the_site_is_built_strictly_and_says_how_large_it_is(site: Path) -> None:
    said = (site.parent / "built.txt").read_text()

    found = re.search(r"(\d+) pages, (\d+) links checked, (\d+) s", said)
    assert found is not None, said
    assert int(found[1]) >= 80
    assert int(found[2]) > 5000


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert OUTSIDE.search(page.read_text(encoding="utf-8")) is None, page
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8"), style
    assert OUTSIDE.search('<script src="https://elsewhere/x.js">') is not None


def test_every_measured_file_and_every_card_has_its_page(site: Path) -> None:
    for one in figures.figures(ROOT).values():
        page = (site / "results" / f"{one.script}.html").read_text(encoding="utf-8")
        assert f'id="{one.name}"' in page
    for card in (ROOT / "docs" / "methods").glob("*.md"):
        assert (site / "methods" / f"{card.stem}.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt-get install chromium`")
def test_every_page_looks_right_in_a_browser(site: Path, tmp_path: Path) -> None:
    pages = sorted(
        p.relative_to(site).as_posix() for p in site.rglob("*.html") if p.name != "404.html"
    )

    found, console = look_at(site, pages, tmp_path / "browser")

    assert sorted(f["page"] for f in found) == pages
    assert console == []
    for one in found:
        assert one["title"], one["page"]
        assert one["text"] > 100, one["page"]
        assert one["broken"] == [], one["page"]
        assert len(one["rows"]) == 2 * len(WIDTHS)
        for row in one["rows"]:
            assert row["wide"] <= row["width"], (one["page"], row)
            assert (row["light"] > 200) == (row["scheme"] == "default"), (one["page"], row)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt-get install chromium`")
def test_the_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "wide.html").write_text(
        '<title>t</title><body style="background:#fff"><div style="width:600px">wide</div>'
        '<img src="none.png"><script>console.error("oh")</script>'
    )

    [found], console = look_at(folder, ["wide.html"], tmp_path / "browser", 60)

    assert [r["wide"] for r in found["rows"] if r["width"] == 390] != [390, 390]
    assert len(found["broken"]) == 1
    assert any("oh" in line for line in console)


def spoilt(folder: Path, path: str, old: str, new: str) -> None:
    """The file at `path` in a tree of links, replaced by a copy of other text; removed where
    nothing takes the place of everything.
    """
    text = (folder / path).read_text(encoding="utf-8")
    assert old in text
    (folder / path).unlink()
    if old != text:
        (folder / path).write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with what the site is made from, each file a link to ours."""
    folder = tmp_path / "tree"
    for name in ("configs", "docs", "kernels", "notebooks", "qsearch", "tests"):
        shutil.copytree(ROOT / name, folder / name, copy_function=os.symlink)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            (folder / path.name).symlink_to(path)
    return folder


def built(folder: Path) -> str:
    """What a build says that ends with an error."""
    done = subprocess.run(
        [sys.executable, str(folder / "docs" / "build.py"), str(folder / "site")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def test_a_json_that_a_page_asks_for_and_that_is_not_there_ends_the_build(tree: Path) -> None:
    path = "notebooks/figures/main_job.json"
    spoilt(tree, path, (tree / path).read_text(encoding="utf-8"), "")

    said = built(tree)

    assert "main_job.json" in said
    assert "index.md" in said


def test_outputs_older_than_the_code_of_a_notebook_end_the_build(tree: Path) -> None:
    spoilt(tree, "notebooks/00_tour.ipynb", "MODEL = ", "MODEL  = ")

    assert "00_tour.ipynb: its outputs are older than its code" in built(tree)


@pytest.mark.slow
def test_a_broken_docstring_and_a_dead_link_end_the_build_and_are_named(tree: Path) -> None:
    spoilt(tree, "qsearch/core/plan.py", "            scheme: for every", "            shceme: for")
    spoilt(tree, "docs/start/tour.md", "## Next", "[words](nothing.md)\n\n## Next")

    said = built(tree)

    assert "shceme" in said
    assert "nothing.md" in said


def small_site(folder: Path, text: str, module: str = "") -> list[str]:
    """What a strict build of one page, with our settings, complains of."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    docs = folder / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(text)
    (folder / "broken_module.py").write_text(module)
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                lines.append(record.getMessage())

    handler = Handler()
    logging.getLogger("mkdocs").addHandler(handler)
    config: Any = load_config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(docs),
        site_dir=str(folder / "out"),
        nav=["index.md"],
        hooks=[],
        plugins=[{"mkdocstrings": {"handlers": {"python": {"paths": [str(folder)]}}}}],
    )
    try:
        build(config)
    except Abort:
        lines.append("aborted")
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return lines


def test_a_link_to_nothing_ends_the_build(tmp_path: Path) -> None:
    lines = small_site(tmp_path, "# Page\n\n[words](nothing.md) and [more](#nowhere)\n")

    assert "aborted" in lines
    assert any("nothing.md" in line for line in lines)


def test_a_docstring_that_does_not_render_ends_the_build(tmp_path: Path) -> None:
    broken = (
        'def f(x: int) -> int:\n    """Words.\n\n    Args:\n        y: not there.\n    """\n    '
        "return x\n"
    )
    lines = small_site(tmp_path, "# Page\n\n::: broken_module.f\n", broken)

    assert "aborted" in lines
    assert any("'y'" in line for line in lines)


def test_a_good_page_is_built(tmp_path: Path) -> None:
    assert small_site(tmp_path, "# Page\n\n[words](#page)\n") == []


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("<!-- table nonsense -->", "nonsense"),
        ('<!-- table zoo columns="pictures; nonsense" -->', "nonsense"),
        ('<!-- table zoo where="pictures=nobody" -->', "pictures=nobody"),
        ('<!-- table zoo part="nonsense" -->', "nonsense"),
        ('<!-- table zoo colums="pictures" -->', "colums"),
        ("<!-- table zoo columns=pictures -->", "columns=pictures"),
        ("<!-- computed nonsense -->", "nonsense"),
        ('<!-- value zoo where="pictures=scenes-dit" -->', "a value has a column"),
        ('<!-- value zoo column="nonsense" where="pictures=scenes-dit" -->', "nonsense"),
        ('<!-- value zoo column="alignment" -->', "rows instead of one"),
        ('<!-- value zoo colum="alignment" -->', "a value has a column"),
        ('<!-- value nonsense column="alignment" -->', "nonsense"),
    ],
)
def test_a_table_or_a_value_that_is_missing_is_named(asked: str, named: str) -> None:
    with pytest.raises(MissingError, match=re.escape(named)):
        tables.filled(asked, ROOT)


def test_a_table_has_its_numbers_and_says_where_they_come_from() -> None:
    made = tables.filled('<!-- table zoo columns="pictures; alignment as seen" -->', ROOT)

    assert "| pictures | seen |" in made
    broken = tables.filled('<!-- table zoo\n  columns="pictures;\n  alignment as seen" -->', ROOT)
    assert broken == made
    assert "python notebooks/figures/zoo.py" in made
    assert "scenes-dit" in made


def test_a_value_is_that_of_its_row_with_its_error() -> None:
    [row] = tables.rows_of(ROOT, "ecar", {"where": "model=A single stage; steps=6"})
    asked = (
        'at <!-- value ecar column="alignment"\n  error="alignment_error" '
        'where="model=A single stage;\n  steps=6" digits="3" -->.'
    )

    made = tables.filled(asked, ROOT)

    value = f"{row['alignment']:.3f} ± {row['alignment_error']:.3f}"
    assert made == f"at {value}."
    written = tables.with_values(asked, ROOT)
    assert written == asked.replace("-->", f"-->{value}<!-- end -->")
    assert tables.filled(written.replace(value, "old"), ROOT) == made
    assert tables.with_values(written.replace(value, "old"), ROOT) == written


@pytest.fixture
def worlds(tmp_path: Path) -> Path:
    """A root with two JSONs of one script."""
    folder = tmp_path / "notebooks" / "figures"
    folder.mkdir(parents=True)
    (folder / "arena.py").write_text('"""The arena."""')
    for model, ahead in (("dit", 1.25), ("unet", -2.0)):
        rows = [{"model": model, "at": at, "ahead": ahead, "±": 0.5} for at in ("3", "4")]
        said = {"command": f"python arena.py {model}", "machine": "x", "seed": 0, "rows": rows}
        (folder / f"arena-{model}.json").write_text(json.dumps(said))
    return tmp_path


def test_a_table_of_several_files_has_the_rows_and_sources_of_all(worlds: Path) -> None:
    made = tables.filled('<!-- table arena-* where="at=3" -->', worlds, "methods/a.md")

    assert re.findall(r"^\| (\w+) \| 3 ", made, re.MULTILINE) == ["dit", "unet"]
    for model in ("dit", "unet"):
        assert f"python arena.py {model}" in made
        assert f"(../results/arena.md#arena-{model})" in made
    with pytest.raises(MissingError, match="row where at=5"):
        tables.filled('<!-- table arena-* where="at=5" -->', worlds)
    with pytest.raises(MissingError, match=r"no notebooks/figures/census-\*\.json"):
        tables.filled("<!-- table census-* -->", worlds)


def test_a_value_of_several_rows_says_of_what_each_is(worlds: Path) -> None:
    asked = '<!-- value arena-* column="ahead" error="±" {}where="at=4" digits="1" -->'

    assert tables.filled(asked.format('by="model" '), worlds) == "dit 1.2 ± 0.5, unet -2.0 ± 0.5"
    with pytest.raises(MissingError, match="2 rows instead of one"):
        tables.filled(asked.format(""), worlds)
    with pytest.raises(MissingError, match="no column 'nobody'"):
        tables.filled(asked.format('by="nobody" '), worlds)


def test_every_method_has_its_claims_with_measured_numbers() -> None:
    held = claims.read(ROOT)
    made = tables.filled(str(claims.pages(ROOT)[claims.PAGE]), ROOT, claims.PAGE)

    seeds = {"qua2sedimo", "mixdq", "vidit-q", "fp4dit", "taq-dit", "re-ttention", "ecar"}
    peers = {"svdquant", "convrot", "sdnq", "modelopt", "autoround", "apple"}
    assert seeds | peers <= {claim["card"] for claim in held}
    assert "<!--" not in made
    assert made.count("| kept |") == sum(c["verdict"] == "kept" for c in held)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"verdict": "proven"}, "its verdict is one of"),
        ({"found": "better by far"}, "no measured number"),
        ({"source": "x"}, "a claim has"),
    ],
)
def test_a_claim_without_verdict_or_number_ends_the_build(
    tmp_path: Path, change: dict[str, str], named: str
) -> None:
    (tmp_path / "docs").mkdir()
    claim = {**claims.read(ROOT)[0], **change}
    (tmp_path / "docs" / "claims.yaml").write_text(yaml.safe_dump([claim]))

    with pytest.raises(MissingError, match=named):
        claims.read(tmp_path)


def test_a_number_without_a_script_ends_the_build(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks" / "figures"
    folder.mkdir(parents=True)
    (folder / "lonely.json").write_text(
        json.dumps({"command": "x", "machine": "y", "seed": 0, "rows": []})
    )

    with pytest.raises(MissingError, match="lonely"):
        figures.figures(tmp_path)


def test_a_notebook_whose_outputs_are_older_than_its_code_ends_the_build(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    source = ROOT / "notebooks" / "00_tour.ipynb"
    shutil.copy(source, folder)
    assert notebooks.pages(tmp_path)
    changed = source.read_text(encoding="utf-8").replace("MODEL = ", "MODEL  = ")
    (folder / source.name).write_text(changed, encoding="utf-8")

    with pytest.raises(MissingError, match="older than its code"):
        notebooks.pages(tmp_path)


def test_a_card_without_a_verdict_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "methods"
    folder.mkdir(parents=True)
    (folder / "new.md").write_text("# New\n\n**Kind**: seed\n")

    with pytest.raises(MissingError, match=r"new\.md"):
        methods.pages(tmp_path)


def test_formulas_become_mathml_and_broken_ones_are_named() -> None:
    page = r'<span class="arithmatex">\(x^2\)</span>'

    assert "<math" in maths.as_mathml(page)
    with pytest.raises(MissingError, match="does not render"):
        maths.as_mathml(r'<span class="arithmatex">\(x^\)</span>')


def test_cells_hold_bars_lines_and_nothing() -> None:
    made = markdown.table([{"a": "x|y\nz", "b": None}, {"a": 1.23456, "b": True}])

    assert made.splitlines()[2:] == ["| x\\|y z | – |", "| 1.235 | yes |"]


def test_every_script_with_numbers_stands_below_a_heading() -> None:
    held = {f.script for f in figures.figures(ROOT).values()}

    index = str(results.pages(ROOT)["results/index.md"])
    assert [s for s in held if f"[{s}]({s}.md)" not in index] == []


def test_the_glossary_holds_each_word_once_and_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [w.lower() for w in re.findall(r"^(\S.*)\n:   ", text, re.MULTILINE)]

    assert len(words) > 70
    assert words == sorted(set(words))
