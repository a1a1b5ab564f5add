"""The page: whole HTML, nothing from outside, nothing from data taken for markup, readable at every
width.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from qsearch import report as report_package
from qsearch.core.attribution import Attribution
from qsearch.core.cost import Budget
from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.plan import Plan
from qsearch.core.progress import Silent
from qsearch.core.steps import StepRanges
from qsearch.core.units import number_of
from qsearch.report.findings import Findings
from qsearch.report.fold import MANY
from qsearch.report.frontier import frontier
from qsearch.report.page import is_current, write_report
from qsearch.report.pictures import picture_path, pictures_of, save_pictures
from qsearch.stages.config import Config
from qsearch.stages.folder import Run
from qsearch.stages.report import report
from tests.browser import CHROMIUM
from tests.report.synthetic import (
    CAPTIONS,
    PLANS,
    make_attribution,
    make_plan,
    make_rows,
    make_table,
    pixart,
    save_run,
)
from tests.report.wired import transformer, unet

GRAPH = pixart()
TABLE, PLAN = make_table(GRAPH), make_plan(GRAPH)
ROWS = make_rows(GRAPH, PLAN)
NASTY = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "wbr", "input"}
SCRIPT = (Path(report_package.__file__).parent / "page.js").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, the text, and what is open at the end; a tag that closes another
    one is an error.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its report."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    PLAN.save(folder / "plan.json", key="k", seed=17)
    (folder / "config.yaml").write_text("model: scenes-dit\n")
    write_report(folder, Findings(GRAPH, TABLE, PLAN, ROWS, CAPTIONS))
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a report of a model with blocks, a frontier, and explanations of the plan
    and of many.
    """
    folder = tmp_path_factory.mktemp("full")
    save_run(folder)
    graph = unet()
    table, plan = make_table(graph, floor=1e-5), make_plan(graph)
    rows = make_rows(graph, plan)
    curve = frontier(
        graph, {name: {"keep": 0.0, **row} for name, row in table.values().items()}, [plan], rows
    )
    many = make_attribution(graph, 12)
    ours = Attribution(graph.id, many.select(method="shapley", plan="plan 3").assign(plan="plan"))
    found = Findings(graph, table, plan, rows, CAPTIONS, frontier=curve, attributions=[ours, many])
    write_report(folder, found)
    return folder


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page on which every word that comes from data is markup."""
    folder = tmp_path_factory.mktemp("nasty")
    save_run(folder)
    graph = pixart(1, model=NASTY, extra=f"a.{NASTY}")
    plan = make_plan(graph)
    (folder / "config.yaml").write_text(f"model: {NASTY}\n")
    rows = [dict(r, metrics=r["metrics"] | {NASTY: [1.0, 0.1]}) for r in make_rows(graph, plan)]
    captions = [f"{c} {NASTY}\"'" for c in CAPTIONS]
    write_report(folder, Findings(graph, make_table(graph), plan, rows, captions))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_html(page: Page) -> None:
    assert page.open == []
    assert [tag for tag, _ in page.tags[:2]] == ["html", "head"]
    assert page.all("html")[0]["lang"] == "en"
    assert {m.get("name") for m in page.all("meta")} >= {"viewport", "color-scheme"}


def test_ids_are_unique_and_what_is_referred_to_is_there(page: Page) -> None:
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    used = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} | {
        str(a["xlink:href"])[1:] for a in page.all("use")
    }

    assert ids.most_common(1)[0][1] == 1
    assert used
    assert used <= set(ids)


def test_nothing_is_fetched_and_nothing_runs_but_the_page_s_own_script(
    page: Page, text: str
) -> None:
    sources = [
        str(a[k])
        for _, a in page.tags
        for k in ("src", "href", "xlink:href", "srcset", "data", "poster", "action")
        if k in a
    ]

    assert {s.split(",")[0] if s.startswith("data:") else s[:1] for s in sources} == {
        "data:image/png;base64",
        "#",
    }
    assert {tag for tag, _ in page.tags} & {
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert [k for _, a in page.tags for k in a if k.startswith("on")] == []
    assert page.all("script") == [{}]
    assert SCRIPT in text
    assert re.findall(r"fetch|XMLHttp|WebSocket|import|eval|innerHTML|https?:", SCRIPT) == []
    assert len(SCRIPT.splitlines()) < 200


def test_pictures_say_what_they_show(page: Page) -> None:
    images = page.all("img")

    assert len(images) == 8 * len(PLANS)
    assert images[0]["alt"] == f"full precision: {CAPTIONS[0]}"
    assert [a for a in page.all("svg") if a.get("role") != "img" or not a.get("aria-label")] == []
    assert len(page.all("svg")) == 12  # six plots, each for a screen and for a telephone


def test_tables_have_captions_and_headers_with_a_scope(page: Page) -> None:
    assert len(page.all("table")) == len(page.all("caption")) == 4
    assert {a.get("scope") for a in page.all("th")} == {"row", "col"}


def test_what_was_asked_is_said(page: Page) -> None:
    for words in (
        "at most 12 stored bits a weight",
        f"{number_of(GRAPH.weights)} weights",
        "uint2-c, uint3-c, uint4-c, uint8-c, keep (full precision)",
        *CAPTIONS,
    ):
        assert words in page.text


def test_the_outcome_is_said_in_words(page: Page) -> None:
    assert (
        "stands 21.3 ± 0.1 dB above its error; the plans beside it: uniform uint4-c 14.2 ± 0.1 "
        "dB, random 6.7 ± 0.1 dB"
    ) in page.text


def test_sparse_attentions_are_said_beside_plans_that_have_dense_ones(tmp_path: Path) -> None:
    graph = transformer(2)
    layers = {x.name: "uint4-c" if x.quantizable else "keep" for x in graph}
    plan = Plan.make(graph, {**layers, "blocks.0.attn1:attention": "window8"})
    for name in PLANS:
        save_pictures(picture_path(tmp_path, name), torch.zeros(len(CAPTIONS), 3, 8, 8))

    write_report(
        tmp_path, Findings(graph, make_table(graph), plan, make_rows(graph, plan), CAPTIONS)
    )

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "self-attentions take 57% of the FLOPs of dense ones" in text


def test_every_result_is_in_the_table_and_the_best_is_bold(page: Page, text: str) -> None:
    for words in ("exact", "11.3 ± 0.4", "31.5 ± 1.3", "0.810 ± 0.004"):
        assert words in page.text

    assert re.findall(r"<strong>([^<]*±[^<]*)</strong>", text) == [
        "0.950 ± 0.006",
        "21.3 ± 0.1",
        "17.9 ± 0.6",
        "20.9 ± 1.2",
        "0.968 ± 0.004",
        "7.40e-03 ± 2e-04",
    ]


def test_directions_of_metrics_are_arrows_with_words(page: Page) -> None:
    assert Counter(a["aria-label"] for a in page.all("span") if a.get("role") == "img") == {
        "more is better": 4,
        "less is better": 2,
    }


def test_the_worst_cases_are_marked_with_their_rank(text: str) -> None:
    assert re.findall(r'<span class="rank">([^<]*)</span> · ([^<]*)</p>', text) == [
        ("1 of 10", CAPTIONS[5]),
        ("2 of 10", CAPTIONS[9]),
        ("3 of 10", CAPTIONS[8]),
        ("4 of 10", CAPTIONS[7]),
    ]


def test_every_layer_is_listed_with_its_scheme(page: Page) -> None:
    for name, scheme in PLAN.layers.items():
        assert name in page.text
        assert str(scheme) in page.text


def test_where_it_comes_from_is_said(page: Page, run: Path) -> None:
    header = Plan.load(run / "plan.json", GRAPH).header
    assert header is not None

    for words in (
        GRAPH.id,
        PLAN.id,
        "ilp: optimal, gap 0, bound 0.25",
        "17",
        header.command,
        f"torch {header.versions['torch']}",
        "model: scenes-dit",
    ):
        assert words in page.text


def test_a_plan_on_disk_that_is_another_says_nothing_of_this_one(tmp_path: Path) -> None:
    save_run(tmp_path)
    Plan.uniform(GRAPH, "uint8-c").save(tmp_path / "plan.json")

    write_report(tmp_path, Findings(GRAPH, TABLE, PLAN, ROWS, CAPTIONS))

    assert (
        "not recorded: the plan has no file in this run" in (tmp_path / "report.html").read_text()
    )


def test_markup_in_data_is_text(nasty: Page) -> None:
    assert nasty.all("script") == [{}]
    assert nasty.open == []
    for words in (f"a.{NASTY}", f"model: {NASTY}", f"{CAPTIONS[0]} {NASTY}\"'", f"{NASTY}: "):
        assert words in nasty.text
    assert nasty.all("img")[0]["alt"] == f"full precision: {CAPTIONS[0]} {NASTY}\"'"


def test_the_contact_sheet_lies_beside_the_page(run: Path) -> None:
    assert (run / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in run.iterdir()) == [
        "config.yaml",
        "contact_sheet.png",
        "pictures",
        "plan.json",
        "report.html",
    ]


def test_written_twice_it_is_the_same(run: Path, text: str) -> None:
    write_report(run, Findings(GRAPH, TABLE, PLAN, ROWS, CAPTIONS))

    assert (run / "report.html").read_text(encoding="utf-8") == text


def test_a_run_with_little_in_it_has_a_page_still(tmp_path: Path) -> None:
    save_run(tmp_path)
    rows = [
        dict(r, metrics={"ssim": r["metrics"]["ssim"]})
        for r in ROWS
        if r["plan"] in ("full precision", "plan")
    ]

    plan = Plan.make(GRAPH, PLAN.layers)
    write_report(tmp_path, Findings(GRAPH, make_table(GRAPH, bins=1), plan, rows, CAPTIONS))

    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert (
        len(page.all("svg")) == 6
    )  # bits, noise and roles: no step bins, no blocks, nothing against size
    assert len(page.all("img")) == 8 * 2


def test_a_run_with_much_in_it_shows_all_of_it(full: Path) -> None:
    page = Page((full / "report.html").read_text(encoding="utf-8"))

    labels = [str(a["aria-label"]) for a in page.all("svg")]
    for start in (
        "Curve: stored bits",
        "Bars: noise of",
        "The graph of",
        "Boxes: SQNR",
        "Bars: added to predicted noise of the plan",
        "Dots: what",
    ):
        assert [label for label in labels if label.startswith(start)] != [], start
    assert not any(
        "SQNR of the denoiser's output" in label and label.startswith("Points") for label in labels
    )  # the frontier has those points
    assert page.open == []
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    assert ids.most_common(1)[0][1] == 1


def test_an_explanation_of_another_model_is_left_out_and_the_page_is_not_lost(
    tmp_path: Path,
) -> None:
    save_run(tmp_path)
    make_attribution(pixart(1)).save(tmp_path / "attribution.parquet")
    said: list[str] = []

    class Listener(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    report(Run(Config(model="scenes-dit", folder=tmp_path), Listener()), GRAPH, TABLE, PLAN, ROWS)

    assert said[0].startswith(
        f"report: left out of the page: {tmp_path / 'attribution.parquet'} was made for graph"
    )
    labels = [
        str(a["aria-label"])
        for a in Page((tmp_path / "report.html").read_text(encoding="utf-8")).all("svg")
    ]
    assert [label for label in labels if label.startswith("Curve: stored bits")] != []
    assert [label for label in labels if label.startswith("Dots")] == []


def test_a_table_of_another_model_is_refused(run: Path) -> None:
    with pytest.raises(QSearchError, match="the table was made for graph"):
        write_report(run, Findings(GRAPH, make_table(pixart(1)), PLAN, ROWS, CAPTIONS))


def test_a_run_without_pictures_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"full-precision\.png does not exist; make it with `qsearch evaluate`"
    ):
        write_report(tmp_path, Findings(GRAPH, TABLE, PLAN, ROWS, CAPTIONS))
    assert list(tmp_path.iterdir()) == []


def browse(
    tmp_path: Path, document: str, widths: tuple[int, ...]
) -> tuple[dict[int, int], list[str]]:
    """width -> how wide the page wants to be in a frame of that width, and what the console said;
    frames, since a window has a least width.
    """
    assert CHROMIUM is not None
    frames = "".join(
        (
            f'<iframe width="{w}" height="900" style="border:0" '
            f'srcdoc="{html.escape(document)}"></iframe>'
        )
        for w in widths
    )
    measure = (
        "document.title = [...document.querySelectorAll('iframe')].map(f => f.width + ':' + "
        "f.contentDocument.documentElement.scrollWidth).join(' ')"
    )
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><title>-</title>{frames}<script>onload = () => {{ {measure} }}</script>",
        encoding="utf-8",
    )
    quiet = [
        f"--disable-{what}"
        for what in ("gpu", "quic", "background-networking", "component-update", "sync")
    ]
    flags = [
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        *quiet,
    ]
    done = subprocess.run(
        [
            CHROMIUM,
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    title = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert title is not None
    wanted = dict(pair.split(":") for pair in title[1].split())
    return {int(k): int(v) for k, v in wanted.items()}, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a chromium binary, e.g. `apt-get install chromium`"
)
def test_a_browser_shows_it_without_errors_or_overflow_on_a_telephone_and_on_a_screen(
    tmp_path: Path, full: Path
) -> None:
    opened = (
        (full / "report.html").read_text(encoding="utf-8").replace("<details>", "<details open>")
    )  # what is folded away must fit as well

    wanted, said = browse(tmp_path, opened, (390, 1400))

    assert wanted == {390: 390, 1400: 1400}
    assert said == []


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a chromium binary, e.g. `apt-get install chromium`"
)
def test_the_browser_would_notice_an_error_and_an_overflow(tmp_path: Path) -> None:
    wanted, said = browse(
        tmp_path,
        '<p style="width: 500px">wide</p><script>console.error("broken")</script>',
        (390, 1400),
    )

    assert wanted[390] > 390
    assert len(said) == 2
    assert "broken" in said[0]


def test_every_limit_of_a_budget_has_its_words_those_of_groups_too(tmp_path: Path) -> None:
    save_run(tmp_path)
    budget = Budget(
        average_bits=16.0,
        bytes=10**9,
        bit_operations=1e18,
        activation_bytes=10**9,
        latency=0.25,
        groups={"transformer_blocks.*": {"bytes": 10**8}},
    )
    plan = replace(PLAN, budget=budget)

    write_report(tmp_path, Findings(GRAPH, TABLE, plan, ROWS, CAPTIONS))

    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for words in (
        "at most 16 stored bits a weight",
        "at most 1,000,000,000 bytes of weights",
        "at most 1e+18 bit operations a call",
        "at most 1,000,000,000 bytes of layers' inputs a call",
        "at most 0.25 seconds a call",
        "at most 100,000,000 bytes of weights in transformer_blocks.*",
    ):
        assert words in text, words


def test_a_page_holds_neither_passwords_nor_places_of_the_machine(tmp_path: Path) -> None:
    save_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: /home/ada/models/pipe\nprompts: /srv/ada/p.txt\n")

    write_report(tmp_path, Findings(GRAPH, TABLE, PLAN, ROWS, CAPTIONS))

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "/ada/" not in text
    assert "…/pipe" in text


def test_a_plan_over_ranges_shows_its_ranges(tmp_path: Path) -> None:
    choices: dict[str, str | list[str]] = {x.name: "keep" for x in GRAPH}
    choices |= {x.name: "uint4-c" for x in GRAPH.quantizable}
    choices[GRAPH.quantizable[0].name] = ["uint4-c", "uint8-c"]
    plan = Plan.make(GRAPH, choices, steps=StepRanges((0.5,)))
    save_run(tmp_path)
    write_report(tmp_path, Findings(GRAPH, TABLE, plan, make_rows(GRAPH, plan), CAPTIONS))

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        f"bits of the weight, {len(GRAPH.quantizable)} layers by 2 ranges of steps"
        in text.replace("\n", " ")
    )


# -------------------------------------------------------------------------------------- many layers


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a model of some three hundred layers."""
    folder = tmp_path_factory.mktemp("large")
    save_run(folder)
    graph = pixart(28)
    plan = make_plan(graph)
    assert len(graph.layers) > MANY
    found = Findings(graph, make_table(graph), plan, make_rows(graph, plan), CAPTIONS)
    write_report(folder, found)
    return folder


