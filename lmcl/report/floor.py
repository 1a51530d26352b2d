"""The floor beside the trained figure: a ridge on the same frozen features (`lmcl probe`)."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from lmcl.evaluation.metrics import Evaluation, evaluate
from lmcl.evaluation.predictions import Predictions, read_predictions
from lmcl.evaluation.probe import (
    PROBE,
    PROBE_FILE,
    PROBE_PREDICTIONS,
    ProbeFacts,
    difference_from_probe,
    parse_probe,
)
from lmcl.evaluation.significance import Difference
from lmcl.report.formatting import format_figure, format_interval
from lmcl.report.run_files import MAX_TABLE_BYTES, RunFileError, open_run_file, read_run_file
from shards.text import printable


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """What `lmcl probe` left in a run folder; without facts, why it is not shown."""

    facts: ProbeFacts | None = None
    predictions: Predictions | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """A ridge on the frozen features against the trained model, on the same images."""

    facts: ProbeFacts | None = None
    evaluation: Evaluation | None = None
    difference: Difference | None = None
    """The model's SRCC less the ridge's."""
    reason: str = ""
    """Why there is none, and what makes one."""

    @property
    def words(self) -> str:
        """The comparison in a sentence; empty if there is none."""
        e, gap = self.evaluation, self.difference
        if e is None or gap is None or self.facts is None:
            return ""
        interval = format_interval(e, "srcc")
        ahead = f"{format_figure(abs(gap.value))} {'ahead of' if gap.value >= 0 else 'behind'} it"
        ends = gap.interval
        sure = (
            f" (95 % interval of the difference {format_figure(ends.low)} to "
            f"{format_figure(ends.high)})"
            if ends
            else ""
        )
        doubt = (
            " The interval includes zero: on these images training shows no gain over the features "
            "it started from."
            if ends and ends.low <= 0 <= ends.high
            else ""
        )
        return (
            f"A ridge on the same frozen features reaches an SRCC of {format_figure(e.srcc)}"
            f"{f' ({interval})' if interval else ''}; the trained model is {ahead}{sure}.{doubt}"
        )

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        if self.facts is None or self.evaluation is None or self.difference is None:
            return {"reason": self.reason}
        return {
            "facts": dataclasses.asdict(self.facts),
            "evaluation": self.evaluation.to_json(),
            "srcc_difference": dataclasses.asdict(self.difference),
        }


def read_probe(root: Path) -> Probe:
    """The probe of a run folder, as far as it can be read."""
    try:
        facts = parse_probe(read_run_file(root, f"{PROBE}/{PROBE_FILE}"), root / PROBE / PROBE_FILE)
        name = f"{PROBE}/{PROBE_PREDICTIONS}"
        with open_run_file(root, name, limit_bytes=MAX_TABLE_BYTES) as source:
            digest = hashlib.sha256(source.read()).hexdigest()
    except RunFileError as error:
        what = "no probe was made" if error.is_missing else f"{error.name} {error.reason}"
        # Of a folder that `lmcl eval --table` made there is no run to probe.
        is_run = (root / "config.toml").is_file()
        how = f"; `lmcl probe {printable(root)}` makes one" if is_run else ""
        return Probe(reason=what + how)
    except ValueError as error:
        return Probe(reason=f"{error}; `lmcl probe {printable(root)}` makes another")
    if digest != facts.predictions_sha256:
        return Probe(
            reason=f"{PROBE}/{PROBE_PREDICTIONS} is not the file that {PROBE_FILE} is about; "
            f"`lmcl probe {printable(root)}` makes both again"
        )
    with open_run_file(root, name, limit_bytes=MAX_TABLE_BYTES) as source:
        table = read_predictions(root / name, source)
    return Probe(facts=_visible(facts), predictions=table)


def compare_with_probe(
    model: Predictions, probe: Probe, *, part: str, split_hash: str, root: Path
) -> Floor:
    """The floor of a run's headline part.

    Args:
        model: Its predictions.
        probe: What the run folder holds.
        part: Which part that is.
        split_hash: Of the run's split; empty if not known.
        root: The run folder, for the advice.
    """
    facts, table = probe.facts, probe.predictions
    if facts is None or table is None:
        return Floor(reason=probe.reason)
    again = f"`lmcl probe {printable(root)}` makes it for this one"
    if facts.part != part or (split_hash and facts.split_hash != split_hash):
        what = f"the {facts.part} part of split {facts.split}"
        return Floor(reason=f"the probe is about {what}, the report about the {part} part; {again}")
    try:
        difference = difference_from_probe(model, table)
    except ValueError as error:
        return Floor(reason=f"the probe cannot be compared: {error}; {again}")
    found = evaluate(table.prediction, table.mos, mos_std=table.mos_std, group=table.group)
    return Floor(facts=facts, evaluation=found, difference=difference)


def _visible(facts: ProbeFacts) -> ProbeFacts:
    """A stranger's texts, made one line of visible characters each."""
    texts: dict[str, Any] = {
        field.name: printable(value)
        for field in dataclasses.fields(facts)
        if isinstance(value := getattr(facts, field.name), str)
    }
    return dataclasses.replace(facts, **texts)
