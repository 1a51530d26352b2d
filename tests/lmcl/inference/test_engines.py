"""An exported model scores by onnxruntime alone, and only where it is the model that was meant."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import lmcl
from lmcl.cli.export import command as export_command
from lmcl.cli.main import main
from lmcl.errors import LmclError
from lmcl.inference import engines
from lmcl.inference.engines import open_export
from lmcl.inference.onnx_engine import OnnxEngine
from pipeline.boxes import CropConfig

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

REPO = Path(__file__).resolve().parents[3]
CROPS = CropConfig(size=32, random=3, evaluation=7, max_side=150)
HEAVY = {
    *("torch", "torchvision", "timm", "accelerate", "scipy", "pyarrow", "nvidia", "triton", "ray"),
    *("onnx", "onnxscript", "jinja2", "openpyxl", "webdataset"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_model) -> Path:
    """A run with a model and its export."""
    folder = tmp_path_factory.mktemp("engines") / "run"
    make_model(folder / "model", crops=CROPS)
    exported(folder, "float32")
    return folder


def exported(folder: Path, precision: str) -> None:
    asked = [str(folder), "--format", "onnx", "--precision", precision]
    done = CliRunner().invoke(export_command, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """Photographs that each take another way through the rule of pixels and crops."""
    folder = tmp_path_factory.mktemp("kinds")
    rgb = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(rgb).resize((140, 100), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("L").save(folder / "grey.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200).save(folder / "16.png")
    image.resize((20, 50)).save(folder / "small.png")
    image.resize((301, 202)).save(folder / "large.png")
    return folder


def test_the_file_says_everything_that_scoring_needs(run) -> None:
    card = OnnxEngine(run / "export" / "model.onnx").card
    assert (card.crops.size, card.crops.evaluation, card.max_side) == (32, 7, 150)
    assert (card.score.low, card.score.high, card.higher_is_better) == (0.0, 100.0, True)
    assert (card.crop_layout, card.precision, card.calibration) == ("grid", "float32", None)
    assert card.mean == pytest.approx((0.485, 0.456, 0.406))
    assert card.grid_rule.startswith("count crops of size x size")
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["crops"]["evaluation_layout"] == "grid"
    assert config["crops"]["max_side"] == 150


def test_every_kind_of_photograph_scores_as_in_torch(run, kinds) -> None:
    files = sorted(kinds.iterdir())
    expected = lmcl.load(run, device="cpu").score(files)
    exported = lmcl.load(run / "export" / "model.onnx")
    assert exported.score(files) == pytest.approx(expected, abs=1e-3)
    assert (exported.scale, exported.training_set) == (lmcl.load(run).scale, "demo")


@pytest.mark.slow
def test_eight_bits_score_nearly_the_same(run, kinds) -> None:
    with pytest.raises(LmclError, match="--precision int8` makes one"):
        lmcl.load(run, precision="int8")
    exported(run, "int8")
    int8 = lmcl.load(run, precision="int8")
    files = sorted(kinds.iterdir())
    assert int8.score(files) == pytest.approx(lmcl.load(run, device="cpu").score(files), abs=5)
    assert int8.precision == "int8"


def test_outputs_are_quality_score_and_embedding(run) -> None:
    session = OnnxEngine(run / "export" / "model.onnx").session
    crops = np.zeros((3, 32, 32, 3), np.uint8)
    quality, score, embedding = session.run(["quality", "score", "embedding"], {"crops": crops})
    assert score == pytest.approx(100 * quality, rel=1e-5)
    assert np.linalg.norm(embedding, axis=1) == pytest.approx(np.ones(3), abs=1e-5)


def test_the_program_beside_it_gives_the_same_scores_without_torch_and_lmcl(run, kinds) -> None:
    files = sorted(kinds.iterdir())
    program = run / "export" / "model.py"
    assert len(program.read_text().splitlines()) <= 60
    blocked = ("torch", "lmcl", "pipeline", "shards", "onnx")
    code = (
        "import runpy, sys\n"
        f"sys.modules |= dict.fromkeys({blocked})\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    call = [sys.executable, "-c", code, program, *files]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert found == pytest.approx(lmcl.load(run, device="cpu").score(files), abs=1e-3)


def test_scoring_an_exported_model_imports_neither_torch_nor_the_work_of_training(
    run, kinds, tmp_path
) -> None:
    code = (
        "import sys\n"
        "from lmcl.cli.main import main\n"
        "main(sys.argv[1:])\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    file = run / "export" / "model.onnx"
    asked = ["score", kinds, "--model", file, "--output", tmp_path / "s.csv", "--no-progress"]
    call = [sys.executable, "-c", code, *asked]
    done = subprocess.run(call, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"onnxruntime", "numpy", "PIL"} <= loaded
    assert HEAVY & loaded == set()
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + len(list(kinds.iterdir()))


def test_a_job_is_gone_on_with_by_its_own_engine_only(run, kinds, tmp_path, capsys) -> None:
    output = str(tmp_path / "s.csv")
    asked = ["score", str(kinds), "--model", str(run), "--output", output, "--device", "cpu"]
    main([*asked, "--engine", "onnx", "--no-progress"])
    with pytest.raises(SystemExit) as caught:
        main([*asked, "--engine", "torch", "--resume", "--no-progress"])
    assert caught.value.code == 5
    assert "another engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "changes", "is_exported"),
    [
        ("auto", {}, True),
        ("torch", {}, False),
        ("onnx", {}, True),
        ("auto", {"precision": "bfloat16"}, False),
        ("auto", {"needs_torch": "--boxes"}, False),
        ("auto", {"device": "cuda:0"}, False),
    ],
)
def test_the_engine_follows_what_is_there_and_what_was_asked(
    run, engine, changes, is_exported
) -> None:
    asked = {"device": "cpu", "precision": "float32"} | changes
    assert (open_export(run, engine, **asked) is not None) is is_exported


@pytest.mark.parametrize(("engine", "count", "said"), [
    ("auto", 3, True), ("auto", 2, False), ("torch", 3, False),
])  # fmt: skip
def test_many_images_by_torch_on_a_processor_are_told_of_the_faster_way(
    make_model, kinds, tmp_path, monkeypatch, capsys, engine, count, said
) -> None:
    model = tmp_path / "model"
    make_model(model, crops=CROPS)
    monkeypatch.setattr("lmcl.cli.run.score._MANY", 3)
    photos = [str(path) for path in sorted(kinds.iterdir())[:count]]
    output = ["--output", str(tmp_path / "s.csv"), "--device", "cpu", "--no-progress"]
    with contextlib.suppress(SystemExit):
        main(["score", *photos, "--model", str(model), "--engine", engine, *output])
    told = capsys.readouterr()
    assert "0 failed" in told.out
    assert (f"`lmcl export {model} --format onnx`" in told.err) == said


def test_a_gpu_is_torchs(run, monkeypatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    assert open_export(run, "auto", device="auto", precision="float32") is None
    file = run / "export" / "model.onnx"
    assert open_export(file, "auto", device="auto", precision="float32") is not None


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("torch", {}, "--engine torch needs PyTorch"),
        ("auto", {"device": "cuda"}, "--device cuda needs PyTorch"),
        ("onnx", {"precision": "bfloat16"}, "--precision bfloat16 needs PyTorch"),
        ("auto", {"needs_torch": "--boxes"}, "--boxes needs PyTorch"),
    ],
)
def test_what_does_not_go_together_is_refused(run, engine, changes, message) -> None:
    asked = {"device": "cpu", "precision": "float32"} | changes
    with pytest.raises(LmclError, match=message) as caught:
        open_export(run / "export" / "model.onnx", engine, **asked)
    assert caught.value.exit_code == 2


def test_an_export_of_other_weights_is_not_taken(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = copy / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert open_export(copy, "auto", device="cpu", precision="float32") is None
    with pytest.raises(LmclError, match=r"lmcl export .* --format onnx` makes one") as caught:
        open_export(copy, "onnx", device="cpu", precision="float32")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["garbage", "empty", "missing", "no-metadata", "later"])
def test_a_file_that_is_no_export_is_a_sentence(run, tmp_path, kind) -> None:
    import onnx

    file = tmp_path / "m.onnx"
    if kind in ("no-metadata", "later"):
        model = onnx.load(run / "export" / "model.onnx")
        if kind == "no-metadata":
            del model.metadata_props[:]
        for entry in model.metadata_props:
            entry.value = "99" if entry.key == "lmcl_format" else entry.value
        onnx.save(model, file)
    elif kind != "missing":
        file.write_bytes(b"" if kind == "empty" else os.urandom(1000))
    with pytest.raises(LmclError, match=r"m\.onnx") as caught:
        lmcl.load(file)
    assert caught.value.exit_code == (4 if kind == "missing" else 5)


@pytest.mark.parametrize("what", ["details", "quality"])
def test_what_an_exported_model_has_not_is_said(run, kinds, what) -> None:
    import torch

    model = lmcl.load(run / "export" / "model.onnx")
    image = torch.zeros(3, 64, 64) if what == "quality" else kinds / "grey.png"
    with pytest.raises(LmclError, match="an exported model has no"):
        getattr(model, what)(image)


def test_an_exported_model_scores_in_a_forked_process(run, kinds) -> None:
    code = (
        "import os, sys, lmcl\n"
        "model = lmcl.load(sys.argv[1])\n"
        "print(model.score(sys.argv[2]), flush=True)\n"
        "if not os.fork():\n"
        "    print(model.score(sys.argv[2]), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()"
    )
    call = [sys.executable, "-c", code, run / "export" / "model.onnx", kinds / "grey.png"]
    done = subprocess.run(call, cwd=REPO, capture_output=True, text=True, timeout=120)
    first, second = done.stdout.split()
    assert first == second
