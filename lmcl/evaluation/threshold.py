"""Thresholds by what they cost: the cut in quality below which images are sorted out.

An image is bad if people's score lies below a quality; it is rejected if the model's score lies
below the cut. The cut is chosen on the val part and judged once on the test part.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.models.folders import MODEL_FILES
from lmcl.utils.files import write_atomic
from shards.errors import ShardError
from shards.source_files import read_regular
from shards.text import printable

THRESHOLDS = "thresholds.json"
_MOST_RULES = 1000
_CONFIDENCE = 0.95
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
Target = Literal["precision", "recall", "reject-share"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share of images with its exact 95 % interval."""

    hits: int
    of: int
    low: float
    """Clopper and Pearson's lower end; 0 if there are no images."""
    high: float

    @property
    def value(self) -> float:
        """The share; NaN of no image."""
        return self.hits / self.of if self.of else math.nan

    def to_text(self) -> str:
        """`0.91 (0.85 to 0.95; 120 of 132)`."""
        if not self.of:
            return "none (of no image)"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}; {self.hits} of {self.of})"


def proportion(hits: int, of: int) -> Proportion:
    """A share with the interval of Clopper and Pearson [1934], which is never too narrow."""
    # Scoring reads rules and judges none: it goes without scipy.
    from scipy import special

    tail = (1.0 - _CONFIDENCE) / 2
    # The form of `scipy.stats.binomtest(...).proportion_ci`, without a search for each end.
    low = float(special.betaincinv(hits, of - hits + 1, tail)) if hits else 0.0
    high = float(special.betaincinv(hits + 1, of - hits, 1.0 - tail)) if hits < of else 1.0
    return Proportion(hits=hits, of=of, low=low, high=high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a cut does to one part."""

    precision: Proportion
    """Of the rejected images, those that are bad."""
    recall: Proportion
    """Of the bad images, those that are rejected."""
    rejected: Proportion
    """Of all images, those that are rejected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdRule:
    """A cut with a name, what it was chosen for, and what it does."""

    name: str
    cut: float
    """Images of a lower quality, as the model says it, are rejected."""
    bad_below: float
    """Images of a lower quality, as people say it, are bad."""
    target: Target
    wanted: float
    """Value of the target that was asked for, on the val part."""
    split: str
    val: Judgement
    """On the part it was chosen on: flattering."""
    test: Judgement | None = None
    """On images nothing was chosen on; None if the run has no such part."""

    def __post_init__(self) -> None:
        """Refuse what `lmcl threshold` cannot have written.

        Raises:
            ValueError: Names what is wrong.
        """
        check_rule_name(self.name)
        if not all(map(math.isfinite, (self.cut, self.bad_below, self.wanted))):
            raise ValueError("cut, bad_below and wanted are numbers")
        if len(self.split) > 1000:
            raise ValueError("split is longer than 1000 characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """thresholds.json."""

    format_version: int
    rules: tuple[ThresholdRule, ...]


def check_rule_name(name: str) -> None:
    """Refuse a name that is no plain word.

    Raises:
        ValueError: Says what a name is.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a rule's name is up to 80 letters, digits, points and dashes, got "
            f"{printable(name, 100)!r}"
        )


def judge(
    quality: NDArray[np.float64], truth: NDArray[np.float64], *, cut: float, bad_below: float
) -> Judgement:
    """What a cut does: precision, recall and share of the rejected, with intervals.

    Args:
        quality: As the model says it, [0, 1], higher = better.
        truth: As people say it, in the same units.
        cut: What is lower is rejected.
        bad_below: What is lower is bad.
    """
    is_rejected, is_bad = quality < cut, truth < bad_below
    both = int(np.sum(is_rejected & is_bad))
    return Judgement(
        precision=proportion(both, int(np.sum(is_rejected))),
        recall=proportion(both, int(np.sum(is_bad))),
        rejected=proportion(int(np.sum(is_rejected)), len(quality)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Precision and recall at every cut that tells images apart."""

    cut: NDArray[np.float64]
    """Rising; halfway between two neighbouring qualities, the last above all."""
    rejected: NDArray[np.int64]
    """Images below each cut, at least one."""
    caught: NDArray[np.int64]
    """Bad ones among them."""
    bad: int
    n: int

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of the rejected images that are bad."""
        return np.asarray(self.caught / self.rejected)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of the bad images that are rejected; NaN if there are none."""
        return np.asarray(self.caught / self.bad if self.bad else self.caught * math.nan)


def threshold_curve(
    quality: NDArray[np.float64], truth: NDArray[np.float64], *, bad_below: float
) -> Curve:
    """The curve of one part; images without a score are to be left out before."""
    order = np.argsort(quality, kind="stable")
    q, is_bad = quality[order], truth[order] < bad_below
    last = np.flatnonzero(np.append(np.diff(q) > 0, True)) if len(q) else np.zeros(0, np.int64)
    after = np.append(q[last[:-1] + 1], q[-1] + 1e-6) if len(q) else np.zeros(0)
    # Halfway: a score that differs in its last bits falls on the same side.
    cuts = (q[last] + after) / 2 if len(q) else np.zeros(0)
    return Curve(
        cut=cuts,
        rejected=(last + 1).astype(np.int64),
        caught=np.cumsum(is_bad)[last].astype(np.int64) if len(q) else np.zeros(0, np.int64),
        bad=int(np.sum(is_bad)),
        n=len(q),
    )


def choose_cut(curve: Curve, target: Target, wanted: float) -> float:
    """The cut of a curve that keeps a promise and costs least.

    `precision`: the highest cut, so the most bad images found, whose rejected images are bad in at
    least this share. `recall`: the lowest cut that finds at least this share of the bad ones.
    `reject-share`: the highest cut that rejects at most this share.

    Raises:
        LmclError: If there is none, or no image is bad; exit code 3.
    """
    if target != "reject-share" and not curve.bad:
        raise LmclError(
            f"none of the {curve.n} images of the val part is bad by --bad-below, so no cut can be "
            "judged by those it finds; take a higher --bad-below",
            exit_code=3,
        )
    if target == "precision":
        good = np.flatnonzero(curve.precision >= wanted)
        place = int(good[-1]) if len(good) else -1
    elif target == "recall":
        place = int(np.flatnonzero(curve.recall >= wanted)[0])
    else:
        good = np.flatnonzero(curve.rejected <= wanted * curve.n + 1e-9)
        place = int(good[-1]) if len(good) else -1
    if place < 0:
        raise LmclError(_unreachable(curve, target, wanted), exit_code=3)
    return float(curve.cut[place])


def _unreachable(curve: Curve, target: Target, wanted: float) -> str:
    if target == "precision":
        best = float(np.max(curve.precision, initial=0.0))
        return (
            f"no cut on the val part has a precision of {wanted:g}: the best has {best:.3f}; ask "
            "for at most that, or take a higher --bad-below"
        )
    return (
        f"a share of {wanted:g} of the {curve.n} images of the val part is less than one image; "
        "ask for a larger share"
    )


def read_rules(folder: Path) -> Mapping[str, ThresholdRule]:
    """The rules of a model folder by name; empty if there are none.

    Raises:
        LmclError: If the file is damaged; exit code 5.
    """
    path = folder / THRESHOLDS
    if not path.exists():
        return {}
    try:
        return parse_rules(read_regular(path, limit_bytes=MODEL_FILES[THRESHOLDS]))
    except (ValueError, ShardError) as error:
        raise LmclError(
            f"{printable(path)}: holds no rules of this version ({printable(error)}); remove it, "
            "and choose them anew by `lmcl threshold RUN`",
            exit_code=5,
        ) from error


def parse_rules(data: bytes) -> dict[str, ThresholdRule]:
    """The rules of a file's bytes.

    Raises:
        ValueError: If they are none that `lmcl threshold` has written.
    """
    try:
        found = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if found.format_version != 1 or len(found.rules) > _MOST_RULES:
        raise ValueError(f"format_version is 1, and there are at most {_MOST_RULES} rules")
    return {rule.name: rule for rule in found.rules}


def write_rule(folder: Path, rule: ThresholdRule) -> None:
    """Add a rule to a model folder; one of the same name is replaced."""
    rules = {**read_rules(folder), rule.name: rule}
    file = _File(format_version=1, rules=tuple(rules[name] for name in sorted(rules)))
    text = msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"
    write_atomic(folder / THRESHOLDS, text)


def find_rule(folder: Path, name: str) -> ThresholdRule:
    """A rule of a model folder by its name.

    Raises:
        LmclError: If there is none of this name; exit code 2.
    """
    rules = read_rules(folder)
    if name not in rules:
        known = ", ".join(sorted(rules)[:20]) or "none"
        raise LmclError(
            f"--keep {printable(name, 100)}: {printable(folder)} has no rule of this name (it has: "
            f"{printable(known, 500)}); `lmcl threshold RUN --bad-below X --precision P` makes one",
            exit_code=2,
        )
    return rules[name]
