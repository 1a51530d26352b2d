from pathlib import Path

import pytest

from lmcl.errors import LmclError
from lmcl.utils.hub_names import is_hub_name, parse_hub_name, refuse_hub_name

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf://me/photos", "me/photos", ""),
        ("hf://models/me/photos@v1.2", "me/photos", "v1.2"),
        ("hf://me/photos_2.0@refs/pr/4", "me/photos_2.0", "refs/pr/4"),
        (f"hf://me/photos@{COMMIT}", "me/photos", COMMIT),
        (str(Path("hf://me/photos")), "me/photos", ""),
    ],
)
def test_a_name_has_a_repository_and_a_revision(text: str, repository: str, revision: str) -> None:
    assert is_hub_name(text)
    name = parse_hub_name(text)
    assert (name.repository, name.revision) == (repository, revision)
    assert name.is_pinned == (revision == COMMIT)
    assert str(name) == f"hf://{repository}" + (f"@{revision}" if revision else "")


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://photos",
        "hf://datasets/me/photos",
        "hf://me/photos/config.json",
        "hf://me/photos@",
        "hf://me/photos@../../main",
        "hf://me/photos@a//b",
        "hf://me/photos@/etc/passwd",
        "hf://me/photos@main\n",
        "hf://../photos",
        "hf://me/..",
        "hf://me/a--b",
        "hf://me/photos.git",
        "hf://me/-photos",
        "hf://me/" + "a" * 97,
        "hf://me/phot\x1bos",
        "hf://me/photos?x=1",
        "hf://user:secret@host/me/photos",
    ],
)
def test_what_names_no_model_is_refused_before_anybody_is_asked(text: str) -> None:
    with pytest.raises(LmclError, match="hf://USER/NAME") as found:
        parse_hub_name(text)
    assert found.value.exit_code == 2
    assert "\x1b" not in str(found.value)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("text", ["runs/x", "starter", "hf", "./hf:x", "s3://me/photos"])
def test_paths_are_no_names_on_a_hub(text: str) -> None:
    assert not is_hub_name(text)
    refuse_hub_name(Path(text))
