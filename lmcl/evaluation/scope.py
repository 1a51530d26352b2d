"""What a predictions file was made of: the set, its scale, the model's own set, the mapping.

`lmcl eval` writes it into `predictions/<name>.metrics.json` under `scope`; the matrix across sets
is made of it. A newcomer's trap: predictions stand in the tested set's scale and direction already;
the direction is stated for the reader and never applied a second time.
"""

import dataclasses
from pathlib import Path

import msgspec

from lmcl.errors import LmclError
from lmcl.evaluation.metrics import LogisticMapping
from lmcl.evaluation.metrics.logistic import LogisticFit
from shards import ScoreScale
from shards.text import printable

_LARGEST = 1e30

WHOLE = "whole"
"""The protocol of most papers across sets: every labelled image of the other set, once."""
ON_THEMSELVES = "fitted on the judged images themselves"
ON_TRAIN = "fitted on each split's train part, applied to its test part"
ON_VAL = "fitted on each split's val part, applied to its test part"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitFigures:
    """Figures on the test part of one split of the tested set."""

    name: str
    """Of the split."""
    hash: str
    """Over its ids and the rule it was drawn by."""
    n: int
    """Images judged."""
    n_fit: int
    """Images the mapping was fitted on."""
    srcc: float | None
    """None where it is not defined."""
    krcc: float | None
    plcc_raw: float | None
    plcc_fit4: float | None
    rmse_fit4: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """One model on one part of one set."""

    tested_on: str
    """Set the images come from."""
    part: str
    """train, val, test or all."""
    trained_on: str
    """Set the model comes from."""
    scale: ScoreScale
    """Of the tested set: predictions were brought to it by both ranges and directions."""
    trained_scale: ScoreScale
    """Of the model's own set."""
    images: int
    """Images judged, unlabelled ones included."""
    left_out: int = 0
    """Images of the tested set that the model was trained on, byte for byte; not judged."""
    left_out_known: bool = True
    """False if the training set was not there to compare with."""
    across: bool | None = None
    """Whether it is another set than the model's own, told by the images; None: not written down
    (earlier versions), the names decide."""
    protocol: str = WHOLE
    """`whole`, or the rule the splits were drawn by."""
    mapping: str = ON_THEMSELVES
    """What the 4-parameter mapping was fitted on."""
    fitted: LogisticMapping | None = None
    """The mapping, if other images than the judged ones gave it."""
    splits: tuple[SplitFigures, ...] = ()
    """One per split, for a protocol of splits."""

    @property
    def is_across(self) -> bool:
        """Whether it is another set than the model's own."""
        return self.tested_on != self.trained_on if self.across is None else self.across

    @property
    def direction(self) -> str:
        """Whether the model's direction had to be turned."""
        if self.scale.higher_is_better == self.trained_scale.higher_is_better:
            return "same direction"
        return "direction turned"


class _File(msgspec.Struct):
    scope: Scope | None = None


def read_scope(predictions: Path) -> Scope | None:
    """The scope of a predictions file; None if it was made without one.

    Raises:
        LmclError: If the file beside it cannot be read; exit code 3.
    """
    path = predictions.with_name(f"{predictions.stem}.metrics.json")
    return parse_scope(path.read_bytes(), path) if path.is_file() else None


def parse_scope(content: bytes, path: Path) -> Scope | None:
    """The scope in the content of a `<name>.metrics.json`; None if it holds none.

    Args:
        content: The file's bytes.
        path: The file, for messages.

    Raises:
        LmclError: If it is not what `lmcl eval` writes; exit code 3.
    """
    try:
        scope = msgspec.json.decode(content, type=_File).scope
        if scope is not None and scope.fitted is not None:
            _check_fit(scope.fitted.fit4)
            _check_fit(scope.fitted.fit5)
        return scope
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise LmclError(
            f"{printable(path)}: is not what `lmcl eval` writes ({printable(error)}); delete it "
            "and evaluate again",
            exit_code=3,
        ) from error


def _check_fit(fit: LogisticFit) -> None:
    """Refuse a mapping that cannot be applied: `fit_logistic` makes none of these."""
    curve = {"logistic4": 4, "logistic5": 5}[fit.form]
    count = {"ok": curve, "linear_fallback": 2, "none": 0}[fit.status]
    numbers = (*fit.parameters, fit.centre, fit.scale, fit.target_centre, fit.target_scale)
    is_usable = all(abs(value) < _LARGEST for value in numbers) and fit.scale > 0.0
    if len(fit.parameters) != count or not is_usable:
        raise ValueError(f"a {fit.form} mapping that is {fit.status} has {count} finite parameters")
