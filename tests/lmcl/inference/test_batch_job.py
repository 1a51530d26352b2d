import csv
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmcl.cli.score import command
from lmcl.errors import LmclError
from lmcl.inference.batch_job import ScoringOptions, score_items
from lmcl.inference.inputs import list_items
from lmcl.inference.scorer import Scorer, open_scorer
from lmcl.inference.scores_file import JournalRows, Layout, Row, RowJournal, read_rows, write_rows
from pipeline.backends.torch_backend import TorchBackend
from pipeline.decode_config import DecodeConfig
from tests import warm

VALUES = st.tuples(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20),
    st.floats(-1e6, 1e6) | st.none(),
    st.sampled_from(["", 'broken, "really"']),
    st.none() | st.tuples(*[st.integers(0, 10_000)] * 4),
    st.lists(st.floats(-1e3, 1e3), max_size=3).map(tuple),
    st.sampled_from(["", "tiny: 2 x 3 pixels", "=1+1; odd"]),
    st.none() | st.integers(1, 100_000),
)


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def job(output: Path, **changes) -> ScoringOptions:
    return ScoringOptions(**({"output": output, "progress": False} | changes))


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, max_size=6), st.sampled_from([".csv", ".jsonl", ".parquet"]))
def test_rows_come_back_as_they_were_written(tmp_path_factory, values, suffix) -> None:
    rows = [
        Row(
            path=path,
            score=score,
            quality=score,
            error=error,
            box=box,
            crops=crops,
            note=note,
            width=side,
            height=side,
        )
        for path, score, error, box, crops, note, side in values
    ]
    file = tmp_path_factory.mktemp("rows") / f"scores{suffix}"
    layout = Layout(scale="demo mos 0..100", higher_is_better=True, box=True, crops=True)
    assert write_rows(iter(rows), file, layout) == len(rows)
    assert list(read_rows(file)) == rows


def test_every_good_image_is_scored_and_every_bad_one_is_a_row(scorer, mixed, tmp_path) -> None:
    folder, bad = mixed
    summary = score_items(scorer, list_items([str(folder)]), job(tmp_path / "s.csv"))
    rows = table(tmp_path / "s.csv")
    assert {Path(r["path"]).name for r in rows if r["error"]} == bad
    assert all(r["score"] and not r["error"] for r in rows if Path(r["path"]).name not in bad)
    assert (summary.rows, summary.failed) == (len(rows), len(bad)) == (22, 4)
    assert list(rows[0])[:5] == ["path", "score", "scale", "higher_is_better", "error"]
    assert (rows[0]["scale"], rows[0]["higher_is_better"]) == ("demo mos 0..100", "true")


def test_rows_stand_in_the_order_of_the_folder_and_repeat_exactly(scorer, mixed, tmp_path) -> None:
    folder, _ = mixed
    for name, threads in (("one.csv", 1), ("four.csv", 4)):
        score_items(scorer, list_items([str(folder)]), job(tmp_path / name, threads=threads))
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "four.csv").read_bytes()
    paths = [r["path"] for r in table(tmp_path / "one.csv")]
    assert paths == [i.path for i in list_items([str(folder)])]
    assert paths == sorted(paths)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_job_that_was_killed_goes_on_where_it_stopped(scorer, photos, tmp_path, suffix) -> None:
    output, items = tmp_path / f"s{suffix}", list_items([str(photos)])
    whole = tmp_path / f"whole{suffix}"
    score_items(scorer, items, job(whole))
    score_items(scorer, items[:5], job(output))
    # What a kill leaves: a journal, half a line at its end, and no output.
    journal = RowJournal(output, rank=3)
    for row in read_rows(output):
        journal.append(row)
    journal.close()
    with journal.path.open("a") as out:
        out.write('{"path": "half')
    output.unlink()
    summary = score_items(scorer, items, job(output, resume=True))
    assert (summary.rows, summary.reused) == (12, 5)
    assert list(read_rows(output)) == list(read_rows(whole))
    assert not list(tmp_path.glob(".s*"))


def test_resuming_a_finished_file_adds_what_is_new_and_retries_what_failed(
    scorer, photos, tmp_path
) -> None:
    output, late = tmp_path / "s.csv", photos / "late.png"
    (photos / "img.02.jpg").rename(tmp_path / "kept.jpg")
    (photos / "img.02.jpg").write_bytes(b"")
    score_items(scorer, list_items([str(photos)]), job(output))
    (tmp_path / "kept.jpg").replace(photos / "img.02.jpg")
    Image.new("RGB", (80, 80), "red").save(late)
    summary = score_items(scorer, list_items([str(photos)]), job(output, resume=True))
    assert (summary.rows, summary.failed, summary.reused) == (13, 0, 11)


