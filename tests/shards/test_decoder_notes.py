import io
import logging
import threading
import warnings

import pytest
from PIL import Image

from shards.decoder_notes import decoder_notes, note_later, route_warnings


def warn(text: str, *, file: str = "/x/PIL/TiffImagePlugin.py") -> None:
    warnings.warn_explicit(text, UserWarning, file, 7, module="PIL.TiffImagePlugin")


def test_a_warning_of_pillow_is_a_note_of_the_image_at_hand(capsys, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    route_warnings()
    with decoder_notes() as one:
        warn("Truncated File Read.")
        warn("Truncated File Read.")
        with decoder_notes() as two:
            warn("Truncated File Read.")
        note_later(lambda: "damaged JPEG")
        note_later(lambda: "")
    warn("nobody listens")
    assert one.all() == ("damaged JPEG", "decoder: Truncated File Read")
    assert two.all() == ("decoder: Truncated File Read",)
    assert capsys.readouterr().err == ""
    assert "nobody listens" in caplog.text


def test_threads_do_not_hear_each_other() -> None:
    route_warnings()
    with decoder_notes() as mine:
        other = threading.Thread(target=warn, args=("of another image",))
        other.start()
        other.join()
    assert mine.all() == ()


def test_warnings_of_others_are_left_alone() -> None:
    route_warnings()
    with pytest.warns(UserWarning, match="of ours"), decoder_notes() as notes:
        warnings.warn("of ours", UserWarning, stacklevel=1)
    assert notes.all() == ()


def test_notes_hold_no_addresses_and_are_few() -> None:
    route_warnings()
    with decoder_notes() as notes:
        for k in range(9):
            warn(f"{k} <_io.BytesIO object at 0x7f12> is odd")
    assert len(notes.all()) == 5
    assert notes.all()[0] == "decoder: 0  is odd"
    assert Image.open(io.BytesIO(_png())).size == (2, 2)


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (2, 2)).save(out, "PNG")
    return out.getvalue()
