import pytest

from shards.picture_notes import join_notes, shape_note, too_small


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ((2, 2), "tiny: 2 x 2 pixels"),
        ((31, 500), "tiny: 31 x 500 pixels"),
        ((32, 256), ""),
        ((32, 257), "extreme shape: 32 x 257 pixels"),
        ((4000, 300), "extreme shape: 4000 x 300 pixels"),
        ((512, 384), ""),
    ],
)
def test_sizes_that_should_be_looked_at_have_a_note(size, note) -> None:
    assert shape_note(*size) == note


def test_each_note_is_said_once() -> None:
    assert join_notes(["one", "", "two", "one"]) == "one; two"


def test_the_shorter_side_decides_what_is_too_small() -> None:
    assert too_small(40, 40, 40) == ""
    assert "39 x 400 pixels" in too_small(39, 400, 40)
