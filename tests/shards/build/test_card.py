"""The dataset card: what it says, whose it is, and that no hash of a set depends on it."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from shards.build.build import build
from shards.build.card import make_card
from shards.build.reshard import reshard
from shards.build.update import update_set
from shards.cli import cli
from shards.manifest import CARD, MANIFEST
from shards.read import ShardSet, open_set
from shards.sample import Facts
from shards.sample_table import DESCRIBED, described_row
from shards.verify import verify


def test_a_set_comes_with_a_card_that_names_its_tars_and_their_members(packed: ShardSet) -> None:
    card = (Path(packed.root) / CARD).read_text()
    header = card.split("---\n")[1]
    assert 'path: "mine-*.tar"' in header
    for codec in ("jpg", "png", "bmp"):
        assert f"  - name: {codec}\n    dtype: image\n" in header
    assert f"{packed.manifest.num_samples} images in 3 tars" in card


def test_the_header_has_the_fields_of_a_samples_json(packed: ShardSet) -> None:
    described = described_row("mine", packed.samples.row(0))
    assert list(described) == DESCRIBED.names


def test_facts_are_lines_of_visible_characters(packed: ShardSet) -> None:
    facts = Facts(title='a "b"\n---\nx: y', licence="l\nm", citation="c", page="p")
    card = make_card(dataclasses.replace(packed.manifest, facts=facts), ["png"]).decode()
    assert card.split("\n---\n")[0].endswith("  - name: __url__\n    dtype: string")
    assert "\nx: y" not in card
    assert "Licence: l" in card


@pytest.mark.parametrize("change", ["none", "gone", "own", "edited"])
def test_no_hash_depends_on_it_and_what_a_person_wrote_stays(
    packed: ShardSet, tmp_path: Path, change: str
) -> None:
    root = Path(packed.root)
    first, manifest = (root / CARD).read_bytes(), (root / MANIFEST).read_bytes()
    own = {"own": b"# mine\n", "edited": first.replace(b"images in", b"pictures in")}.get(change)
    if change == "gone":
        (root / CARD).unlink()
    elif own is not None:
        (root / CARD).write_bytes(own)
    assert verify(root, deep=True).ok
    assert CliRunner().invoke(cli, ["verify", str(root)]).exit_code == 0
    withdrawn = str(packed.samples.path[0])
    update_set(root, withdraw=[withdrawn])
    after = (root / CARD).read_bytes()
    if own is not None:
        assert after == own
    else:
        assert b"This set was updated" in after
        assert b"and 1 images that were withdrawn:" in after
    assert open_set(f"{root}@v1").manifest.samples_sha256 in manifest.decode()


def test_another_packing_gets_a_card_of_its_own(packed: ShardSet, table, tmp_path: Path) -> None:
    reshard([packed], tmp_path / "again", name="other")
    assert 'path: "other-*.tar"' in (tmp_path / "again" / CARD).read_text()
    build(table(name="more"), tmp_path / "more", workers=1)
    reshard([packed, open_set(tmp_path / "more")], tmp_path / "both", name="both")
    card = (tmp_path / "both" / CARD).read_text()
    assert 'path: "both-*.tar"' in card
    assert "24 images" in card


def test_the_same_set_has_the_same_card(table, tmp_path: Path) -> None:
    dataset = table()
    cards = []
    for workers in (1, 2):
        build(dataset, tmp_path / f"{workers}", workers=workers)
        cards.append((tmp_path / f"{workers}" / CARD).read_bytes())
    assert cards[0] == cards[1]
