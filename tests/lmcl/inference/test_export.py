import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lmcl.cli.export import command
from lmcl.errors import LmclError
from lmcl.evaluation.evaluate_run import Asked, evaluate_run
from lmcl.inference.export import NO_IMAGES, TOLERANCE, Compared, export
from lmcl.inference.scorer import Scorer, open_scorer
from lmcl.models.encoder import EncoderConfig
from lmcl.models.pretrained import ModelCard, build_model, save_model
from lmcl.models.quality_model import DecoderConfig
from lmcl.models.saliency import SaliencyConfig
from lmcl.training.setup import fit
from pipeline.boxes import CropConfig
from shards import ScoreScale
from shards.read import open_set
from shards.splits.split import load_split
from tests import warm

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
ENCODERS = {
    "conv-vit": EncoderConfig(name="conv-vit", width=48, depth=1, heads=3, patch=16),
    "timm": EncoderConfig(name="deit3_small_patch16_224", width=48, depth=1, heads=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(ENCODERS["conv-vit"], tmp_path_factory.mktemp("run"))


def make_folder(encoder: EncoderConfig, run: Path) -> Path:
    torch.manual_seed(0)
    side = 32
    card = ModelCard(
        encoder=encoder,
        decoder=DecoderConfig(queries=3, heads=3),
        crops=CropConfig(size=side, random=3, evaluation=4),
        saliency=SaliencyConfig(view=side, layers=1, window=1),
        score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        training_set="demo",
        split="s",
        split_hash="ab" * 16,
        decode="torch-pillow",
    )
    save_model(run / "model", build_model(card), card)
    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{i}.png")
    return place


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_an_exported_model_scores_as_the_model_does_at_every_batch(
    images, tmp_path, encoder, name
) -> None:
    folder = make_folder(ENCODERS[encoder], tmp_path)
    found = CliRunner().invoke(
        command, [str(folder), "--format", name, "--images", str(images)], catch_exceptions=False
    )
    assert found.exit_code == 0, found.output
    report = json.loads((folder / "export" / f"model.{name}.parity.json").read_text())
    assert report["images"] == 4
    assert report["crops"] == 1 + 2 + 7 + 4 * 4
    assert report["max_score_difference"] <= TOLERANCE
    assert (folder / "export" / f"model.{name}").stat().st_size > 10_000
    assert not list((folder / "export").glob(".*"))


def test_the_plain_format_is_a_copy_that_scores_the_same(folder, images, tmp_path) -> None:
    scorer = open_scorer(folder, device="cpu")
    export(scorer, folder / "model", tmp_path / "out", format="safetensors", compared=NO_IMAGES)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    files = sorted(images.iterdir())
    assert open_scorer(tmp_path / "out", device="cpu").score(files) == scorer.score(files)


def test_a_file_that_differs_is_not_kept(folder, tmp_path, monkeypatch) -> None:
    scorer = open_scorer(folder, device="cpu")
    other = Scorer(_shifted(scorer), device="cpu")
    export(scorer, folder, tmp_path / "good.pt2", format="pt2", compared=NO_IMAGES)
    from lmcl.inference import export as module

    _, open_pt2 = module._FORMATS["pt2"]
    wrong = (lambda _scorer, file: file.write_bytes((tmp_path / "good.pt2").read_bytes()), open_pt2)
    monkeypatch.setitem(module._FORMATS, "pt2", wrong)
    with pytest.raises(LmclError, match="differs from PyTorch") as caught:
        export(other, folder, tmp_path / "bad.pt2", format="pt2", compared=NO_IMAGES)
    assert caught.value.exit_code == 3
    assert {p.name for p in tmp_path.iterdir()} == {
        "good.pt2",
        "good.pt2.parity.json",
        "good.pt2.md",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    fit(tiny("train.epochs=1"), folder, progress=False)
    return folder


@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_scores_are_compared_on_the_test_part_of_the_run(run, demo_set, name) -> None:
    found = CliRunner().invoke(command, [str(run), "--format", name], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    report = json.loads((run / "export" / f"model.{name}.parity.json").read_text())
    test = load_split(open_set(demo_set), "70-10-20-seed123-00").test
    named = "the test part of demo, split 70-10-20-seed123-00"
    assert (report["images"], report["images_of"]) == (len(test), named)
    assert 0.0 <= report["max_score_difference"] <= TOLERANCE
    card = (run / "export" / f"model.{name}.md").read_text()
    gap = f"{report['max_score_difference']:.1e}"
    assert card.startswith((run / "model" / "README.md").read_text().rstrip())
    assert f"scores of {len(test)} images ({named}) differ by at most {gap}" in card
    assert f"{named}: differ by at most {gap}" in found.output


@needs_onnx
def test_the_exporter_keeps_its_rewritten_nodes_to_itself(run) -> None:
    asked = [sys.executable, "-m", "lmcl", "export", run, "--format", "onnx", "--most", "1"]
    done = warm.run(asked, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "comparing" not in line] == []


def test_a_large_test_part_can_be_thinned_out_and_that_is_said(run) -> None:
    asked = [str(run), "--format", "pt2", "--most", "3"]
    assert CliRunner().invoke(command, asked, catch_exceptions=False).exit_code == 0
    report = json.loads((run / "export" / "model.pt2.parity.json").read_text())
    assert report["images"] == 3
    assert "(every so many of " in report["images_of"]


def test_without_the_set_the_export_says_that_no_score_was_compared(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.toml").read_text()
    root = next(line for line in config.splitlines() if line.startswith("root = "))
    (copy / "config.toml").write_text(config.replace(root, 'root = "nowhere/at-all"'))
    found = CliRunner().invoke(command, [str(copy), "--format", "pt2"], catch_exceptions=False)
    assert found.exit_code == 0
    assert "the run's set is not here" in found.output
    assert "--images FOLDER" in found.output
    report = json.loads((copy / "export" / "model.pt2.parity.json").read_text())
    assert (report["images"], report["max_score_difference"]) == (0, None)
    assert "nowhere/at-all" in report["images_of"]


def test_a_run_knows_its_set_wherever_the_command_stands(
    run, demo_set, tmp_path, monkeypatch
) -> None:
    """A relative `data.root`, as a run in `project/runs/x` has it, from another folder."""
    project, other = tmp_path / "project", tmp_path / "other"
    other.mkdir()
    shutil.copytree(run, project / "runs" / "x")
    shutil.copytree(demo_set, project / "data" / "demo")
    file = project / "runs" / "x" / "config.toml"
    lines = file.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("root = "))
    file.write_text("\n".join([*lines[:place], 'root = "data/demo"', *lines[place + 1 :]]))
    monkeypatch.chdir(other)
    asked = [str(project / "runs" / "x"), "--format", "pt2", "--most", "1"]
    found = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert "scores of 1 images, the test part of demo" in found.output
    done = evaluate_run(project / "runs" / "x", Asked(part="val"), batch_size=8, progress=False)
    assert done.evaluation.n > 0


def test_what_cannot_be_compared_is_named(folder, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "gone.csv").write_text("path\nwas-here.png\n")
    (tmp_path / "latin.csv").write_bytes(b"path\ncaf\xe9.png\n")
    (tmp_path / "other.csv").write_text("colour\nred\n")
    for images, words in (
        ("notes.txt", "the table cannot be read"),
        ("none", "no such file"),
        ("gone.csv", "there is no such file"),
        ("latin.csv", "text is not UTF-8"),
        ("other.csv", "no column 'path'"),
    ):
        asked = [str(folder), "--format", "pt2", "--images", str(tmp_path / images)]
        found = CliRunner().invoke(command, asked)
        assert words in str(found.exception)
        assert (tmp_path / images).name in str(found.exception)


@pytest.mark.parametrize("where", ["scores", "not-a-number"])
def test_a_difference_that_only_real_images_show_is_found(
    folder, images, tmp_path, monkeypatch, where
) -> None:
    from lmcl.inference import export as module

    write, open_pt2 = module._FORMATS["pt2"]

    def open_wrong(file: Path):
        run, name = open_pt2(file)

        def wrong(crops: torch.Tensor) -> np.ndarray:
            quality = run(crops)
            if where == "not-a-number":
                return np.where(np.arange(len(quality)) == 3, np.nan, quality)
            # Four crops come from an image; random ones in batches of 1, 2 and 7.
            return quality + (2e-4 if len(quality) == 4 else 0.0)

        return wrong, name

    monkeypatch.setitem(module._FORMATS, "pt2", (write, open_wrong))
    files = [(p.name, p.read_bytes()) for p in sorted(images.iterdir())]
    compared = Compared(images=files, count=len(files), name="some")
    with pytest.raises(LmclError, match=r"differs from PyTorch by (2.00e-04|nan)"):
        export(
            open_scorer(folder, device="cpu"),
            folder,
            tmp_path / "bad.pt2",
            format="pt2",
            compared=compared,
        )
    assert not list(tmp_path.iterdir())


def _shifted(scorer: Scorer):
    import copy

    from lmcl.models.pretrained import ReleasedModel

    model = copy.deepcopy(scorer.model)
    with torch.no_grad():
        model.panel.head.weight.mul_(1.5).add_(0.1)
    return ReleasedModel(model=model, card=scorer.card)


@pytest.mark.parametrize("format", ["pt2", "onnx", "safetensors"])
def test_what_no_export_wrote_is_not_replaced(folder, tmp_path, format) -> None:
    scorer, output = open_scorer(folder, device="cpu"), tmp_path / "labels.csv"
    output.write_text("precious")
    with pytest.raises(LmclError, match="exists; choose another --output") as caught:
        export(scorer, folder, output, format=format, compared=NO_IMAGES)
    assert caught.value.exit_code == 2
    assert output.read_text() == "precious"