def test_another_model_does_not_continue_a_file(scorer, photos, tmp_path, make_model) -> None:
    from lmcl.inference.scorer import open_scorer
    from shards import ScoreScale

    items = list_items([str(photos)])[:2]
    score_items(scorer, items, job(tmp_path / "s.csv"))
    score = ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True)
    other = open_scorer(make_model(tmp_path / "m", score=score), device="cpu")
    with pytest.raises(LmclError, match="begun with another model and scale") as caught:
        score_items(other, items, job(tmp_path / "s.csv", resume=True))
    assert caught.value.exit_code == 5
    with pytest.raises(LmclError, match="--resume") as caught:
        score_items(scorer, items, job(tmp_path / "s.csv"))
    assert caught.value.exit_code == 2


def test_another_precision_does_not_continue_a_file(model_folder, photos, tmp_path) -> None:
    output = tmp_path / "s.csv"
    score_items(open_scorer(model_folder, device="cpu"), list_items([str(photos)]), job(output))
    fast = open_scorer(model_folder, device="cpu", precision="bfloat16")
    with pytest.raises(LmclError, match="another precision") as caught:
        score_items(fast, list_items([str(photos)]), job(output, resume=True))
    assert caught.value.exit_code == 5


def test_a_forgotten_resume_discards_no_rows(scorer, photos, tmp_path) -> None:
    output, items = tmp_path / "s.csv", list_items([str(photos)])
    journal = RowJournal(output, rank=0)
    journal.append(Row(path=items[0].path, score=1.0, quality=0.1, error=""))
    journal.close()
    with pytest.raises(
        LmclError, match=r"by --resume, or remove them .* another --output"
    ) as caught:
        score_items(scorer, items, job(output))
    assert caught.value.exit_code == 2
    assert journal.path.read_text()
    assert journal.path.name in str(caught.value)


@pytest.mark.parametrize("damage", ["s.csv.origin.json", "s.csv"])
def test_a_damaged_file_is_not_continued(scorer, photos, tmp_path, damage) -> None:
    output, items = tmp_path / "s.csv", list_items([str(photos / "a b")])
    score_items(scorer, items, job(output))
    (tmp_path / damage).write_text("{nonsense\n1\n")
    with pytest.raises(LmclError, match="another --output") as caught:
        score_items(scorer, items, job(output, resume=True))
    assert caught.value.exit_code == 5
    assert not list(tmp_path.glob(".s*"))


def test_the_decoder_stands_in_the_origin_and_another_one_is_announced(
    make_model, photos, tmp_path, caplog
) -> None:
    items = list_items([str(photos / "a b")])
    for decode, warned in ((TorchBackend.recipe, 0), ("dali-cpu-2.4", 0), ("dali-mixed-2.4", 1)):
        caplog.clear()
        scorer = open_scorer(make_model(tmp_path / decode, decode=decode), device="cpu")
        score_items(scorer, items, job(tmp_path / f"{decode}.csv"))
        note = json.loads((tmp_path / f"{decode}.csv.origin.json").read_text())
        assert note["decode"] == TorchBackend.recipe
        assert sum("may differ slightly" in line for line in caplog.messages) == warned


@pytest.fixture(scope="module")
def batch_scorer(model_folder) -> Iterator[Scorer]:
    scorer = open_scorer(model_folder, device="cpu", decode=DecodeConfig(backend="dali", threads=1))
    yield scorer
    scorer.files.close()


@pytest.mark.parametrize("box", [False, True], ids=["plain", "boxes"])
def test_files_decoded_in_batches_have_the_rows_of_files_decoded_one_by_one(
    scorer, batch_scorer, mixed, tmp_path, box
) -> None:
    folder, wrong = mixed
    items = list_items([str(folder)])
    plain, batches = tmp_path / "plain.jsonl", tmp_path / "batches.jsonl"
    score_items(scorer, items, job(plain, box=box, crops=True))
    summary = score_items(batch_scorer, items, job(batches, box=box, crops=True))
    assert summary.failed == len(wrong)
    assert batches.read_text() == plain.read_text()
    for output, recipe in ((plain, TorchBackend.recipe), (batches, "dali-cpu-2.4")):
        note = json.loads(output.with_name(f"{output.name}.origin.json").read_text())
        assert note["decode"] == recipe


def test_one_file_has_the_same_score_alone_in_a_list_and_in_a_job(
    scorer, batch_scorer, photos
) -> None:
    files = sorted(photos.glob("*.jpg"))
    assert batch_scorer.score(files) == [batch_scorer.score(file) for file in files]
    assert batch_scorer.score(files) == scorer.score(files)
    assert batch_scorer.details(files[0]) == scorer.details(files[0])
    with pytest.raises(LmclError, match="not a readable image"):
        batch_scorer.score(b"GIF89a")


