"""`lmcl bench step` on a toy model: every figure is there, and times add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lmcl.bench.stopwatch import Part, Spent, Stopwatch
from lmcl.cli.bench import step as command

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.toml"
TOY = ("crops.random=2", "encoder.depth=1", "saliency.layers=1")


Records = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of a small run over two batch sizes."""
    output = tmp_path_factory.mktemp("bench") / "step.jsonl"
    changes = [part for change in TOY for part in ("--set", change)]
    done = CliRunner().invoke(
        command,
        [
            *("--config", str(SMOKE), *changes, "--codec", "png", "--steps", "1"),
            *("--rounds", "2", "--workers", "0", "--batch-sizes", "1,2"),
            *("--output", str(output)),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    assert done.output.count("plain_loop takes") == 2
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def records(sweep: list[dict[str, Any]]) -> Records:
    """The lines of the larger batch, by case."""
    return {line["case"]: line for line in sweep if line["params"]["batch"] == 2}


def test_every_batch_size_gets_its_lines(sweep: list[dict[str, Any]]) -> None:
    assert [line["params"]["batch"] for line in sweep if line["case"] == "ours"] == [1, 2]


def test_both_loops_have_a_speed_and_every_part_a_share(
    records: Records,
) -> None:
    for loop in ("ours", "plain_loop"):
        assert records[loop]["unit"] == "crops/s"
        assert records[loop]["median"] > 0
        assert {f"{loop}_part_{part}" for part in Part} <= set(records)


def test_parts_of_a_step_add_up_to_it(records: Records) -> None:
    for loop in ("ours", "plain_loop"):
        shares = [records[f"{loop}_part_{part}"]["params"]["share"] for part in Part]
        # Medians of two rounds are means, and means add up.
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)
        assert records[f"{loop}_part_backward"]["median"] > 0


def test_targets_are_judged_by_the_figure_beside_them(
    records: Records,
) -> None:
    networks = records["ours_share_networks"]
    assert networks["params"]["met"] == (networks["median"] >= 0.9)
    around = records["ours_share_around"]
    assert around["params"]["met"] == (around["median"] <= 0.1)


def test_the_ratio_is_of_speeds(records: Records) -> None:
    low, high = (
        records["ratio_ours_to_plain_loop"]["p10"],
        records["ratio_ours_to_plain_loop"]["p90"],
    )
    assert 0 < low <= high


def test_operations_are_counted_as_the_layers_say(records: Records) -> None:
    # The stem's first convolution alone: 32 x 32 places, 3 x 9 products, 16 channels, twice for
    # multiply and add; forward and the gradient of its weights.
    least = 2 * 2 * 32 * 32 * 3 * 9 * 16 / 1e9
    assert least < records["ours"]["params"]["gflop_per_crop"] < 100 * least


def test_the_parts_are_compared_with_the_clock(records: Records) -> None:
    for loop in ("ours", "plain_loop"):
        gap = records[f"{loop}_gap_of_parts"]
        assert gap["params"]["most"] == 0.03
        assert gap["params"]["met"] == (gap["median"] <= 0.03)


def test_every_line_says_what_computed_it(records: Records) -> None:
    for case, line in records.items():
        device, decode, others = line["engines"].split(", ", 2)
        assert device.startswith("device cpu")
        is_plain = case.startswith("plain_loop")
        assert decode.startswith("decode pillow" if is_plain else "decode dali-cpu")
        assert ("loss l1" if is_plain else "loss chunked fp32 D=48") in others


class Clock:
    """Seconds that pass when it is told so, and a little with every look."""

    def __init__(self, a_look: float = 0.0) -> None:
        self.now, self.a_look = 0.0, a_look

    def __call__(self) -> float:
        self.now += self.a_look
        return self.now


def test_time_belongs_to_the_part_entered_last() -> None:
    clock = Clock()
    watch = Stopwatch(torch.device("cpu"), clock)
    watch.start(Part.WAIT)
    for part, seconds in ((Part.FORWARD, 1.0), (Part.BACKWARD, 2.0), (Part.WAIT, 4.0)):
        clock.now += seconds
        watch.enter(part)
    clock.now += 8.0
    spent = watch.stop()
    assert spent.parts == {
        **dict.fromkeys(Part, 0.0), Part.WAIT: 9.0, Part.FORWARD: 2.0, Part.BACKWARD: 4.0,
    }  # fmt: skip
    assert (spent.total, spent.wall, spent.gap) == (15.0, 15.0, 0.0)


@pytest.mark.parametrize("a_look", [0.001, 0.5])
def test_what_no_part_has_is_in_the_gap(a_look: float) -> None:
    """Arithmetic on a clock that stands still between looks; nothing is timed."""
    clock = Clock(a_look)
    watch = Stopwatch(torch.device("cpu"), clock)
    watch.start(Part.WAIT)
    clock.now += 1.0
    watch.enter(Part.FORWARD)
    clock.now += 1.0
    spent = watch.stop()
    # Two looks of the clock belong to the round and to no part: its first and its last.
    assert spent.wall - spent.total == pytest.approx(2 * a_look)
    assert spent.gap == pytest.approx(2 * a_look / (2 + 4 * a_look))


def test_a_part_that_is_counted_twice_is_a_gap_too() -> None:
    spent = Spent(wall=2.0, parts={Part.FORWARD: 2.0, Part.OBJECTIVE: 0.5})
    assert spent.gap == pytest.approx(0.25)


def test_a_list_of_batch_sizes_is_checked() -> None:
    done = CliRunner().invoke(command, ["--batch-sizes", "8,x"])
    assert done.exit_code == 2
    assert "8,16,32" in done.output
