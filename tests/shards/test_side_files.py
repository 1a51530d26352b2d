import pytest

from shards.side_files import LeftOut, PathFilter, is_side_path


@pytest.mark.parametrize(
    ("path", "is_side"),
    [
        ("a/b.jpg", False),
        ("./a/b.jpg", False),
        ("@eaDir/b.jpg", True),
        ("x/__MACOSX/y/._b.jpg", True),
        ("a/._b.jpg", True),
        ("a/Thumbs.db", True),
        ("desktop.INI", True),
        ("thumbs/b.jpg", False),
    ],
)
def test_what_systems_leave_is_known_by_name(path: str, is_side: bool) -> None:
    assert is_side_path(path) == is_side


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        ((), (), {"a.jpg", "raw/b.PNG", "raw/x/c.jpg"}),
        (("*.jpg",), (), {"a.jpg", "raw/x/c.jpg"}),
        (("*.png", "a.*"), (), {"a.jpg", "raw/b.PNG"}),
        ((), ("raw",), {"a.jpg"}),
        ((), ("raw/",), {"a.jpg"}),
        ((), ("raw/x/*",), {"a.jpg", "raw/b.PNG"}),
        (("raw/**/*.jpg",), (), {"raw/x/c.jpg"}),
        (("**/a.jpg",), (), {"a.jpg"}),
        (("*.jpg",), ("c.*",), {"a.jpg"}),
    ],
)
def test_patterns_choose_paths_in_any_case(include, exclude, taken) -> None:
    files = PathFilter(include=include, exclude=exclude)
    assert {p for p in ("a.jpg", "raw/b.PNG", "raw/x/c.jpg") if files.takes(p)} == taken


def test_what_is_left_out_is_counted_by_ending() -> None:
    left_out = LeftOut()
    assert left_out.sentences() == ()
    for name in ("a.tif", "b.TIF", "c.heic", "d.tif", "README", "labels.csv"):
        left_out.add(name)
    left_out.forget("labels.csv")
    left_out.add_by_pattern()
    left_out.add_link("here/more")
    kinds, patterns, links = left_out.sentences()
    assert kinds == "5 files of other kinds left out: 3 .tif, 1 .heic, 1 without an ending"
    assert patterns == "1 file left out by --include and --exclude"
    assert links.startswith("links to folders are not followed: here/more; name the folders")
    left_out.replace(LeftOut())
    assert left_out.sentences() == ()