def test_a_batch_that_fails_as_a_whole_is_scored_file_by_file(
    batch_scorer, photos, tmp_path, monkeypatch
) -> None:
    decode = batch_scorer.files.decode

    def fail(files, keys):
        if len(files) > 1:
            raise MemoryError
        return decode(files, keys)

    monkeypatch.setattr(batch_scorer.files, "decode", fail)
    items = list_items([str(photos)])
    assert score_items(batch_scorer, items, job(tmp_path / "s.csv")).failed == 0


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_where_a_gpu_decodes_each_row_says_whether_it_was_the_gpu(
    batch_scorer, photos, tmp_path, suffix, monkeypatch
) -> None:
    choice = dataclasses.replace(batch_scorer.files.choice, decoder="gpu", recipe="dali-gpu-2.4")
    monkeypatch.setattr(batch_scorer.files, "choice", choice)
    prepare = batch_scorer.prepare_files

    def prepare_files(files, **options):
        return [
            dataclasses.replace(image, gpu_decoded=data.startswith(b"\xff"))
            for image, data in zip(prepare(files, **options), files, strict=True)
        ]

    monkeypatch.setattr(batch_scorer, "prepare_files", prepare_files)
    output = tmp_path / f"s{suffix}"
    score_items(batch_scorer, list_items([str(photos)])[:3], job(output))
    score_items(batch_scorer, list_items([str(photos)]), job(output, resume=True))
    found = {row.path: row.decoder for row in read_rows(output)}
    assert set(found.values()) == {"gpu", "cpu"}
    assert all((decoder == "gpu") == path.endswith(".jpg") for path, decoder in found.items())
    note = json.loads(output.with_name(f"{output.name}.origin.json").read_text())
    assert note["decode"] == "dali-gpu-2.4"


def test_a_score_that_is_no_number_is_a_row_with_an_error(make_model, photos, tmp_path) -> None:
    broken = open_scorer(make_model(tmp_path / "m"), device="cpu")
    with torch.no_grad():
        broken.model.panel.head.weight.fill_(torch.nan)
    items = list_items([str(photos / "a b")])
    assert score_items(broken, items, job(tmp_path / "s.jsonl", crops=True)).failed == 6
    text = (tmp_path / "s.jsonl").read_text()
    assert "the model answers nan, which is no score" in text
    assert "NaN" not in text
    with pytest.raises(LmclError, match="no score") as caught:
        broken.score(items[0].file)
    assert caught.value.exit_code == 5


def test_a_later_success_replaces_a_failure_in_any_journal(tmp_path) -> None:
    output = tmp_path / "s.csv"
    good = Row(path="a", score=1.0, quality=0.1, error="")
    bad = Row(path="a", score=None, quality=None, error="no")
    for rank, row in enumerate((bad, good, bad)):
        journal = RowJournal(output, rank=rank)
        journal.append(row)
        journal.close()
    found = JournalRows(output)
    assert not found.entries["name:a"].is_failed
    assert list(found.rows(["name:a"])) == [good]


