import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcl.method.lr_schedule import ScheduleConfig, learning_rate, step_momentum

PAPER = ScheduleConfig(warmup_epochs=0.0)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 2e-4), (2, 2e-4), (3, 2e-5), (6, 2e-6)])
def test_the_paper_divides_by_ten_every_three_epochs(epoch: int, expected: float) -> None:
    rate = learning_rate(PAPER, step=epoch * 10, steps_per_epoch=10, epochs=9)
    assert rate == pytest.approx(expected)


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
