"""What a score means beside the number: percentile, interval, and whether the image is unusual.

The figures come from the model folder's calibration (lmcl/evaluation/calibration.py); here they
are put into the scale of the training set, an image at a time.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import AdaptiveRule
from lmcl.evaluation.calibration import (
    CALIBRATION,
    CONFIDENCE,
    UNUSUAL,
    UNUSUAL_NOTE,
    Meaning,
    percentiles,
    prediction_interval,
)
from lmcl.evaluation.conformal import Conformal, check_confidence
from lmcl.inference.scores_file import UnreadableScoresError, note_path, read_note, read_rows
from shards.score_scale import ScoreScale
from shards.text import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpretation:
    """What a score means; None where the model has no calibration for it."""

    percentile: float | None = None
    """Share of the population, in %, that scores lower."""
    lower: float | None = None
    """People's score lies above it ..."""
    upper: float | None = None
    """... and below this with the asked confidence; both in the scale of the training set."""
    unusual: float | None = None
    """Share of val images [0, 1] that lie nearer to the training images."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the score should be doubted; empty for most."""
        return (UNUSUAL_NOTE,) if (self.unusual or 0.0) > UNUSUAL else ()


NOTHING = Interpretation()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Scores that a new image is compared with, of one model."""

    qualities: NDArray[np.float64]
    """Rising."""
    name: str

    @property
    def label(self) -> str:
        """How it is called in messages and in a scores file's origin."""
        return f"{len(self.qualities)} scores of {self.name}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Interpreter:
    """Reads scores by a calibration."""

    meaning: Meaning
    scale: ScoreScale
    confidence: float = CONFIDENCE
    population: Population | None = None
    """None: the model's own training images."""

    def __call__(
        self, quality: float, spread: float, embedding: NDArray[np.float32]
    ) -> Interpretation:
        """What the score of one image means.

        Args:
            quality: In [0, 1] units, higher = better.
            spread: Deviation of its crops' qualities.
            embedding: Unit-length mean over its crops.
        """
        if not math.isfinite(quality):
            return NOTHING
        one, spreads = np.array([quality]), np.array([spread])
        lower, upper = prediction_interval(
            self.meaning.calibration, self.scale, one, spreads, confidence=self.confidence
        )
        percentile = (
            percentiles(one, self.population.qualities)
            if self.population
            else self.meaning.percentile(one)
        )
        return Interpretation(
            percentile=_known(percentile[0]),
            lower=_known(lower[0]),
            upper=_known(upper[0]),
            unusual=_known(self.meaning.unusual(embedding[None])[0]),
        )

    @property
    def sentence(self) -> str:
        """What is compared with what, for the terminal; and what the calibration does not hold."""
        calibration = self.meaning.calibration
        if self.population:
            against = self.population.label
        else:
            against = f"{len(calibration.population)} training images of {calibration.training_set}"
        said = [f"percentile: among {printable(against)}"]
        intervals = calibration.intervals
        if intervals is not None:
            said.append(self._about(intervals))
        return "; ".join([*said, *filter(None, [calibration.missing])])

    def _about(self, intervals: Conformal) -> str:
        """What stands in lower and upper, or why nothing does."""
        places = np.array([*intervals.edges, math.inf]) - 1e-9
        reach, _ = intervals.reach(places, np.zeros(len(places)), confidence=self.confidence)
        if np.all(np.isfinite(reach)):
            return f"lower, upper: {100 * self.confidence:g} % of people's scores lie between"
        # Rounded down: what is advised is kept.
        most = math.floor(min(intervals.confidences) * 1000 + 1e-9) / 1000
        way_on = f"they give at most {most:g}" if most else "they give none"
        some = "" if not np.any(np.isfinite(reach)) else "of some qualities "
        return (
            f"lower, upper: {some}empty, the {intervals.n} calibration images are too few for "
            f"--confidence {self.confidence:g}; {way_on}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How scores are to be read and how many crops are looked at."""

    confidence: float | None = None
    """Of intervals; None: 0.9."""
    population: Path | None = None
    """Scores file of the same model that percentiles are taken in; None: the training images."""
    crops: Literal["all", "adaptive"] = "all"

    @property
    def needs_calibration(self) -> str:
        """The option that a model without calibration cannot serve; empty if there is none."""
        asked = {
            "--confidence": self.confidence is not None,
            "--population": self.population is not None,
            "--crops adaptive": self.crops == "adaptive",
        }
        return ", ".join(name for name, is_asked in asked.items() if is_asked)


DEFAULT_READING = Reading()


def make_interpreter(
    meaning: Meaning | None,
    place: Path,
    reading: Reading,
    *,
    scale: ScoreScale,
    fingerprint: str,
    width: int,
) -> Interpreter | None:
    """What reads a model's scores; None for a model without calibration.

    Args:
        meaning: The model's calibration.
        place: The model folder or the exported file, for messages.
        reading: As it was asked for.
        scale: Of the training set.
        fingerprint: Of the model, as in a scores file's origin.
        width: Numbers of an embedding.

    Raises:
        LmclError: If the calibration is of another model (5), or is asked for and missing (2).
    """
    if meaning is None:
        if reading.needs_calibration:
            raise LmclError(f"{reading.needs_calibration}: {uncalibrated(place)}", exit_code=2)
        return None
    if meaning.neighbours.size and meaning.neighbours.shape[1] != width:
        raise LmclError(
            f"{printable(place)}: its calibration has embeddings of "
            f"{meaning.neighbours.shape[1]} numbers, its model of {width}; make it anew by `lmcl "
            "calibrate RUN`, or remove it to score without",
            exit_code=5,
        )
    population = None
    if reading.population is not None:
        population = read_population(reading.population, fingerprint=fingerprint)
    return Interpreter(
        meaning=meaning,
        scale=scale,
        confidence=checked_confidence(reading.confidence),
        population=population,
    )


def adaptive_rule(
    place: Path, reading: Reading, interpreter: Interpreter | None
) -> AdaptiveRule | None:
    """When to stop looking at an image's crops; None: never.

    Raises:
        LmclError: If adaptive crops are asked for and the calibration has no rule; exit code 2.
    """
    if reading.crops == "all" or interpreter is None:
        return None
    rule = interpreter.meaning.calibration.crops
    if rule is None:
        raise LmclError(
            f"--crops adaptive: no rule with fewer crops kept the order of {printable(place)} on "
            "the val part (or there was none); score with --crops all",
            exit_code=2,
        )
    return rule


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def uncalibrated(place: Path) -> str:
    """The sentence about a model folder or an exported file without a calibration."""
    exported = place.suffix == ".onnx"
    again = ", then export it again" if exported else ""
    return (
        f"{printable(place)}: has no {'calibration' if exported else CALIBRATION}, so scores come "
        "without percentile, interval and `unusual`; `lmcl calibrate RUN` makes one where the "
        f"run's set is at hand{again}"
    )


def checked_confidence(asked: float | None) -> float:
    """The confidence of intervals.

    Raises:
        LmclError: If it is none; exit code 2.
    """
    confidence = CONFIDENCE if asked is None else asked
    try:
        check_confidence(confidence)
    except ValueError as error:
        raise LmclError(f"--confidence {confidence:g}: {error}", exit_code=2) from error
    return confidence


def read_population(file: Path, *, fingerprint: str) -> Population:
    """The qualities of a scores file that the same model wrote.

    Raises:
        LmclError: If it is missing (4), no scores file (5), or of another model (5).
    """
    if not file.is_file():
        what = "a folder, no scores file" if file.is_dir() else "there is no such file"
        raise LmclError(
            f"--population {printable(file)}: {what}; name one that `lmcl score` wrote",
            exit_code=4,
        )
    model = read_note(file).get("model", "")
    if model != fingerprint:
        known = "another model wrote it" if model else f"{note_path(file).name} is missing"
        raise LmclError(
            f"--population {printable(file)}: scores of two models are not comparable, and {known}"
            "; score that collection with this model first",
            exit_code=5,
        )
    try:
        found = np.sort(np.fromiter(_qualities(file), dtype=np.float64))
    except UnreadableScoresError as error:
        raise LmclError(
            f"--population {printable(file)}: cannot be read as a scores file ({error.reason}); "
            "name one as `lmcl score` wrote it",
            exit_code=5,
        ) from error
    if not len(found):
        raise LmclError(
            f"--population {printable(file)}: holds no score; name a file with some", exit_code=5
        )
    return Population(qualities=found, name=file.name)


def _qualities(file: Path) -> Iterator[float]:
    return (row.quality for row in read_rows(file) if row.quality is not None)
