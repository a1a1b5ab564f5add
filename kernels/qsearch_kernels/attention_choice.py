"""What is done to an attention, in words: `window32~rettention~every4`, `dense~cached`.

    KIND        dense, or what keeps 1/N of the keys: windowN, spatialN, temporalN, blockN
    +qk8        products of queries and keys in int8 (SageAttention)
    ~METHOD     how steps between two dense ones are mended: rho, residual, rettention, cached
    ~everyN     steps from one dense step to the next, 5 where nothing is said
    ~driftX     what rho gains a step; ~fit: what calibration measured

Nothing here needs torch: a plan that names an attention is read without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("dense", "window", "spatial", "temporal", "block")
METHODS = ("rho", "residual", "rettention", "cached")
EVERY = 5
_WORD = re.compile(
    r"(?P<method>rho|residual|rettention|cached)$|every(?P<every>\d+)$"
    r"|(?P<drift>fit|drift\d+(\.\d+)?)$"
)
_HEAD = re.compile(r"(?P<kind>[a-z]+?)(?P<parts>\d+)?(?P<qk>\+qk8)?$")


@dataclass(frozen=True)
class AttentionChoice:
    """What is done to an attention, in a range of steps: `window32+qk8~rettention~every4~fit`.

    Args:
        kind: `dense`, `window`, `spatial`, `temporal` or `block` (`attention_layout`).
        parts: N of `windowN`, which keeps 1/N of the keys.
        int8_qk: `+qk8`: products of queries and keys in int8.
        method: how a sparse step is mended: "" (not at all) or one of `METHODS`.
        every: steps from one dense step to the next; the first of a sampling is dense.
        drift: what rho gains a step, the first sparse step excepted, as the released code does;
            None: a table from calibration (`~fit`).

    Raises:
        ValueError: for words that do not go together.
    """

    kind: str = "dense"
    parts: int = 1
    int8_qk: bool = False
    method: str = ""
    every: int = EVERY
    drift: float | None = 0.0

    def __post_init__(self) -> None:
        given = f"given {self.kind}{self.parts} and {self.method or 'no method'!r}"
        dense = self.kind == "dense"
        if self.kind not in KINDS or self.parts < 1 or (dense and self.parts != 1):
            raise ValueError(
                "an attention is dense, or windowN, spatialN, temporalN or blockN with N from 1; "
                + given
            )
        if self.method not in ("", *METHODS):
            raise ValueError(f"a method is one of {', '.join(METHODS)}; {given}")
        if dense and self.method not in ("", "cached"):
            raise ValueError(f"~{self.method} mends a sparse attention, as in window32; {given}")
        if not dense and self.method == "cached":
            raise ValueError(f"a cached attention computes nothing: dense~cached; {given}")
        if self.every < 2 or (not self.method and self.every != EVERY):
            raise ValueError(
                f"~everyN, N from 2, goes with one of {', '.join(METHODS)}; given {self.every}, "
                + given.removeprefix("given ")
            )
        if self.drift != 0 and self.method not in ("rho", "rettention"):
            raise ValueError(
                f"only rho drifts: ~driftX and ~fit go with ~rho, ~rettention; {given}"
            )

    @classmethod
    def parse(cls, text: str) -> AttentionChoice:
        """A choice from its words; `str` writes them again.

        Raises:
            ValueError: for unknown words, or words that do not go together.
        """
        head, *words = text.split("~")
        found = _HEAD.match(head)
        if found is None or (found["parts"] is None) != (found["kind"] == "dense"):
            raise ValueError(
                "an attention's choice is dense or KINDN such as window32, then words such as "
                f"~rettention~every5; given {text!r}"
            )
        said: dict[str, str] = {}
        for word in words:
            match = _WORD.match(word)
            name = "" if match is None else str(match.lastgroup)
            if match is None or name in said:
                raise ValueError(
                    f"words of an attention's choice are ~{', ~'.join(METHODS)}, ~everyN, ~driftX "
                    f"and ~fit, each kind once; given ~{word} in {text!r}"
                )
            said[name] = match[name]
        drift = said.get("drift", "0")
        return cls(
            found["kind"],
            int(found["parts"] or 1),
            found["qk"] is not None,
            said.get("method", ""),
            int(said.get("every", EVERY)),
            None if drift == "fit" else float(drift.removeprefix("drift")),
        )

    def __str__(self) -> str:
        head = self.kind + (str(self.parts) if self.kind != "dense" else "") + "+qk8" * self.int8_qk
        every = f"~every{self.every}" if self.every != EVERY else ""
        drift = "~fit" if self.drift is None else f"~drift{self.drift:.10g}" if self.drift else ""
        return head + (f"~{self.method}" if self.method else "") + every + drift
