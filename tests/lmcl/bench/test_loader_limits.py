"""The limit of a case is the largest of the stages measured, never one that cannot be."""

import pytest

from lmcl.bench.loader_limits import StageCosts, nearest_limit

JPEG = StageCosts(codec="jpg", read=0.02, entropy=1.2, decode=2.3, cut=0.1)
PNG = StageCosts(codec="png", read=0.02, entropy=2.0, decode=3.5, cut=0.1)
BMP = StageCosts(codec="bmp", read=0.03, entropy=0.2, decode=0.9, cut=0.1)


@pytest.mark.parametrize(
    ("total", "costs", "decodes", "limit"),
    [
        (2.4, JPEG, 1, "50% Huffman decoding of the rows needed"),
        (24.0, JPEG, 10, "50% Huffman decoding of the rows needed"),
        (10.0, JPEG, 1, "76% what is neither decoding nor cutting"),
        (4.0, PNG, 1, "50% inflating the file"),
        (0.4, BMP, 1, "50% turning the rows needed from blue, green, red to red, green, blue"),
        (1.4, BMP, 1, "50% decoding"),
    ],
    ids=["jpg", "a-decode-per-crop", "transforms", "png", "bmp-cut", "bmp-decoded"],
)
def test_the_largest_part_is_named(
    total: float, costs: StageCosts, decodes: int, limit: str
) -> None:
    assert nearest_limit(total, costs, decodes=decodes) == limit
