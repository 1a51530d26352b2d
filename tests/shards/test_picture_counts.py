"""Facts of a set's pictures, by the functions and by the commands that show them."""

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image, ImageCms

from shards.cli import cli
from shards.picture_counts import PictureCounts, profile_name, size_sentences


def wide_profile(name: str) -> bytes:
    """A profile of version 4 that is called so: header, one tag, its text in UTF-16."""
    text = name.encode("utf-16-be")
    head = b"mluc" + bytes(4) + (1).to_bytes(4, "big") + (12).to_bytes(4, "big") + b"enUS"
    tag = head + len(text).to_bytes(4, "big") + (28).to_bytes(4, "big") + text
    table = (1).to_bytes(4, "big") + b"desc" + (144).to_bytes(4, "big")
    return bytes(128) + table + len(tag).to_bytes(4, "big") + tag


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_profiles_are_called_as_they_call_themselves() -> None:
    assert "sRGB" in profile_name(SRGB)
    assert profile_name(wide_profile("Display P3")) == "Display P3"
    old = bytes(128) + (1).to_bytes(4, "big") + b"desc" + (144).to_bytes(4, "big") + bytes(4)
    old += b"desc" + bytes(4) + (18).to_bytes(4, "big") + b"Adobe RGB (1998)\0"
    assert profile_name(old) == "Adobe RGB (1998)"


@pytest.mark.parametrize("profile", [b"", b"x" * 200, bytes(128) + b"\xff" * 40])
def test_a_profile_that_is_none_has_no_name(profile: bytes) -> None:
    assert profile_name(profile) == "without a name"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_profiles_and_orientations_are_counted(format: str) -> None:
    counts = PictureCounts()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 50))
    for how in (
        {},
        {"icc_profile": SRGB},
        {"icc_profile": wide_profile("Display P3")},
        {"icc_profile": wide_profile("Display P3"), "exif": exif},
    ):
        out = io.BytesIO()
        image.save(out, format, **how)
        counts.add(out.getvalue())
    counts.add(b"no image")
    profiles, turned = counts.sentences()
    assert profiles.startswith("2 have a colour profile other than sRGB (Display P3 2)")
    assert turned == "1 are turned by EXIF (orientation 6: 1)"


def test_tiny_pictures_and_strips_are_counted() -> None:
    tiny, strips = size_sentences([31, 32, 40, 500], [500, 32, 400, 40])
    assert tiny == "1 have a side below 32 pixels"
    assert strips == "2 are more than 8 times as long as wide"


def test_info_and_verify_show_what_should_be_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (90, 60), "red").save(folder / "a.png")
    Image.new("RGB", (90, 60), "red").save(folder / "b.png")
    Image.new("RGB", (9, 6), "red").save(folder / "c.png")
    Image.new("RGB", (300, 33), "red").save(folder / "f.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.new("RGB", (50, 60), "blue")
    image.save(folder / "d.jpg", exif=exif, icc_profile=wide_profile("Display P3"))
    whole = (folder / "d.jpg").read_bytes()
    (folder / "e.jpg").write_bytes(whole[:-2])
    rows = ["a.png,1,x", "b.png,2,x", "c.png,4,y", "d.jpg,3,y", "e.jpg,5,y", "f.png,3,z"]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["path,score,subset", *rows]))
    out = str(tmp_path / "out")
    line = ["build", "table", str(labels), "--images", str(folder), "--output", out]
    built = CliRunner().invoke(cli, [*line, "--workers", "1", "--no-progress"])
    assert built.exit_code == 0, built.output
    assert "note: 1 have a side below 32 pixels" in built.output
    assert "note: 1 are more than 8 times as long as wide" in built.output
    shown = CliRunner().invoke(cli, ["info", out]).output
    for sentence in (
        "subset      x: 2 labelled, 1 .. 2, mean 1.5, standard deviation 0.5",
        "subset      y: 3 labelled, 3 .. 5, mean 4, standard deviation 0.8165",
        "1 have a side below 32 pixels",
        "1 are copies of others, bit for bit",
        "1 were damaged and packed as decoders repair them (see noted.jsonl)",
        "2 have a colour profile other than sRGB (Display P3 2); profiles are not applied",
        "2 are turned by EXIF (orientation 8: 2)",
    ):
        assert sentence in shown
    checked = CliRunner().invoke(cli, ["verify", out, "--deep", "--no-progress"])
    assert checked.exit_code == 0, checked.output
    assert "look at: 1 have a side below 32 pixels" in checked.output
    assert "look at: 1 are more than 8 times as long as wide" in checked.output
    assert "look at: 2 are turned by EXIF (orientation 8: 2)" in checked.output
    assert "look at: 2 have a colour profile other than sRGB" in checked.output
