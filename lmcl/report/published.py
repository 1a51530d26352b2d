"""Figures others have published for a data set, with their sources (published.toml)."""

import dataclasses
import tomllib
from importlib import resources


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


def published_for(set_name: str) -> list[Published]:
    """All figures for a set, best SRCC first; empty for a set nobody has published on."""
    text = resources.files("lmcl.report").joinpath("published.toml").read_text(encoding="utf-8")
    tree = tomllib.loads(text)
    rows = tree["sets"].get(set_name.lower(), [])
    found = [
        Published(srcc=row["srcc"], plcc=row["plcc"], **tree["sources"][row["source"]])
        for row in rows
    ]
    return sorted(found, key=lambda p: -p.srcc)
