"""Whether a PNG's chunks are whole, by the rule of the stricter of the two decoders.

libpng, which DALI decodes with, refuses a critical chunk that is unknown or whose checksum does not
fit, and a file that ends before its last chunk. Pillow decodes them without a word, so they are
looked for here.
"""

import zlib

_SIGNATURE_BYTES = 8
_HEADER_BEGINS = b"\0\0\0\x0dIHDR"
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
