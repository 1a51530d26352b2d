"""Which column of a table plays which part, however others call it.

`find_column(names, ROLE, given, where=...)`. A name that several columns could have is refused:
which one is meant, only the user knows (`--score-column`).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shards.datasets.values import column_key
from shards.errors import ShardError
from shards.text import printable

_NONE = "none"
_IMAGE = re.compile(r"\.(jpe?g|png|bmp|webp|tiff?|gif|heic|avif)\Z")


@dataclass(frozen=True, kw_only=True)
class Role:
    """A part that a column plays."""

    name: str
    """Its own name; the option is `--<name>-column`."""
    keys: frozenset[str]
    """`column_key` of the names it goes by."""
    is_needed: bool = False
    """Whether a table without it is none."""


def _keys(*names: str) -> frozenset[str]:
    return frozenset(map(column_key, names))


PATH = Role(
    name="path",
    is_needed=True,
    keys=_keys(
        "path", "file", "filename", "file_path", "full path", "relative path", "rel path",
        "image", "image_name", "image_path", "image_file", "image_filename", "image file path",
        "img", "img_name", "img_path", "img_file", "img_filename", "imgs", "images",
        "picture", "picture_name", "photo", "photo_name", "photo_path", "name", "stimulus",
        "stimulus_name", "stimulus_path", "dis_img_path", "distorted_image", "dist_img",
    ),
)  # fmt: skip
SCORE = Role(
    name="score",
    is_needed=True,
    keys=_keys(
        "score", "mos", "dmos", "mos_score", "dmos_score", "score_mos", "score_dmos",
        "mos_value", "mos_mean", "mean_mos", "mean_score", "score_mean", "average_score",
        "avg_score", "mean_opinion", "mean_opinion_score", "difference_mean_opinion_score",
        "differential_mean_opinion_score", "quality_score", "subjective_score", "opinion_score",
    ),
)  # fmt: skip
STD = Role(
    name="std",
    keys=_keys(
        "std", "mos_std", "std_mos", "dmos_std", "std_dmos", "sd", "mos_sd", "sd_mos", "score_sd",
        "score_std", "std_score", "std_dev", "stdev", "standard_deviation", "mos_std_dev",
        "mos_stdev", "sigma",
    ),
)  # fmt: skip
GROUP = Role(
    name="group",
    keys=_keys(
        "group", "group_id", "group_name", "reference", "reference_image", "reference_name",
        "ref", "ref_img", "ref_image", "ref_name", "ref_img_path",
    ),
)  # fmt: skip
SPLIT = Role(
    name="split", keys=_keys("split", "part", "set", "partition", "official_split", "split_name")
)
DISTORTION = Role(name="distortion", keys=_keys("distortion"))
LEVEL = Role(name="level", keys=_keys("level"))
SUBSET = Role(name="subset", keys=_keys("subset"))
ROLES = (PATH, SCORE, STD, GROUP, SPLIT, DISTORTION, LEVEL, SUBSET)
KNOWN_KEYS = frozenset().union(*(role.keys for role in ROLES))


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """Columns as the user names them; None is found by its usual names."""

    path: str | None = None
    score: str | None = None
    std: str | None = None
    group: str | None = None
    split: str | None = None

    def given(self, role: Role) -> str | None:
        """What is said about one role."""
        return getattr(self, role.name, None)

    def wanted(self) -> frozenset[str]:
        """Keys of which a header has one."""
        return PATH.keys if self.path is None else frozenset({column_key(self.path)})


def find_column(
    names: Sequence[str], role: Role, given: str | None = None, *, where: str
) -> str | None:
    """The column that plays a part; None where there is none and none is needed.

    Args:
        names: All columns, in lower case.
        role: The part.
        given: The user's word; `none` for no column.
        where: The table, for messages.

    Raises:
        ShardError: If several could be meant, or a column that is needed or named is not there.
    """
    option = f"`--{role.name}-column`"
    if given is not None:
        return _named(names, role, given, option, where)
    found = [name for name in names if column_key(name) in role.keys]
    if len(found) > 1:
        raise ShardError(
            f"{printable(where)}: the columns {' and '.join(map(repr, found))} could all be the "
            f"{role.name}; say which with `--{role.name}-column {_quoted(found[0])}`",
            exit_code=3,
        )
    if not found and role.is_needed:
        image = next((name for name in names if _IMAGE.search(name)), None)
        if image is not None:
            raise ShardError(
                f"{printable(where)}: the first line holds the image {printable(image, 80)!r}, not "
                "the columns' names; put a header line such as `path,score` in front",
                exit_code=3,
            )
        raise ShardError(
            f"{printable(where)}: no column {role.name!r} among {_listed(names)}; name it in the "
            f"first line, or say which it is with `--{role.name}-column NAME`",
            exit_code=3,
        )
    return found[0] if found else None


def _named(names: Sequence[str], role: Role, given: str, option: str, where: str) -> str | None:
    if given.lower() == _NONE and not role.is_needed and _NONE not in names:
        return None
    exact = given.strip().lower()
    found = [name for name in names if name == exact]
    found = found or [name for name in names if column_key(name) == column_key(given)]
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(exact, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ShardError(
        f"{printable(where)}: {option} {printable(given, 60)}: no such column among "
        f"{_listed(names)}{hint}",
        exit_code=2,
    )


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(name for name in names if name), 400) or "no columns"


def _quoted(name: str) -> str:
    return f'"{name}"' if " " in name else name
