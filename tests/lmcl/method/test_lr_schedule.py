import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcl.method.lr_schedule import (
    TINY,
    ScheduleConfig,
    learning_rate,
    same_until,
    schedule_warnings,
    step_momentum,
    trace_schedule,
)

PAPER = ScheduleConfig(warmup_epochs=0.0)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 2e-4), (2, 2e-4), (3, 2e-5), (6, 2e-6)])
def test_the_paper_divides_by_ten_every_three_epochs(epoch: int, expected: float) -> None:
    rate = learning_rate(PAPER, step=epoch * 10, steps_per_epoch=10, epochs=9)
    assert rate == pytest.approx(expected)


def test_a_rate_divided_very_often_is_zero() -> None:
    assert learning_rate(PAPER, step=10_000, steps_per_epoch=1, epochs=1_000_000) == 0.0


def test_warm_up_rises_linearly_and_is_part_of_the_schedule() -> None:
    config = ScheduleConfig(lr=1.0, warmup_epochs=1.0)
    rates = [learning_rate(config, step=k, steps_per_epoch=4, epochs=3) for k in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@given(
    step=st.integers(0, 999),
    shape=st.sampled_from(["step", "cosine"]),
    warmup=st.floats(0.0, 5.0),
)
def test_the_rate_stays_between_zero_and_its_peak(step: int, shape: str, warmup: float) -> None:
    config = ScheduleConfig(lr=0.1, shape=shape, warmup_epochs=warmup)
    rate = learning_rate(config, step=step, steps_per_epoch=100, epochs=10)
    assert 0 < rate <= 0.1 + 1e-12


def test_cosine_ends_at_its_final_fraction() -> None:
    config = ScheduleConfig(lr=1.0, shape="cosine", warmup_epochs=0.0, final_fraction=0.01)
    rate = learning_rate(config, step=9999, steps_per_epoch=1000, epochs=10)
    assert rate == pytest.approx(0.01, abs=1e-4)


@given(beta=st.floats(0.001, 0.999), steps=st.integers(1, 5000))
def test_steps_of_one_epoch_make_the_momentum_of_an_epoch(beta: float, steps: int) -> None:
    assert step_momentum(beta, steps_per_epoch=steps) ** steps == pytest.approx(beta, rel=1e-6)


def test_wsd_keeps_its_rate_until_the_last_epochs_and_falls_linearly() -> None:
    config = ScheduleConfig(
        lr=1.0, shape="wsd", warmup_epochs=0.0, decay_epochs=2, final_fraction=0.2
    )
    rates = [learning_rate(config, step=k, steps_per_epoch=2, epochs=4) for k in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


SCHEDULES = st.builds(
    ScheduleConfig,
    shape=st.sampled_from(["step", "cosine", "wsd"]),
    decay=st.sampled_from([1.0, 2.0, 10.0, 1e6]),
    decay_epochs=st.integers(1, 12),
    final_fraction=st.sampled_from([0.0, 1e-6, 0.01, 1.0]),
    warmup_epochs=st.sampled_from([0.0, 0.5, 1.0, 3.5, 40.0]),
)


@given(SCHEDULES, st.integers(1, 40), st.integers(1, 9))
def test_a_traced_schedule_has_the_rates_of_the_run(
    schedule: ScheduleConfig, epochs: int, steps: int
) -> None:
    rates = [
        learning_rate(schedule, step=k, steps_per_epoch=steps, epochs=epochs)
        for k in range(epochs * steps)
    ]
    curve = trace_schedule(schedule, steps_per_epoch=steps, epochs=epochs)
    assert (curve.first, curve.peak, curve.last) == (rates[0], max(rates), rates[-1])
    tiny = [rate < TINY * (1 - 1e-9) * curve.peak for rate in rates]
    assert curve.tiny_epochs * steps == pytest.approx(
        len(tiny) - max(k for k in range(len(tiny)) if not tiny[k]) - 1
    )
    assert len(curve.bars) == 32


@given(SCHEDULES, st.integers(1, 40), st.integers(1, 9))
def test_the_way_out_of_an_odd_schedule_leads_out(
    schedule: ScheduleConfig, epochs: int, steps: int
) -> None:
    def warnings(one: ScheduleConfig) -> list[str]:
        curve = trace_schedule(one, steps_per_epoch=steps, epochs=epochs)
        return schedule_warnings(one, curve, epochs=epochs)

    for _ in range(2):  # one way out may show what stood behind it
        found = warnings(schedule)
        for name, value in re.findall(r"schedule\.(\w+) to (?:at most )?([\d.]+)", " ".join(found)):
            number = int(value) if name == "decay_epochs" else float(value)
            schedule = dataclasses.replace(schedule, **{name: number})
    assert not warnings(schedule)


def test_the_papers_division_every_three_epochs_is_warned_of_in_thirty() -> None:
    schedule = ScheduleConfig()
    curve = trace_schedule(schedule, steps_per_epoch=10, epochs=30)
    (said,) = schedule_warnings(schedule, curve, epochs=30)
    assert "the last 15 of 30 epochs" in said
    assert "schedule.decay_epochs to 10" in said
    assert not schedule_warnings(
        schedule, trace_schedule(schedule, steps_per_epoch=10, epochs=9), epochs=9
    )


@given(SCHEDULES, st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.data())
def test_a_longer_run_that_goes_on_exactly_has_the_rates_it_would_have_had(
    schedule: ScheduleConfig, epochs: int, before: int, steps: int, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, min(epochs, before) * steps))
    if same_until(schedule, done / steps, epochs=epochs, before=before):
        for k in range(done):
            rates = [
                learning_rate(schedule, step=k, steps_per_epoch=steps, epochs=length)
                for length in (epochs, before)
            ]
            assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("shape", "done", "exact"),
    [("step", 9.0, True), ("cosine", 9.0, False), ("wsd", 6.0, True), ("wsd", 6.5, False)],
)
def test_what_can_be_made_longer(shape: str, done: float, exact: bool) -> None:
    assert same_until(ScheduleConfig(shape=shape), done, epochs=12, before=9) is exact