def test_many_layers_are_folded_by_block_and_role(large: Path) -> None:
    text = (large / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    graph = pixart(28)

    assert len(text) < 5e6
    assert len([a for a in page.all("svg") if a.get("class") == "fold"]) == 4
    assert len([a for a in page.all("tr") if a.get("class") == "layer"]) == len(graph.layers)
    assert len([a for a in page.all("tr") if a.get("class") == "group"]) < len(graph.layers) / 3
    assert page.open == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
@pytest.mark.parametrize("width", [390, 1400])
def test_layers_are_found_sorted_and_opened_by_the_script(
    large: Path, tmp_path: Path, width: int
) -> None:
    steps = """
      const rows = () => [...document.querySelectorAll("tr.layer")].filter(r => !r.hidden);
      const folded = rows().length, box = document.getElementById("search");
      document.querySelector("tr.group button").click();
      const open = rows().length;
      box.value = "self-attention-q uint2"; box.dispatchEvent(new Event("input"));
      const found = rows().every(r => /self-attention-q/.test(r.textContent)) && rows().length;
      box.value = ""; box.dispatchEvent(new Event("input"));
      document.querySelectorAll("#layers thead button")[4].click();
      const bits = rows().map(r => parseFloat(r.cells[4].textContent));
      const sorted = bits.every((b, i) => !i || bits[i - 1] <= b);
      document.querySelector(".compare").click();
      const slider = document.querySelectorAll(".slider img").length;
      const wide = document.documentElement.scrollWidth;
      document.title = JSON.stringify({folded, open, found: !!found, sorted, slider, wide});
    """
    text = (large / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{steps}</script></body>"))
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},1000",
            f"--user-data-dir={tmp_path / 'browser'}",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    said = json.loads(html.unescape(re.findall(r"<title>(.*?)</title>", done.stdout)[0]))
    assert said["folded"] == 0
    assert said["open"] > 0
    assert said["found"]
    assert said["sorted"]
    assert said["slider"] == 2
    assert said["wide"] <= max(width, 500)


def test_a_pipeline_without_pictures_has_a_page_and_several_pictures_a_caption_have_theirs(
    tmp_path: Path,
) -> None:
    save_run(tmp_path)
    found = Findings(GRAPH, TABLE, PLAN, ROWS, CAPTIONS[: len(CAPTIONS) // 2])
    write_report(tmp_path, found, "several")
    assert "What it looks like" in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "contact_sheet.png").unlink()
    for name in PLANS:
        picture_path(tmp_path, name).unlink()
        save_pictures(picture_path(tmp_path, name), torch.empty(4, 0), of=f"{name} key")

    write_report(tmp_path, found, "none")

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    Page(text)
    assert "What it looks like" not in text
    assert is_current(tmp_path, "none")
    assert pictures_of(picture_path(tmp_path, "plan")) == "plan key"  # so nothing is measured again
