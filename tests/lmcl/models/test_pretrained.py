"""The model folder: readable by those who may read, replaced as a whole, believed in nothing."""

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmcl.errors import LmclError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.pretrained import ModelCard, build_model, load_model, save_model
from lmcl.models.quality_model import DecoderConfig, QualityModel
from lmcl.models.saliency import SaliencyConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale

CARD = ModelCard(
    encoder=EncoderConfig(name="conv-vit", width=48, depth=2, heads=3, patch=16),
    decoder=DecoderConfig(queries=3, heads=3),
    crops=CropConfig(size=64, random=3, evaluation=5),
    saliency=SaliencyConfig(view=64, layers=2, window=2),
    score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
    training_set="demo",
    split="s-00",
    split_hash="ab" * 16,
    decode="torch-pillow",
)


def _model(seed: int) -> QualityModel:
    torch.manual_seed(seed)
    return build_model(CARD)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_model_has_the_mode_the_umask_allows(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        save_model(tmp_path / "model", _model(0), CARD)
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(("README.md", "config.json", "model.safetensors"), 0o666 & ~umask)


def test_a_model_saved_over_another_replaces_it_and_leaves_what_others_put_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    save_model(folder, _model(0), CARD)
    (folder / "notes.txt").write_text("mine")
    newer = _model(1)
    save_model(folder, newer, CARD)
    saved = load_model(folder).model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in newer.state_dict().items())
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


Change = Callable[[Path], object]


def card_with(table: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        card = json.loads((folder / "config.json").read_text())
        (card[table] if table else card).update(values)
        (folder / "config.json").write_text(json.dumps(card))

    return change


def text(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def sparse(name: str) -> Change:
    return lambda folder: os.truncate(folder / name, 1 << 40)


NAMES = (
    "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k",
    "hf_hub:someone/model",
    "local-dir:/tmp/model",
    "https://example.org/vit_tiny_patch16_224",
    "timm/vit_tiny_patch16_224.augreg_in21k",
    "../../vit_tiny_patch16_224",
    "vit_tiny_patch16_224/../../x",
    "*" * 60 + "a",
    "x\x1b[2J\nerror: forged",
    "a" * 100_000,
    "",
    "resnet18",
)
HOSTILE: dict[str, Change] = {
    **{f"name-{i}": card_with("encoder", name=name) for i, name in enumerate(NAMES)},
    "width": card_with("encoder", width=10**9),
    "depth": card_with("encoder", depth=10**9),
    "negative": card_with("encoder", width=-48),
    "no-int": card_with("encoder", width=48.5),
    "huge-int": card_with("encoder", width=10**400),
    "patch": card_with("encoder", patch=10**6),
    "queries": card_with("decoder", queries=10**8),
    "zero-heads": card_with("decoder", heads=0),
    "crop": card_with("crops", size=10**6),
    "crops": card_with("crops", size=4096, evaluation=10_000),
    "view": card_with("saliency", view=10**6),
    "another-shape": card_with("encoder", width=96),
    "another-depth": card_with("encoder", depth=3),
    "std": card_with("", std=[0.0, 1.0, 1.0]),
    "mean": text("config.json", b'{"mean": [1e999, 0, 0]}'),
    "range": card_with("score", low=5.0, high=1.0),
    "kind": card_with("score", kind="stars"),
    "long-text": card_with("", training_set="x" * 10_000),
    "version": card_with("", format_version=10**30),
    "null": text("config.json", b"null"),
    "nested": text("config.json", b"[" * 100_000),
    "not-utf8": text("config.json", b"\xff\xfe{}"),
    "card-fifo": fifo("config.json"),
    "card-sparse": sparse("config.json"),
    "empty-weights": text("model.safetensors", b""),
    "header": text("model.safetensors", b"\xff" * 8 + b"{}"),
    "weights-fifo": fifo("model.safetensors"),
    "weights-sparse": sparse("model.safetensors"),
    "weights-text": text("model.safetensors", b"not weights" * 100),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_folder_is_one_sentence_without_network_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import resource

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    save_model(tmp_path / "model", _model(0), CARD)
    HOSTILE[case](tmp_path / "model")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LmclError) as caught:
        load_model(tmp_path / "model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    said = str(caught.value)
    assert caught.value.exit_code in (4, 5)
    assert len(said.encode()) <= 2048
    assert said.isprintable()


def test_a_model_folder_never_names_weights_of_this_machine(tmp_path: Path) -> None:
    save_model(tmp_path / "model", _model(0), CARD)
    card_with("encoder", weights="/etc/passwd")(tmp_path / "model")
    assert load_model(tmp_path / "model").card.encoder.weights == ""
