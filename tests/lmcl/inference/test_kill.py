"""kill -9 at any moment: the same command again ends as an undisturbed one, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    "tries", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("mode", ["score", "move"])
def test_a_job_killed_anywhere_ends_as_an_undisturbed_one(
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    killed: Callable[..., dict[str, Any]],
    mode: str,
    tries: int,
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (photos / "link.jpg").symlink_to("img.01.jpg")
    photos.rename(start / "photos")
    assert killed(mode, tmp_path, tries, model_folder, "1")["failed"] == []
