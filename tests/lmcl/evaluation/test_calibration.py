"""The calibration file: percentiles, distances, intervals; and what is no calibration."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist

from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import AdaptiveRule
from lmcl.evaluation.calibration import (
    CALIBRATION,
    NEIGHBOURS,
    Calibration,
    Distances,
    Meaning,
    neighbour_distances,
    percentiles,
    prediction_interval,
    read_meaning,
    write_calibration,
)
from lmcl.evaluation.conformal import Conformal
from shards.score_scale import ScoreScale


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(**changes) -> Calibration:
    values = {
        "training_set": "demo",
        "split": "s-00",
        "population": tuple(np.linspace(0.1, 0.9, 50).tolist()),
        "intervals": Conformal(floor=0.02, edges=(), residuals=((0.5, 1.0, 1.5, 2.0) * 1,)),
        "distances": Distances(k=5, of_val=(0.1, 0.2, 0.3), sha256=""),
        "crops": AdaptiveRule(
            half_width=0.02, usual_spread=0.05, first=3, step=1, agreement=0.998, share=0.35
        ),
    }
    return Calibration(**(values | changes))


@settings(deadline=None, max_examples=50)
@given(
    population=st.lists(st.integers(0, 20), min_size=1, max_size=40),
    value=st.integers(-2, 22),
)
def test_percentiles_are_scipys(population: list[int], value: int) -> None:
    rising = np.sort(np.array(population, dtype=np.float64))
    found = percentiles([float(value)], rising)[0]
    assert found == pytest.approx(stats.percentileofscore(population, value, kind="mean"))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_distances_are_those_to_the_nearest_embeddings(k: int) -> None:
    some, others = unit_rows(7, 12), unit_rows(40, 12, seed=1)
    expected = np.sort(cdist(some, others, "cosine"), axis=1)[:, :k].mean(axis=1)
    found = neighbour_distances(some, others, k=k)
    assert found == pytest.approx(expected, abs=1e-6)
    alone = [neighbour_distances(one[None], others, k=k)[0] for one in some]
    assert found.tolist() == alone


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write_calibration(tmp_path, make(), unit_rows(30, 8))
    read = read_meaning(tmp_path)
    assert read is not None
    assert read.calibration == written.calibration
    assert read.digest == written.digest
    assert np.array_equal(read.neighbours, written.neighbours)
    far = -written.neighbours.mean(axis=0, keepdims=True)
    assert read.unusual(far.astype(np.float32))[0] == 1.0
    assert read.percentile([0.0, 0.5, 1.0]) == pytest.approx([0.0, 50.0, 100.0])


def test_a_split_without_val_part_says_what_is_missing(tmp_path: Path) -> None:
    lacking = make(intervals=None, distances=None, crops=None)
    write_calibration(tmp_path, lacking, unit_rows(3, 8))
    read = read_meaning(tmp_path)
    assert read is not None
    assert "no intervals and no `unusual`" in read.calibration.missing
    assert math.isnan(read.unusual(unit_rows(1, 8))[0])
    scale = ScoreScale(kind="mos", low=1, high=5, higher_is_better=True)
    ends = prediction_interval(read.calibration, scale, [0.5], [0.1], confidence=0.9)
    assert np.isnan(ends).all()


@pytest.mark.parametrize(("low", "high", "up"), [(1.0, 5.0, True), (0.0, 100.0, False)])
def test_intervals_stand_in_the_scale_and_end_where_it_ends(
    low: float, high: float, up: bool
) -> None:
    scale = ScoreScale(kind="mos", low=low, high=high, higher_is_better=up)
    one = make(intervals=Conformal(floor=0.1, edges=(), residuals=((1.0,) * 20,)))
    lower, upper = prediction_interval(one, scale, [0.5, 0.95], [0.1, 0.1], confidence=0.9)
    assert (upper - lower)[0] == pytest.approx(0.4 * (high - low))
    assert max(upper) <= high
    assert min(lower) >= low
    assert np.all(lower <= scale.from_unit([0.5, 0.95]))


def damaged(folder: Path, change) -> None:
    file = folder / CALIBRATION
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / CALIBRATION).write_text("{"),
        lambda f: (f / CALIBRATION).write_text("[" * 100_000),
        lambda f: (f / CALIBRATION).write_bytes(b"{" + b" " * (1 << 24)),
        lambda f: damaged(f, lambda t: t.update(format_version=9)),
        lambda f: damaged(f, lambda t: t.update(population=[1, 0])),
        lambda f: damaged(f, lambda t: t.update(population="x")),
        lambda f: damaged(f, lambda t: t.update(population=[0.5] * 300_000)),
        lambda f: damaged(f, lambda t: t["intervals"].update(floor=-1)),
        lambda f: damaged(f, lambda t: t["crops"].update(first=0)),
        lambda f: damaged(f, lambda t: t["distances"].update(k=0)),
        lambda f: damaged(f, lambda t: t["distances"].update(sha256="0" * 64)),
        lambda f: (f / NEIGHBOURS).unlink(),
        lambda f: (f / NEIGHBOURS).write_bytes(b"\xff" * 40),
    ],
    ids=[
        *("no-json", "nested", "huge", "version", "falling", "text", "many", "floor", "first"),
        *("k", "other-neighbours", "no-neighbours", "damaged-neighbours"),
    ],
)
def test_a_damaged_calibration_is_one_sentence_with_a_way_out(tmp_path: Path, spoil) -> None:
    write_calibration(tmp_path, make(), unit_rows(30, 8))
    spoil(tmp_path)
    with pytest.raises(LmclError, match="lmcl calibrate RUN") as raised:
        read_meaning(tmp_path)
    assert raised.value.exit_code == 5
    assert len(str(raised.value)) < 2000


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_meaning(tmp_path) is None


def test_a_meaning_answers_for_arrays() -> None:
    meaning = Meaning(calibration=make(), neighbours=unit_rows(9, 4))
    assert meaning.unusual(unit_rows(3, 4)).shape == (3,)
