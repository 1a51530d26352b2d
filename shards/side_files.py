"""What lies among images and is none: files of systems and tools, and what is chosen or left out.

Files that a system or a tool made for itself (`Thumbs.db`, `@eaDir`, `__MACOSX`, hidden ones) are
passed over without a word. All others that are left out are counted, and the count is shown.
"""

import collections
import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shards.text import printable

PACKED_ENDINGS: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".bmp", ".dib", ".webp"}
)
"""Endings of images that a shard set holds, in lower case."""

PICTURE_ENDINGS: Final = PACKED_ENDINGS | frozenset(
    (
        *(".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".svg", ".psd", ".exr", ".hdr", ".tga", ".ico"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
    )
)
"""Endings of images of any kind, in lower case: what cannot be read of them is named."""

OTHER_ENDINGS: Final = frozenset(
    (
        *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".xmp"),
        *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".html", ".htm", ".url", ".lnk"),
        *(".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".rtf", ".bib"),
        *(".py", ".ipynb", ".sh", ".bat", ".m", ".mat", ".npy", ".npz", ".pkl", ".h5", ".hdf5"),
        *(".parquet", ".arrow", ".feather", ".db", ".sqlite", ".pt", ".pth", ".safetensors"),
        *(".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".exe", ".dll", ".cls", ".idx"),
        *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp", ".mts"),
        *(".mp3", ".wav", ".flac", ".ogg", ".m4a", ".thm", ".aae", ".pp3", ".dop", ".on1", ".cos"),
    )
)
"""Endings of files that are no images, in lower case."""

_SIDE_FOLDERS = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found"})
_SIDE_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_KINDS_SHOWN = 12


def is_side_folder(name: str) -> bool:
    """Whether a folder is a system's own, by its name: thumbnails, resource forks, bins."""
    return name.startswith(".") or name.lower() in _SIDE_FOLDERS


def is_side_file(name: str) -> bool:
    """Whether a file is a system's own, by its name."""
    return name.startswith(".") or name.lower() in _SIDE_FILES


def is_side_path(path: str) -> bool:
    """Whether a relative path with `/` leads to a system's own file, or through such a folder."""
    *folders, name = path.split("/")
    return is_side_file(name) or any(is_side_folder(f) for f in folders if f not in (".", ".."))


class LeftOut:
    """Counts files that are passed over, by ending, for one sentence at the end."""

    def __init__(self) -> None:
        self._kinds: collections.Counter[str] = collections.Counter()
        self._by_pattern = 0
        self._links: list[str] = []

    def replace(self, other: "LeftOut") -> None:
        """Become another count: the source was listed once more, to its end."""
        self._kinds, self._links = other._kinds, other._links
        self._by_pattern = other._by_pattern

    def add(self, name: str) -> None:
        """Count a file of another kind."""
        self._kinds[os.path.splitext(name)[1].lower() or "without an ending"] += 1

    def forget(self, name: str) -> None:
        """Take back one file: it was used after all."""
        ending = os.path.splitext(name)[1].lower()
        if self._kinds[ending] > 0:
            self._kinds[ending] -= 1
        self._kinds += collections.Counter()

    def add_by_pattern(self) -> None:
        """Count a file that `--include` or `--exclude` left out."""
        self._by_pattern += 1

    def add_link(self, name: str) -> None:
        """Remember a link to a folder, which was not followed."""
        self._links.append(name)

    def sentences(self) -> tuple[str, ...]:
        """What was left out, a sentence a reason; empty if nothing was."""
        found = (self._of_kinds(), self._of_patterns(), self._of_links())
        return tuple(sentence for sentence in found if sentence)

    def _of_kinds(self) -> str:
        count = self._kinds.total()
        if not count:
            return ""
        ordered = sorted(self._kinds.items(), key=lambda kind: (-kind[1], kind[0]))
        named = [f"{times:,} {printable(ending, 30)}" for ending, times in ordered[:_KINDS_SHOWN]]
        more = len(ordered) - _KINDS_SHOWN
        named += [f"{more:,} kinds more"] if more > 0 else []
        return f"{_files(count)} of other kinds left out: {', '.join(named)}"

    def _of_patterns(self) -> str:
        if not self._by_pattern:
            return ""
        return f"{_files(self._by_pattern)} left out by --include and --exclude"

    def _of_links(self) -> str:
        if not self._links:
            return ""
        more = f" and {len(self._links) - 3:,} more" if len(self._links) > 3 else ""
        named = ", ".join(printable(link, 200) for link in self._links[:3])
        return (
            f"links to folders are not followed: {named}{more}; name the folders they lead to, or "
            "copy them here"
        )


@dataclass(frozen=True, kw_only=True)
class PathFilter:
    """Which relative paths are taken, by patterns as in a shell, in any case."""

    include: Sequence[str] = ()
    """Only what fits one of these is taken; empty: everything."""
    exclude: Sequence[str] = ()
    """What fits one of these is left out, included or not."""

    def takes(self, path: str) -> bool:
        """Whether a path is taken.

        A pattern without `/` is compared with the name and, to exclude, with every folder above;
        one with `/` with the whole path, where `*` stands for any characters.
        """
        lower = path.lower().removeprefix("./")
        parts = lower.split("/")
        if any(_fits(pattern, lower, parts) for pattern in self.exclude):
            return False
        return not self.include or any(_fits(p, lower, parts[-1:]) for p in self.include)


def _fits(pattern: str, path: str, parts: Sequence[str]) -> bool:
    pattern = pattern.lower().removeprefix("./").rstrip("/")
    if "/" not in pattern:
        return any(fnmatch.fnmatchcase(part, pattern) for part in parts)
    # `a/**/b` also stands for `a/b`, and a folder's pattern for what lies below.
    shorter = pattern.replace("**/", "")
    return any(fnmatch.fnmatchcase(path, p) for p in (pattern, shorter, f"{pattern}/*"))


def _files(count: int) -> str:
    return f"{count:,} file" + "s" * (count != 1)
