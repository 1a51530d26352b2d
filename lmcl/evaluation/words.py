"""Figures in words, for the last lines of `lmcl train`, `lmcl demo` and `lmcl eval`."""

from lmcl.evaluation.metrics import Evaluation

FEW_IMAGES = 30
"""With fewer a correlation may be anything: its interval is shown."""


def figures_words(found: Evaluation) -> str:
    """SRCC and PLCC with the number of images, or why there are none."""
    images = "1 image" if found.n == 1 else f"{found.n} images"
    if why := found.reasons.get("srcc"):
        return f"SRCC and PLCC are not defined: {why} ({images})"
    return f"SRCC {found.srcc:.4f}  PLCC {found.plcc_raw:.4f}  ({images})"


def caution_words(found: Evaluation) -> str:
    """A caution where the images are few; empty where they are enough, or have no figures."""
    if found.n >= FEW_IMAGES or "srcc" in found.reasons:
        return ""
    interval = found.intervals.get("srcc")
    reach = (
        f"a 95 % interval of SRCC reaches from {interval.low:.2f} to {interval.high:.2f}"
        if interval
        else "there is no interval of SRCC"
    )
    return f"caution: {found.n} images are few, {reach}"


def sets_words(by_set: dict[str, Evaluation]) -> list[str]:
    """A line for each of several sets, and one for their mean; nothing of a single set."""
    if not by_set:
        return []
    lines = [f"{name}: {figures_words(found)}" for name, found in by_set.items()]
    if any("srcc" in found.reasons for found in by_set.values()):
        return [*lines, f"mean over {len(by_set)} sets: not defined, as one of them has no SRCC"]
    mean = sum(found.srcc for found in by_set.values()) / len(by_set)
    return [*lines, f"mean over {len(by_set)} sets: SRCC {mean:.4f}"]
