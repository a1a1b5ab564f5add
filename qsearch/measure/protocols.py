"""Protocols: prompts, seeds, sampler and metrics that a table of the literature fixes, so that a
number may be put beside its own.

A protocol is a file in `configs/protocols/`, or one of one's own. Prompts are not shipped: the user
has the published file, which is checked by its hash where its publisher's version is known, and by
its number of prompts.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from pydantic import Field

from ..core import shipped
from ..core.errors import MISSHAPEN, QSearchError
from ..core.settings import Settings
from .prompts import Prompts, read_prompts, scene_prompts

_FORMS = ("lines", "mjhq", "zoo")


class ProtocolPrompts(Settings):
    """Which prompts a protocol takes."""

    samples: int = Field(ge=1, description="prompts")
    pictures: int = Field(1, ge=1, description="pictures a prompt, each with its own noise")
    form: str = Field("lines", description=f"of the file: {', '.join(_FORMS)}")
    sha256: str | None = Field(None, description="of the published file")


class Protocol(Settings):
    """What a protocol fixes; what it is silent about is the model's own."""

    title: str
    source: str
    prompts: ProtocolPrompts
    seeds: tuple[int, ...] = Field((), description="pictures of each prompt, one a seed")
    sampling: dict[str, Any] = Field({}, description="as the config's section")
    metrics: tuple[str, ...] = Field(min_length=1)
    gates: dict[str, str] = Field({}, description="as the config's section")
    note: str = ""

    @property
    def samples(self) -> int:
        """Pictures in all."""
        return self.prompts.samples * (len(self.seeds) or self.prompts.pictures)


def read_protocol(name: str) -> Protocol:
    """A protocol by its name, or from a YAML file of one's own.

    Args:
        name: one of `qsearch list protocols`, or a path that ends in .yaml.

    Raises:
        QSearchError: there is none of that name, or the file does not say what a protocol says.
    """
    return shipped.read("protocols", name, Protocol)


def protocol_prompts(name: str, file: Path | None, seed: int = 0) -> Prompts:
    """A protocol's prompts in its order, each with its seed where the protocol fixes seeds.

    Args:
        name: the protocol.
        file: the published file of prompts; none for the zoo's captions.
        seed: of the zoo's captions.

    Returns:
        As many prompts as the protocol has pictures.

    Raises:
        QSearchError: the file is missing, is another one than the published, or holds too few.
    """
    card = read_protocol(name)
    if card.prompts.form == "zoo":
        return scene_prompts(card.prompts.samples, seed)
    if file is None:
        raise QSearchError(
            f"protocol {name} takes its prompts from a file that you have ({card.source}): "
            f"protocol: {{name: {name}, prompts: FILE}}"
        )
    _check_hash(name, card, file)
    if card.prompts.form == "mjhq":
        return _mjhq(file, card.prompts.samples)
    texts = read_prompts(file).texts
    if len(texts) < card.prompts.samples:
        raise QSearchError(
            f"protocol {name} takes {card.prompts.samples} prompts; {file} holds {len(texts)}"
        )
    texts = texts[: card.prompts.samples]
    if card.seeds:
        return Prompts(
            tuple(text for text in texts for _ in card.seeds),
            values=tuple({"seed": s} for _ in texts for s in card.seeds),
        )
    return Prompts(tuple(text for text in texts for _ in range(card.prompts.pictures)))


def _check_hash(name: str, card: Protocol, file: Path) -> None:
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise QSearchError(f"protocol {name}: {file} can't be read ({error.strerror})") from error
    if card.prompts.sha256 is not None and found != card.prompts.sha256:
        raise QSearchError(
            f"protocol {name} takes the prompts of {card.source}, whose SHA-256 begins with "
            f"{card.prompts.sha256[:12]}; that of {file} begins with {found[:12]}"
        )


def _mjhq(file: Path, count: int) -> Prompts:
    """Prompts of MJHQ-30K's meta_data.json: names shuffled with seed 0, the first `count`, sorted;
    a seed from each name.

    The rule is that of nunchaku's evaluation (app/flux.1/t2i): h = (31 h + ord(c)) mod (10^9 + 7)
    over the name's characters.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        names = list(held)
        texts = {name: str(held[name]["prompt"]) for name in names}
    except (ValueError, *MISSHAPEN) as error:
        raise QSearchError(
            f"{file} must be MJHQ-30K's meta_data.json, a mapping of names to prompts ({error})"
        ) from error
    if len(names) < count:
        raise QSearchError(f"{file} must hold {count} prompts or more; it holds {len(names)}")
    random.Random(0).shuffle(names)
    chosen = sorted(names[:count])
    return Prompts(
        tuple(texts[name] for name in chosen),
        values=tuple({"seed": name_seed(name)} for name in chosen),
    )


def name_seed(name: str) -> int:
    """The seed of a picture's name: h = (31 h + ord(c)) mod (10^9 + 7)."""
    value = 0
    for letter in name:
        value = (31 * value + ord(letter)) % (10**9 + 7)
    return value