def test_patterns_tables_tars_and_stdin_name_the_same_images(photos, tmp_path) -> None:
    names = [f"img.{i:02d}.jpg" for i in range(6)]
    with (photos / "list.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["path", "note"], *([n, "x"] for n in names)])
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in (*names, "list.csv"):
            tar.add(photos / name, name)
    by_pattern = list_items([str(photos / "*.jpg")])
    by_table = list_items([str(photos / "list.csv")])
    by_tar = list_items([str(tmp_path / "s.tar")])
    by_stdin = list_items(["-"], stdin=iter([f"{photos / n}\n" for n in names]))
    contents = [[i.read() for i in items] for items in (by_pattern, by_table, by_tar, by_stdin)]
    assert contents[0] == contents[1] == contents[2] == contents[3]
    assert len(contents[0]) == 6


def test_an_image_named_twice_is_scored_once(photos) -> None:
    assert len(list_items([str(photos), str(photos / "img.00.jpg"), str(photos)])) == 12


def test_what_does_not_exist_is_a_row(scorer, tmp_path) -> None:
    items = list_items([str(tmp_path / "no*.jpg")])
    summary = score_items(scorer, items, job(tmp_path / "s.jsonl"))
    row = json.loads((tmp_path / "s.jsonl").read_text())
    assert summary.failed == 1
    assert "no such file" in row["error"]
    assert row["score"] is None


def test_boxes_and_crop_scores_are_columns_when_asked_for(scorer, photos, tmp_path) -> None:
    items = list_items([str(photos)])[:3]
    score_items(scorer, items, job(tmp_path / "s.parquet", box=True, crops=True))
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [len(r["crop_scores"]) for r in rows] == [5, 5, 5]
    assert all(r["h"] == r["w"] == 64 for r in rows)


def test_the_command_gates_a_folder_without_touching_it_in_a_dry_run(
    model_folder, photos, tmp_path
) -> None:
    base = [str(photos), "--model", str(model_folder), "--device", "cpu", "--no-progress"]
    first = CliRunner().invoke(command, [*base, "--output", str(tmp_path / "s.csv")])
    assert first.exit_code == 0, first.output
    limit = sorted(float(r["quality"]) for r in table(tmp_path / "s.csv"))[4]
    gate = ["--output", str(tmp_path / "s.csv"), "--resume", "--below", str(limit)]
    gate += ["--move-to", str(tmp_path / "rejected")]
    dry = CliRunner().invoke(command, [*base, *gate, "--dry-run"])
    assert "would move 4 of 12" in dry.output
    assert not (tmp_path / "rejected").exists()
    sheet = tmp_path / "sheet.html"
    wet = CliRunner().invoke(command, [*base, *gate, "--sheet", str(sheet)])
    assert "moved 4 of 12" in wet.output
    assert len([p for p in (tmp_path / "rejected").rglob("*") if p.is_file()]) == 5  # and moves.csv
    assert len([p for p in photos.rglob("*") if p.is_file()]) == 8
    assert sheet.read_text().count('<figure class="shot"') == 12


@pytest.mark.parametrize("high", [1.0, 100.0], ids=["quality", "other-scale"])
def test_a_contact_sheet_says_what_its_numbers_are_and_what_is_not_on_it(photos, tmp_path, high):
    from lmcl.inference.sheet import write_sheet

    (photos / "zero.jpg").touch()
    items = list_items([str(photos)])
    rows = [Row(path=i.path, score=0.25 * high, quality=0.25, error="") for i in items]
    bad = next(k for k, i in enumerate(items) if i.path.endswith("zero.jpg"))
    rows[bad] = Row(path=items[bad].path, score=None, quality=None, error="the file is empty")
    (photos / "img.03.jpg").unlink()  # gone since it was scored
    assert write_sheet(rows, items, tmp_path / "sheet.html", scale="demo mos") == 12
    page = (tmp_path / "sheet.html").read_text()
    assert page.count('src="data:image/jpeg;base64,/') == 11
    assert page.count("cannot be shown") == 1
    assert "1 images could not be scored" in page
    assert ("(0.25)" in page) == ("stands in brackets" in page) == (high == 100.0)
    assert "lmcl report" not in page


def test_moving_never_writes_over_a_file(scorer, photos, tmp_path) -> None:
    from lmcl.inference.filter import plan_moves
    from lmcl.inference.moves import carry_out

    items = list_items([str(photos)])
    rows = [Row(path=i.path, score=0.0, quality=0.0, error="") for i in items]
    target = tmp_path / "rejected"
    (target / "a b").mkdir(parents=True)
    (target / "a b" / "0 (1).png").write_bytes(b"precious")
    list(carry_out(plan_moves(rows, items, below=0.5, folder=target), target))
    assert (target / "a b" / "0 (1).png").read_bytes() == b"precious"
    assert len([p for p in target.rglob("*") if p.is_file()]) == 14  # and moves.csv


def test_the_exit_code_tells_of_bad_images(model_folder, mixed, tmp_path) -> None:
    folder, bad = mixed
    found = CliRunner().invoke(
        command,
        [
            *(str(folder), "--model", str(model_folder), "--output", str(tmp_path / "s.csv")),
            *("--device", "cpu", "--no-progress"),
        ],
    )
    assert found.exit_code == 3
    assert f"{len(bad)} failed" in found.output


def test_two_processes_write_the_file_that_one_writes(
    scorer, model_folder, mixed, tmp_path
) -> None:
    folder, _ = mixed
    score_items(scorer, list_items([str(folder)]), job(tmp_path / "one.csv"))
    asked = [str(folder), "--model", str(model_folder), "--output", str(tmp_path / "two.csv")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = [sys.executable, "-m", "lmcl", "score", *asked, "--device", "cpu", "--no-progress"]
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        warm.start(
            line,
            env=os.environ
            | names
            | {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [process.communicate(240)[1] for process in ranks]
    # There are bad images.
    assert [process.returncode for process in ranks] == [3, 3], said
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_memory_stays_flat_over_many_images(scorer, tmp_path) -> None:
    import resource

    out = io.BytesIO()
    Image.new("RGB", (48, 48), "blue").save(out, "JPEG")
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:05d}.jpg").write_bytes(out.getvalue())
    score_items(scorer, list_items([str(folder)])[:100], job(tmp_path / "warm.csv"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score_items(scorer, list_items([str(folder)]), job(tmp_path / "s.csv"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
