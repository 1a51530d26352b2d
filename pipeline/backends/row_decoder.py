"""Decoder of the rows that an image's boxes lie in, one image at a time.

DALI decodes a whole batch before it cuts the first crop; by then no image is in the processor's
cache any more. Here an image is cut right after it was decoded, by the thread that decoded it
(docs/decisions/0309).
"""

import os
import threading
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pipeline.image_headers import is_jpeg_without_exif


class RowDecoder:
    """DALI's CPU decoder (nvImageCodec) without DALI's graph: one per thread."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def decode_rows(
        self, data: UInt8[np.ndarray, " _size"], *, size: tuple[int, int], top: int, bottom: int
    ) -> UInt8[np.ndarray, "rows width 3"] | None:
        """RGB of the rows [top, bottom) of an upright image, by the rule of `decode_rgb`.

        Args:
            data: A file whose header is plain (`pipeline.image_headers.header_size`).
            size: Height and width that the upright image must have.
            top: First row.
            bottom: Row after the last.

        Returns:
            None if the image has another size or cannot be decoded. The array is valid until the
            same thread decodes the next image.
        """
        # Of a JPEG, what lies above is skimmed and what lies below is not read; other files are
        # decoded whole anyway. One that EXIF may turn has to show first what size it has then.
        is_part = is_jpeg_without_exif(data.data)
        try:
            pixels = self._decode(data, size, (top, bottom) if is_part else None)
        except RuntimeError:
            return None
        if pixels is None or pixels.shape != (bottom - top if is_part else size[0], size[1], 3):
            return None
        return pixels if is_part else pixels[top:bottom]

    def _decode(
        self,
        data: UInt8[np.ndarray, " _size"],
        size: tuple[int, int],
        rows: tuple[int, int] | None,
    ) -> UInt8[np.ndarray, "y x 3"] | None:
        # What it would print of a damaged image names none; the loader's own error does.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        from nvidia import nvimgcodec

        stream: Any = nvimgcodec.CodeStream(data)
        if rows is not None:
            # Beyond its edges a smaller image would be continued in black, without a word.
            if (stream.height, stream.width) != size:
                return None
            region = nvimgcodec.Region(rows[0], 0, rows[1], size[1])
            stream = stream.get_sub_code_stream(region=region)
        decoder, params = self._decoder()
        is_deep = stream.dtype == np.uint16
        # The last image's memory is used again, and grows where it is too small.
        image = decoder.decode(stream, image=self._thread.image, params=params[is_deep])
        if image is None:
            return None
        self._thread.image = image
        pixels = np.asarray(image)
        # nvImageCodec would cut the lower byte off; the rule is to round v / 257.
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8) if is_deep else pixels

    def _decoder(self) -> tuple[Any, dict[bool, Any]]:
        from nvidia import nvimgcodec

        if not hasattr(self._thread, "decoder"):
            self._thread.decoder = nvimgcodec.Decoder(
                device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
                # As DALI has it; the CPU's way with chroma is the better one.
                options=":fancy_upsampling=1",
            )
            self._thread.params = {
                is_deep: nvimgcodec.DecodeParams(
                    apply_exif_orientation=True,
                    color_spec=nvimgcodec.ColorSpec.SRGB,
                    allow_any_depth=is_deep,
                    sample_format=nvimgcodec.SampleFormat.I_RGB,
                )
                for is_deep in (False, True)
            }
            self._thread.image = None
        return self._thread.decoder, self._thread.params
