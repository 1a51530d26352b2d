import pytest

from pipeline.decode_config import DecodeConfig, same_pixels


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("dali-cpu-2.4", "torch-pillow-13.0", True),
        ("dali-cpu-2.4", "dali-cpu-2.3", True),
        ("torch-pillow", "torch-pillow-12.1", True),
        ("dali-gpu-2.4", "dali-gpu-2.4", True),
        ("dali-mixed-2.4", "dali-gpu-2.4-hw0.65", True),
        ("dali-mixed-2.4", "dali-gpu-2.4", False),
        ("dali-gpu-2.4", "dali-gpu-2.4-hw1", False),
        ("dali-gpu-2.4", "dali-gpu-2.3", False),
        ("dali-gpu-2.4", "dali-cpu-2.4", False),
        ("none", "dali-cpu-2.4", False),
    ],
)
def test_recipes_tell_whether_pixels_are_the_same(one: str, other: str, same: bool) -> None:
    assert same_pixels(one, other) is same
    assert same_pixels(other, one) is same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hw_decoder_load": -0.1}, "hw_decoder_load is -0.1; it is a share, from 0 to 1"),
        ({"host_memory_padding": -1}, "host_memory_padding is -1"),
        ({"prefetch": 0}, "prefetch is 0; it must be at least 1 batch"),
    ],
)
def test_a_senseless_setting_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**change)
