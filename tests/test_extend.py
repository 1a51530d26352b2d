"""The worked examples of docs/extend.md and examples/ run as they stand."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

REPO = Path(__file__).resolve().parents[1]


def example(name: str) -> dict[str, Any]:
    """What a code block of docs/extend.md defines; its first line names it."""
    text = (REPO / "docs" / "extend.md").read_text()
    blocks = re.findall(rf"```python\n# {name}\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1, name
    names: dict[str, Any] = {"__name__": f"extend_{name}"}
    exec(compile(blocks[0], f"docs/extend.md: {name}", "exec"), names)
    return names


def test_a_data_set_of_ones_own_is_built_and_read(tmp_path: Path) -> None:
    from shards.build.build import build
    from shards.read import open_set

    for stars in (1, 3, 5):
        (tmp_path / "photos" / str(stars)).mkdir(parents=True)
        Image.new("RGB", (40, 30), (50 * stars, 0, 0)).save(tmp_path / f"photos/{stars}/a.png")
    dataset = example("reader")["open_stars"](tmp_path / "photos")
    build(dataset, tmp_path / "set", workers=1)
    built = open_set(tmp_path / "set")
    assert built.samples.mos.tolist() == [1.0, 3.0, 5.0]
    assert built.samples.path.tolist() == ["1/a.png", "3/a.png", "5/a.png"]


def test_an_encoder_of_ones_own_gives_tokens_and_a_saliency_map() -> None:
    encoder = example("encoder")["PatchVit"]()
    pixels = torch.randn(2, 3, 64, 64)
    assert encoder.tokens(pixels).shape == (2, 1 + 16, encoder.width)
    attention = encoder.cls_attention(pixels, layers=2)
    assert attention.shape == (2, 4, 4)
    assert (attention >= 0).all()


def test_a_loss_term_of_ones_own_punishes_the_wrong_order_alone() -> None:
    rank_hinge = example("loss")["rank_hinge"]
    mos = torch.tensor([0.1, 0.5, 0.9])
    right, wrong = mos.clone().requires_grad_(), mos.flip(0).clone().requires_grad_()
    assert rank_hinge(right, mos) == 0
    rank_hinge(wrong, mos).backward()
    assert wrong.grad[0] > 0 > wrong.grad[2]
    assert rank_hinge(right, torch.ones(3)) == 0


def test_a_section_of_ones_own_stands_on_the_page(tmp_path: Path) -> None:
    from lmcl.evaluation.predictions import make_predictions
    from lmcl.report.analysis import analyse
    from lmcl.report.page import Header, render_page
    from lmcl.report.run import read_run

    rng = np.random.default_rng(0)
    make_predictions(
        id=np.arange(30), path=[f"{i}.png" for i in range(30)], mos=rng.normal(size=30),
        prediction=rng.normal(size=30),
    ).write_csv(tmp_path / "predictions" / "test.csv")  # fmt: skip
    section = example("section")["spread"](analyse(read_run(tmp_path)))
    page = render_page(Header(kicker="", heading="run"), [section], title="run", footer="")
    assert "<h2>How far predictions spread</h2>" in page
    assert "Scores have a deviation of" in page


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal", REPO / "examples" / "minimal_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_minimal_loop_is_at_most_a_hundred_lines_and_runs(minimal) -> None:
    file = REPO / "examples" / "minimal_loop.py"
    assert len(file.read_text().splitlines()) <= 100
    done = subprocess.run(
        [sys.executable, file], cwd=REPO, env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 3


def test_the_minimal_loss_and_its_gradient_are_those_of_the_training_step(minimal) -> None:
    from lmcl.method.objective import ObjectiveConfig, objective
    from lmcl.models.encoder import EncoderConfig
    from lmcl.models.quality_model import DecoderConfig, QualityModel

    torch.manual_seed(0)
    config = EncoderConfig(name="conv-vit", width=48, depth=1)
    model = QualityModel(
        config, DecoderConfig(heads=3), crop_size=minimal.CROP, view_size=minimal.VIEW
    ).eval()
    crops = torch.randn(5, minimal.RANDOM + 1, 3, minimal.CROP, minimal.CROP)
    mos = torch.rand(5)
    plain = minimal.student_loss(model, crops, mos)
    real = objective(
        model(crops.flatten(0, 1)),
        mos,
        torch.arange(5),
        ObjectiveConfig(contrastive_weight=minimal.A, temperature=minimal.TAU, backend="dense"),
        images=5,
        random=minimal.RANDOM,
        overlap=None,
        keys=None,
        images_by_rank=(5,),
    ).loss
    assert plain.item() == pytest.approx(real.item(), rel=1e-5)
    weights = [value for value in model.parameters() if value.requires_grad]
    pairs = zip(
        torch.autograd.grad(plain, weights), torch.autograd.grad(real, weights), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_minimal_crop_is_the_one_the_product_finds(minimal) -> None:
    from lmcl.models.saliency import best_window, window_to_box

    class Teacher:
        encoder: Any = None

    attention = torch.rand(6, 4, 4)
    teacher = Teacher()
    teacher.encoder = type("E", (), {"cls_attention": lambda self, view, layers: attention})()
    corners = minimal.salient_corners(teacher, torch.zeros(6, 3, 100, 150))
    boxes = window_to_box(
        best_window(attention, minimal.WINDOW).numpy(),
        np.tile([100, 150], (6, 1)),
        grid=4,
        window=minimal.WINDOW,
        size=minimal.CROP,
    )
    assert corners.tolist() == boxes[:, :2].tolist()
