"""Figures others have published for a data set, with their sources (published.toml)."""

import dataclasses
import tomllib
from importlib import resources
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published pair of correlations."""

    model: str
    srcc: float
    plcc: float
    cite: str
    """Where the figures stand."""
    comparable: bool
    """Whether the protocol is ours."""
    note: str
    """How the protocol differs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedAcross:
    """One published rank correlation of a model trained on one set and tested on another."""

    model: str
    srcc: float
    cite: str


def published_across(trained_on: str, tested_on: str) -> list[PublishedAcross]:
    """Figures across two sets, best first; empty if nobody has published any."""
    tree = _tree()
    return sorted(
        (
            PublishedAcross(
                model=tree["sources"][row["source"]]["model"],
                srcc=row["srcc"],
                cite=tree["sources"][row["source"]]["cite"],
            )
            for row in tree["across"]
            if (row["trained_on"], row["tested_on"]) == (trained_on.lower(), tested_on.lower())
        ),
        key=lambda p: -p.srcc,
    )


def published_for(set_name: str) -> list[Published]:
    """All figures for a set, best SRCC first; empty for a set nobody has published on."""
    tree = _tree()
    rows = tree["sets"].get(set_name.lower(), [])
    found = [
        Published(srcc=row["srcc"], plcc=row["plcc"], **tree["sources"][row["source"]])
        for row in rows
    ]
    return sorted(found, key=lambda p: -p.srcc)


def _tree() -> dict[str, Any]:
    text = resources.files("lmcl.report").joinpath("published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
