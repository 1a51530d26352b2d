"""The loader's benchmark as a picture: bars of processor time per image, in plain SVG."""

from collections.abc import Sequence
from html import escape

from lmcl.bench.record import Record

_ROW, _LEFT, _WIDTH, _TOP = 24, 210, 420, 34


def chart(records: Sequence[Record]) -> str:
    """Bars for every case of every kind of image, shortest first; ours in another colour."""
    kinds = list(dict.fromkeys(str(record.params["codec"]) for record in records))
    blocks, height = [], 10
    for kind in kinds:
        cases = sorted(
            (
                (record.cpu_ms_per_image, record.case)
                for record in records
                if record.params["codec"] == kind
                and record.unit == "images/s"
                and record.cpu_ms_per_image is not None
            ),
        )
        blocks.append(_block(kind, cases, height))
        height += _TOP + _ROW * len(cases) + 20
    body = "\n".join(blocks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{height}" '
        f'font-family="sans-serif" font-size="13">\n{body}\n</svg>\n'
    )


def _block(kind: str, cases: list[tuple[float, str]], top: int) -> str:
    longest = max((value for value, _ in cases), default=1.0)
    lines = [
        f'<text x="10" y="{top + 18}" font-weight="bold">{escape(kind)}: '
        "processor time per image, ms (lower is better)</text>"
    ]
    for index, (value, name) in enumerate(cases):
        y = top + _TOP + index * _ROW
        colour = "#2b6cb0" if name == "dali" else "#a0aec0"
        width = max(value / longest * _WIDTH, 1)
        lines.append(
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="17" fill="{colour}"/>'
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 13}">{value:.2f}</text>'
        )
    return "\n".join(lines)
