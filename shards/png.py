"""A PNG's chunks: whether those that make the picture are whole, and a file without the others.

Pixels decide whether a PNG is accepted. `strip_metadata` takes out what only describes it
(profiles, texts, damaged EXIF), which Pillow would refuse the picture for: two megabytes of text, a
wrong checksum. What says how the picture is turned stays.

`find_png_damage` goes by the rule of the stricter of the two decoders: libpng, which DALI decodes
with, refuses a critical chunk that is unknown or whose checksum does not fit, and a file that ends
before its last chunk. Pillow decodes them without a word, so they are looked for here.
"""

import zlib

from PIL import Image

from shards.decoder_notes import decoder_notes

_SIGNATURE_BYTES = 8
_HEADER_BEGINS = b"\0\0\0\x0dIHDR"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOVING = frozenset({b"acTL", b"fcTL", b"fdAT"})
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
# Keywords of texts that may say how the picture is turned.
_TURNING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MOST_TEXT = 1 << 18
_ORIENTATION = 0x0112
_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})


def find_png_damage(data: bytes | memoryview, *, checksums: bool = True) -> str:
    """What is wrong with the chunks of a PNG; empty if nothing is.

    Chunks that a decoder may do without, and whatever follows the end, are not looked at. Without
    `checksums` the others are only stepped over.
    """
    view, at = memoryview(data), _SIGNATURE_BYTES
    if bytes(view[at : at + 8]) != _HEADER_BEGINS:
        return "the PNG does not begin with an IHDR chunk"
    while at + 12 <= len(data):
        size, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end = at + 12 + size
        if end > len(data):
            break
        if kind == b"IEND":
            return ""
        name = f"{kind.decode('latin-1')} chunk at byte {at}"
        # A capital first letter: no decoder may leave the chunk out.
        if kind[:1].isupper():
            if kind not in _CRITICAL:
                return f"the {name} is of an unknown kind"
            if kind == b"IHDR" and at != _SIGNATURE_BYTES:
                return f"the {name} is a second header"
            written = int.from_bytes(view[end - 4 : end], "big")
            if checksums and zlib.crc32(view[at + 4 : end - 4]) != written:
                return f"the checksum of the {name} does not fit"
        at = end
    return f"the PNG ends in or before the chunk at byte {at}, without its IEND chunk"


def strip_metadata(data: bytes) -> bytes:
    """The PNG without chunks that only describe its pixels, which a decoder could stumble over.

    What stays is what makes the picture, what says that it moves, and what says how it is turned,
    if it can be read. What has nothing else, and what is no PNG, comes back as it is.
    """
    if not data.startswith(_SIGNATURE):
        return data
    view, at, begin = memoryview(data), _SIGNATURE_BYTES, 0
    kept: list[memoryview] = []
    while at + 12 <= len(data):
        size, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end = at + 12 + size
        if end > len(data) or kind == b"IEND":
            break
        # A small first letter: a decoder may leave the chunk out.
        if not kind[:1].isupper() and not _is_needed(kind, view[at:end]):
            kept.append(view[begin:at])
            begin = end
        at = end
    return b"".join([*kept, view[begin:]]) if kept else data


def _is_needed(kind: bytes, chunk: memoryview) -> bool:
    body = chunk[8:-4]
    if kind in _TEXTS:
        needed = _may_turn(kind, body)
    elif kind == b"eXIf":
        needed = _is_exif(bytes(body[:_MOST_TEXT]))
    else:
        needed = kind in _MOVING
    return needed and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _may_turn(kind: bytes, body: memoryview) -> bool:
    """Whether a text is one that says how the picture is turned, and small when unpacked."""
    head = bytes(body[:64])
    keyword = next((word for word in _TURNING if head.startswith(word)), None)
    if keyword is None or len(body) > _MOST_TEXT:
        return False
    if kind == b"tEXt" or (kind == b"iTXt" and body[len(keyword)] == 0):
        return True
    packed = bytes(body[len(keyword) + 1 :])
    if kind == b"iTXt":
        packed = packed[1:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        unpacking = zlib.decompressobj()
        unpacking.decompress(packed, _MOST_TEXT)
    except zlib.error:
        return False
    return unpacking.eof


def _is_exif(body: bytes) -> bool:
    with decoder_notes() as heard:
        try:
            exif = Image.Exif()
            exif.load(b"Exif\0\0" + body)
            exif.get(_ORIENTATION)
        except Exception:
            # Whatever its parser stumbles over, the picture does not depend on it.
            return False
    return not heard.all()
