"""What scores mean, by the main command: percentile, interval, unusual, rules, adaptive crops."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

import lmcl
from lmcl.cli.score import command
from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import AdaptiveRule, FirstCrop
from lmcl.evaluation.calibration import (
    Calibration,
    Distances,
    read_meaning,
    write_calibration,
)
from lmcl.evaluation.conformal import Conformal
from lmcl.evaluation.threshold import ThresholdRule, judge, write_rule
from lmcl.inference.calibration import Reading
from lmcl.inference.scorer import open_scorer
from lmcl.inference.scores_file import note_path, read_rows

RESIDUALS = tuple(np.linspace(0.1, 2.0, 99).tolist())
MEANING = ("percentile", "lower", "upper", "unusual")


def score(*arguments: Path | str, model: Path, output: Path):
    line = [*arguments, "--model", model, "--output", output, "--device", "cpu", "--no-progress"]
    return CliRunner().invoke(command, [str(part) for part in line])


def rows(output: Path) -> list[dict[str, str]]:
    with output.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def calibrated(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with a calibration and a rule."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(model_folder, folder)
    embedding = np.random.default_rng(0).normal(size=(20, 48)).astype(np.float32)
    calibration = Calibration(
        training_set="demo",
        split="s-00",
        population=tuple(np.linspace(-1, 2, 200).tolist()),
        intervals=Conformal(floor=0.05, edges=(), residuals=(RESIDUALS,)),
        distances=Distances(k=5, of_val=(1e-6, 2e-6, 3e-6), sha256=""),
        crops=AdaptiveRule(
            half_width=0.05, usual_spread=0.01, first=2, step=1, agreement=0.998, share=0.5
        ),
    )
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    write_calibration(folder, calibration, embedding / norm)
    quality = np.linspace(0, 1, 30)
    write_rule(
        folder,
        ThresholdRule(
            name="half",
            cut=0.5,
            bad_below=0.5,
            target="recall",
            wanted=0.9,
            split="s-00",
            val=judge(quality, quality, cut=0.5, bad_below=0.5),
        ),
    )
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_row_says_what_its_score_means(
    calibrated: Path, photos: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"s{suffix}"
    done = score(photos, model=calibrated, output=output)
    assert done.exit_code == 0, done.output
    found = list(read_rows(output))
    population = np.linspace(-1, 2, 200)
    for row in found:
        assert row.percentile == pytest.approx(
            stats.percentileofscore(population, row.quality, kind="mean")
        )
        assert row.lower is not None
        assert row.lower <= np.clip(row.score, 0, 100) <= row.upper
        # Random embeddings lie far from everything: further than every val image did.
        assert row.unusual == 1.0
        assert "unlike the training images" in row.note
    assert f"{len(found)} with a note" in done.output
    assert "percentile: among 200 training images of demo" in done.output


def test_one_crop_is_looked_at_where_the_rule_says_that_it_is_enough(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(calibrated, folder)
    meaning = read_meaning(folder)
    assert meaning is not None
    assert meaning.calibration.crops is not None

    def judged(name: str, limit: float, place: Path = photos) -> list[tuple[float, int]]:
        only = FirstCrop(quality=(-9.0, 9.0), risk=(0.0, 18.0), limit=limit)
        rule = dataclasses.replace(meaning.calibration.crops, first=1, only=only)
        write_calibration(
            folder, dataclasses.replace(meaning.calibration, crops=rule), meaning.neighbours
        )
        output = tmp_path / f"{name}.csv"
        done = score(place, "--crops", "adaptive", model=folder, output=output)
        assert done.exit_code == 0, done.output
        assert "where many images have a score like its own" in note_path(output).read_text()
        found = zip(read_rows(output), rows(output), strict=True)
        return [(row.quality, int(cells["crops_used"])) for row, cells in found]

    firsts = judged("first", 100.0)
    assert {used for _, used in firsts} == {1}
    # Risk is quality + 9: the lower half of the images stops after one crop.
    middle = float(np.median([quality for quality, _ in firsts]))
    found = judged("half", middle + 9.0)
    for (first, _), (_, used) in zip(firsts, found, strict=True):
        assert (used == 1) == (first < middle)
    alone = judged("alone", middle + 9.0, min(p for p in photos.rglob("*.*") if p.is_file()))
    assert len(alone) == 1
    assert alone[0] in found


def test_an_exported_file_says_the_same_wherever_it_lies(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lmcl.cli.export import command as export_command

    alone = tmp_path / "elsewhere" / "sold.onnx"
    made = [str(calibrated), "--format", "onnx", "--output", str(alone)]
    assert CliRunner().invoke(export_command, made, catch_exceptions=False).exit_code == 0
    for name, model, more in (
        ("folder", calibrated, ["--engine", "torch"]),
        ("file", alone, []),
        ("fewer", alone, ["--crops", "adaptive"]),
    ):
        done = score(photos, *more, model=model, output=tmp_path / f"{name}.csv")
        assert done.exit_code == 0, done.output
        assert "percentile: among 200 training images of demo" in done.output
    for row, other in zip(rows(tmp_path / "folder.csv"), rows(tmp_path / "file.csv"), strict=True):
        for name in MEANING:
            assert float(other[name]) == pytest.approx(float(row[name]), abs=1e-3), name
    used = [int(row["crops_used"]) for row in rows(tmp_path / "fewer.csv")]
    assert min(used) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("calibration", {"population": "no"}), ("neighbours", "%%%"), ("neighbours", "AAAA")],
)
def test_a_forged_calibration_in_an_exported_file_is_a_sentence(
    calibrated: Path, tmp_path: Path, field: str, value: object
) -> None:
    onnx = pytest.importorskip("onnx")
    from lmcl.inference.onnx_file import exported_card

    opened = lmcl.load(calibrated, device="cpu")
    card = dataclasses.replace(exported_card(opened, calibrated, "float32"), **{field: value})
    there, back = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
        for name in ("crops", "quality")
    )
    same = onnx.helper.make_node("Identity", ["crops"], ["quality"])
    graph = onnx.helper.make_graph([same], "same", [there], [back])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    for name, text in card.metadata().items():
        model.metadata_props.add(key=name, value=text)
    file = tmp_path / "forged.onnx"
    onnx.save(model, file)
    with pytest.raises(LmclError, match="its metadata") as refused:
        lmcl.load(file)
    assert refused.value.exit_code == 5


def test_a_wider_confidence_is_a_wider_interval(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    widths = {}
    for confidence in ("0.5", "0.9", "0.99"):
        output = tmp_path / f"{confidence}.csv"
        assert not score(
            photos, "--confidence", confidence, model=calibrated, output=output
        ).exit_code
        widths[confidence] = [float(r["upper"]) - float(r["lower"]) for r in rows(output)]
    assert all(a <= b for a, b in zip(widths["0.5"], widths["0.9"], strict=True))
    assert np.mean(widths["0.5"]) < np.mean(widths["0.9"]) < np.mean(widths["0.99"])


def test_half_the_width_is_the_exact_quantile_times_the_crops_spread(
    calibrated: Path, photos: Path
) -> None:
    opened = lmcl.load(calibrated, device="cpu")
    found = opened.details(photos / "img.00.jpg")
    quality = opened.scale.to_unit(np.array(found.crops))
    half = RESIDUALS[89] * (float(np.std(quality)) + 0.05)
    ends = np.clip([found.quality - half, found.quality + half], 0, 1) * 100
    assert (found.meaning.lower, found.meaning.upper) == pytest.approx(ends)


def test_a_confidence_that_few_images_cannot_give_leaves_the_columns_empty_and_says_so(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.csv"
    done = score(photos, "--confidence", "0.999", model=calibrated, output=output)
    assert "the 99 calibration images are too few for --confidence 0.999" in done.output
    assert "they give at most 0.99\n" in done.output
    assert "lie between" not in done.output
    assert {row["lower"] for row in rows(output)} == {""}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,score\na.jpg,3\n", "it has no column 'error'"),
        ("image,mos\na.jpg,3\n", "it has no column 'path'"),
        ("path,score,error,quality\na.jpg,3,,nan\n", "is no score"),
        ("path,score,error,quality\na.jpg,3,,good\n", "good"),
        ("path,score,scale,higher_is_better,error,quality\n", "holds no score"),
        ("", "holds no score"),
    ],
    ids=["few-columns", "other-columns", "nan", "words", "header-alone", "empty"],
)
def test_a_population_that_is_no_scores_file_is_named_and_not_called_the_output(
    calibrated: Path, photos: Path, tmp_path: Path, text: str, words: str
) -> None:
    first = tmp_path / "first.csv"
    assert not score(photos / "img.00.jpg", model=calibrated, output=first).exit_code
    first.write_text(text)
    done = score(photos, "--population", first, model=calibrated, output=tmp_path / "s.csv")
    assert str(done.exception).startswith(f"--population {first}: ")
    assert words in str(done.exception)
    assert "--output" not in str(done.exception)


def test_percentiles_are_taken_in_another_collection_of_the_same_model(
    calibrated: Path, model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.csv"
    assert not score(photos, model=calibrated, output=first).exit_code
    output = tmp_path / "second.csv"
    done = score(photos, "--population", first, model=calibrated, output=output)
    assert "among 12 scores of first.csv" in done.output
    found = [float(row["percentile"]) for row in rows(output)]
    qualities = [float(row["quality"]) for row in rows(output)]
    expected = [stats.percentileofscore(qualities, q, kind="mean") for q in qualities]
    assert found == pytest.approx(expected)
    origin = json.loads((tmp_path / "first.csv.origin.json").read_text())
    (tmp_path / "first.csv.origin.json").write_text(json.dumps(origin | {"model": "another"}))
    refused = score(photos, "--population", first, model=calibrated, output=tmp_path / "3.csv")
    assert isinstance(refused.exception, LmclError)
    assert "another model" in str(refused.exception)


def test_a_folder_without_calibration_scores_and_says_what_is_missing(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.csv"
    done = score(photos, model=model_folder, output=output)
    assert done.exit_code == 0
    assert not set(MEANING) & set(rows(output)[0])
    assert "has no calibration.json" in done.output
    assert "lmcl calibrate RUN" in done.output
    for option in (("--confidence", "0.8"), ("--crops", "adaptive")):
        asked = score(photos, *option, model=model_folder, output=tmp_path / "t.csv")
        assert isinstance(asked.exception, LmclError)
        assert asked.exception.exit_code == 2
        assert option[0] in str(asked.exception)


def test_adaptive_crops_are_recorded_and_no_score_depends_on_the_company(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.csv"
    done = score(photos, "--crops", "adaptive", model=calibrated, output=output)
    assert done.exit_code == 0, done.output
    used = [int(row["crops_used"]) for row in rows(output)]
    assert min(used) >= 2
    assert sum(used) < 5 * len(used)
    assert f"looked at {sum(used) / (5 * len(used)):.0%} of the crops" in done.output
    origin = json.loads((tmp_path / "s.csv.origin.json").read_text())
    assert origin["crops used"].startswith("adaptive: 2, then 1 at a time")
    alone = lmcl.load(calibrated, device="cpu", crops="adaptive")
    for row in rows(output):
        assert alone.score(Path(row["path"])) == float(row["score"])
    other = score(photos, "--resume", model=calibrated, output=output)
    assert isinstance(other.exception, LmclError)
    assert "another crops used" in str(other.exception)


def test_a_rule_of_the_model_folder_sorts_out_what_below_would(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    kept = score(photos, "--keep", "half", model=calibrated, output=tmp_path / "a.csv")
    below = score(photos, "--below", "0.5", model=calibrated, output=tmp_path / "b.csv")
    assert kept.exit_code == below.exit_code == 0
    assert kept.output.splitlines()[-1] == below.output.splitlines()[-1]
    moved = score(
        *(photos, "--keep", "half", "--move-to", tmp_path / "out", "--dry-run"),
        model=calibrated,
        output=tmp_path / "c.csv",
    )
    assert "would move" in moved.output
    both = score(
        photos, "--keep", "half", "--below", "0.2", model=calibrated, output=tmp_path / "d"
    )
    assert both.exit_code == 2
    unknown = score(photos, "--keep", "none", model=calibrated, output=tmp_path / "e.csv")
    assert "it has: half" in str(unknown.exception)


def test_a_collection_is_described_by_tenths_with_images(
    calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    done = score(photos, "--describe", model=calibrated, output=tmp_path / "s.csv")
    lines = [line for line in done.output.splitlines() if "  quality " in line]
    assert len(lines) == 10
    worst = min(rows(tmp_path / "s.csv"), key=lambda row: float(row["quality"]))
    assert worst["path"] in lines[0]
    assert f"quality {float(worst['quality']):.3f}" in lines[0]


@pytest.mark.parametrize(
    ("count", "head", "parts"),
    [
        (1, "1 score, worst first", 1),
        (2, "2 scores, worst first", 2),
        (9, "9 scores, worst first", 9),
        (12, "12 scores in 10 parts, worst first", 10),
    ],
)
def test_few_images_are_described_one_a_line(
    calibrated: Path, photos: Path, tmp_path: Path, count: int, head: str, parts: int
) -> None:
    some = sorted(p for p in photos.rglob("*") if p.is_file())[:count]
    done = score(*some, "--describe", model=calibrated, output=tmp_path / "s.csv")
    lines = done.output.splitlines()
    assert head in lines
    assert len([line for line in lines if "  quality " in line]) == parts
    assert "1 images" not in done.output


def test_a_calibration_of_another_model_is_refused(calibrated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(calibrated, folder)
    wrong = Calibration(
        training_set="demo",
        split="s",
        population=(0.5,),
        distances=Distances(k=1, of_val=(0.1,), sha256=""),
    )
    write_calibration(folder, wrong, np.ones((3, 7), dtype=np.float32))
    with pytest.raises(LmclError, match="7 numbers, its model of 48"):
        open_scorer(folder, device="cpu", reading=Reading())
