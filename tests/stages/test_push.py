"""push: a card made from the run, what is refused before work, and what would be sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.core.progress import Silent
from qsearch.stages import config
from qsearch.stages.export import ExportSettings, export
from qsearch.stages.folder import Run
from qsearch.stages.push import PushSettings, check_push, push
from tests.conftest import Command
from tests.models import tiny_pipeline


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run of a small pipeline."""
    from qsearch.stages.run import run

    place = tmp_path_factory.mktemp("push")
    tiny_pipeline().save_pretrained(place / "pipe")
    (place / "prompts.txt").write_text("\n".join(f"a small ring {i}" for i in range(12)))
    content: dict[str, Any] = {
        "model": "pipe",
        "prompts": "prompts.txt",
        "folder": "run",
        "sampling": {"steps": 2, "batch": 4, "guidance": 3.0},
        "profile": {"schemes": ["int4-c", "int8-c"], "bins": 1, "samples": 2, "probes": 2},
        "allocate": {"average_bits": 6.5},
        "evaluate": {"samples": 4, "metrics": ["sqnr", "psnr"], "random": 0},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(content))
    run(place / "mine.yaml")
    return Run(config.load(place / "run" / "config.yaml"), Silent())


@contextmanager
def put_back(*places: Path) -> Iterator[None]:
    """Afterwards, files are what they were."""
    held = {place: place.read_bytes() for place in places}
    try:
        yield
    finally:
        for place, content in held.items():
            place.write_bytes(content)


@pytest.fixture
def folder(ran: Run, tmp_path: Path) -> Path:
    """Its export."""
    export(ran, ExportSettings(to="sdnq", output=tmp_path / "out", nearest=True))
    return tmp_path / "out"


def test_the_card_says_what_was_asked_measured_and_why(ran: Run, folder: Path) -> None:
    made = push(ran, "sdnq", folder, PushSettings(repository="someone/ring-4bit", dry_run=True))

    text = Path(made).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert "base_model" not in front  # a local folder is no model of the hub's
    assert "average bits at most 6.5" in text
    assert "| **this plan** |" in text
    assert "| 16 bits |" in text
    assert "## Why these layers" in text
    assert "layers were rounded to the nearest format that sdnq has" in text
    assert str(ran.folder.parent) not in text
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert (folder / "contact_sheet.png").is_file()


@pytest.mark.parametrize("name", ["ring", "a/b/c", "/ring", "some one/x", ""])
def test_a_name_that_is_no_repository_is_refused(ran: Run, name: str) -> None:
    with pytest.raises(QSearchError, match="a repository is OWNER/NAME"):
        check_push(ran, PushSettings(repository=name, dry_run=True))


def test_without_results_there_is_no_card(ran: Run) -> None:
    place = ran.path("results.json")
    with put_back(place):
        place.unlink()
        with pytest.raises(
            QSearchError, match=r"results\.json does not exist; measure .*qsearch evaluate"
        ):
            check_push(ran, PushSettings(repository="a/b", dry_run=True))


def test_a_plan_that_was_not_measured_has_no_card(ran: Run) -> None:
    graph, place = ran.graph(), ran.path("plan.json")
    with put_back(place):
        Plan.uniform(graph, "int8-c").save(place)
        with pytest.raises(
            QSearchError, match=r"a model card .*is of another plan than .*plan\.json"
        ):
            check_push(ran, PushSettings(repository="a/b", dry_run=True))
    check_push(ran, PushSettings(repository="a/b", dry_run=True))


def test_what_was_asked_is_what_the_plan_was_made_for(ran: Run, folder: Path) -> None:
    settings = ran.config.allocate.model_copy(update={"average_bits": 4.0})
    other = Run(ran.config.model_copy(update={"allocate": settings}), Silent())

    made = push(other, "sdnq", folder, PushSettings(repository="someone/ring", dry_run=True))

    assert "average bits at most 6.5" in Path(made).read_text(encoding="utf-8")


def test_without_the_table_of_the_plan_there_is_no_card(ran: Run) -> None:
    places = sorted(ran.folder.glob("*.parquet"))
    assert places
    with put_back(*places):
        for place in places:
            place.unlink()
        with pytest.raises(QSearchError, match="has no table of sensitivities: `qsearch profile"):
            check_push(ran, PushSettings(repository="a/b", dry_run=True))


def test_the_card_s_code_loads_the_folder_in_diffusers(ran: Run, folder: Path) -> None:
    pytest.importorskip("sdnq")
    made = push(ran, "sdnq", folder, PushSettings(repository="someone/ring-4bit", dry_run=True))

    code = Path(made).read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("someone/ring-4bit", str(folder)), scope)

    assert any("sdnq" in type(m).__module__ for m in scope["model"].modules())


class Hub:
    """What stands for the hub: remembers what is asked."""

    existing = False
    asked: list[tuple[Any, ...]] = []  # noqa: RUF012

    def repo_exists(self, name: str) -> bool:
        return self.existing

    def create_repo(self, name: str, **more: Any) -> None:
        self.asked.append(("create", name, more))

    def upload_folder(self, **more: Any) -> None:
        self.asked.append(("upload", more))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(Hub, "asked", [])
    return Hub


def test_a_push_makes_the_repository_and_sends_the_folder(
    ran: Run, folder: Path, hub: type[Hub]
) -> None:
    push(ran, "sdnq", folder, PushSettings(repository="a/b", private=True))

    assert hub.asked[0] == ("create", "a/b", {"private": True, "exist_ok": False})
    assert hub.asked[1] == ("upload", {"repo_id": "a/b", "folder_path": str(folder)})


def test_an_existing_repository_is_never_written_over(
    ran: Run, folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "existing", True)

    with pytest.raises(QSearchError, match="a/b exists, and nothing is written over it"):
        push(ran, "sdnq", folder, PushSettings(repository="a/b"))

    assert not (folder / "README.md").exists()
    assert hub.asked == []


def test_without_a_token_nothing_is_asked(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    with pytest.raises(QSearchError, match="the hub asks for a token"):
        check_push(ran, PushSettings(repository="a/b"))


def test_no_network_is_one_line(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(self: Any, name: str) -> bool:
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_exists", unreachable)

    with pytest.raises(QSearchError, match=r"the hub does not answer: no route to the hub$"):
        check_push(ran, PushSettings(repository="a/b"))


def test_export_pushes_from_the_shell_and_refuses_before_it_writes(
    ran: Run, tmp_path: Path, command: Command
) -> None:
    asked = ("export", ran.folder, "--to", "gguf", "--nearest", "-o", tmp_path / "out")

    refused = command(*asked, "--push", "no repository", "--dry-run")
    alone = command(*asked, "--dry-run")
    written = (tmp_path / "out").exists()
    done = command(*asked, "--push", "someone/ring", "--dry-run")

    assert refused[0] == alone[0] == 2
    assert "a repository is OWNER/NAME" in refused[2]
    assert "give --push OWNER/NAME" in alone[2]
    assert not written
    assert done[0] == 0, done[2]
    assert "push: would send" in done[2]
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith("---")
