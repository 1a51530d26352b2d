"""The loss's benchmark as a picture: bars of time and of peak memory, in plain SVG."""

import math
from collections.abc import Sequence
from html import escape

from lmcl.bench.record import Record

_ROW, _LEFT, _WIDTH, _TOP = 24, 170, 330, 34
_PANEL = _LEFT + _WIDTH + 110
_OURS = ("chunked", "fused", "supcon", "info_nce", "clip")


def chart(records: Sequence[Record]) -> str:
    """Forward and backward together: time on the left, peak memory on the right, log scales."""
    both = [record for record in records if record.params["phase"] == "both"]
    blocks, height = [], 10
    for rows in dict.fromkeys(int(record.params["rows"]) for record in both):
        here = [record for record in both if record.params["rows"] == rows]
        times = [(_time(record), record.case) for record in here]
        peaks = [((record.peak_bytes or 0) / 2**20, record.case) for record in here]
        unit = "processor seconds" if "cpu_s" in here[0].params else "ms"
        title = f"M = {rows}, D = {here[0].params['width']}, {here[0].params['dtype']}"
        blocks.append(_block(f"{title}: {unit}", times, 0, height))
        blocks.append(_block("peak memory above the start, MiB", peaks, _PANEL, height))
        height += _TOP + _ROW * len(here) + 20
    body = "\n".join(blocks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _PANEL}" height="{height}" '
        f'font-family="sans-serif" font-size="13">\n{body}\n</svg>\n'
    )


def _time(record: Record) -> float:
    return float(record.params.get("cpu_s", record.median))


def _block(title: str, values: list[tuple[float, str]], left: int, top: int) -> str:
    ordered = sorted(values)
    least = max(min((value for value, _ in ordered), default=1.0), 1e-3)
    most = max(max((value for value, _ in ordered), default=1.0), 1.001 * least)
    lines = [
        f'<text x="{left + 10}" y="{top + 18}" font-weight="bold">{escape(title)} '
        "(log scale, lower is better)</text>"
    ]
    for index, (value, name) in enumerate(ordered):
        y = top + _TOP + index * _ROW
        colour = "#2b6cb0" if name in _OURS else "#a0aec0"
        share = math.log(max(value, least) / least) / math.log(most / least)
        width = (0.1 + 0.9 * share) * _WIDTH
        x = left + _LEFT
        lines.append(
            f'<text x="{x - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{x}" y="{y}" width="{width:.1f}" height="17" fill="{colour}"/>'
            f'<text x="{x + width + 6:.1f}" y="{y + 13}">{value:.3g}</text>'
        )
    return "\n".join(lines)
