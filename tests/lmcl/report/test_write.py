import base64
import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lmcl.errors import LmclError
from lmcl.report import write_report
from lmcl.report.analysis import embedding_plane, spread_over_groups
from lmcl.report.published import published_for
from lmcl.report.text import SCHEMA
from shards.errors import ShardError


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_run) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "one", pictures=False)
    write_report([folder], folder)
    return folder


def test_all_files_are_written_and_nothing_temporary_stays(run: Path) -> None:
    names = {p.name for p in run.iterdir() if p.is_file()}
    assert {"report.html", "report.md", "results.json", "results.csv", "predictions.csv"} <= names
    assert not [n for n in names if n.startswith(".")]


@pytest.mark.parametrize("name", ["results.csv", "report.md", "report.html", "predictions.csv"])
def test_a_report_elsewhere_replaces_reports_and_nothing_else(run: Path, tmp_path, name) -> None:
    output = tmp_path / "papers"
    write_report([run], output)
    write_report([run], output)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("three years of work\n")
    with pytest.raises(ShardError, match="not") as refused:
        write_report([run], mine)
    assert refused.value.exit_code == 2
    assert [p.name for p in mine.iterdir()] == [name]
    assert (mine / name).read_text() == "three years of work\n"


def test_results_json_is_versioned_and_holds_the_figures_of_scipy(run: Path) -> None:
    tree = json.loads((run / "results.json").read_text())
    rows = table(run / "predictions.csv")
    x, y = (np.array([float(r[c]) for r in rows]) for c in ("prediction", "mos"))
    found = tree["runs"][0]["evaluation"]
    assert tree["schema"] == SCHEMA == "lmcl-report/1"
    assert found["srcc"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert found["plcc_raw"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert found["fit4"]["status"] == "ok"
    assert len(found["fit4"]["parameters"]) == 4
    assert found["intervals"]["srcc"]["method"] == "cluster-bootstrap"


def test_the_mapped_prediction_in_the_table_gives_the_reported_error(run: Path) -> None:
    tree = json.loads((run / "results.json").read_text())
    rows = table(run / "predictions.csv")
    error = [float(r["prediction_fit"]) - float(r["mos"]) for r in rows]
    rmse = tree["runs"][0]["evaluation"]["rmse_fit4"]
    assert float(np.sqrt(np.mean(np.square(error)))) == pytest.approx(rmse)


def test_results_csv_has_a_row_for_every_portion(run: Path) -> None:
    rows = table(run / "results.csv")
    assert [r["kind"] for r in rows] == ["all"] + ["subset"] * 2 + ["distortion"] * 4
    assert sum(int(r["n"]) for r in rows if r["kind"] == "distortion") == int(rows[0]["n"])


def test_markdown_names_the_note_the_protocol_and_what_is_missing(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert "This set is synthetic" in text
    assert r"split\_hash" in text
    assert "thumbs/ is missing" in text


def test_the_page_needs_nothing_but_the_predictions(tmp_path: Path, run: Path) -> None:
    bare = tmp_path / "bare"
    (bare / "predictions").mkdir(parents=True)
    shutil.copy(run / "predictions" / "test.csv", bare / "predictions")
    page = write_report([bare], tmp_path / "out").read_text()
    for name in ("config.toml", "log.jsonl", "protocol.json", "embeddings.npz", "thumbs/"):
        assert f"{name} is missing" in page


def test_the_page_says_which_version_of_the_set_the_run_saw(run: Path) -> None:
    assert re.search(
        r"Version of the set\s*</\w+>\s*<\w+[^>]*>\s*3\b", (run / "report.html").read_text()
    )


def test_two_reports_of_one_run_are_the_same_bytes(tmp_path: Path, run: Path) -> None:
    first, second = (write_report([run], tmp_path / n).read_bytes() for n in ("a", "b"))
    assert first == second


def test_names_of_images_cannot_break_out_of_the_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<blur>" not in page
    assert page.count("</script>") == 2


def test_a_gallery_shows_many_groups_and_not_one_content_many_times() -> None:
    group = np.array(["a"] * 6 + ["b", "b", "b", "c"])
    rows = np.arange(10)
    found = spread_over_groups(rows, group).tolist()
    assert found[:5] == [0, 1, 6, 7, 9]
    assert sorted(found) == rows.tolist()
    assert spread_over_groups(rows, np.array([""] * 10)).tolist() == rows.tolist()


def test_published_figures_stand_on_the_page_only_where_there_are_some(tmp_path: Path, make_run):
    folder = make_run(tmp_path / "a", pictures=False)
    assert "Beside published results" not in write_report([folder], folder).read_text()
    text = (folder / "protocol.json").read_text().replace('"demo"', '"livec"')
    (folder / "protocol.json").write_text(text)
    assert "Beside published results" in write_report([folder], folder).read_text()


def test_every_missing_interval_has_its_reason_in_words(tmp_path: Path, make_run) -> None:
    page = write_report([make_run(tmp_path / "a", contents=3, pictures=False)], tmp_path / "out")
    text = page.read_text()
    assert "3 groups of images that depend on each other; an interval needs 5" in text
    assert "No interval: " in text


def test_validation_is_the_first_curve_and_noisy_ones_have_their_means(run: Path) -> None:
    page = (run / "report.html").read_text()
    charts = re.findall(r"<div><h3>([^<]+)</h3>", page)
    assert charts[0] == "Validation"
    assert 'class="curve faint c0"' in page


def test_constant_predictions_are_reported_with_their_reason(tmp_path: Path, run: Path) -> None:
    rows = table(run / "predictions" / "test.csv")
    (tmp_path / "flat" / "predictions").mkdir(parents=True)
    with (tmp_path / "flat" / "predictions" / "test.csv").open("w") as out:
        writer = csv.DictWriter(out, rows[0].keys())
        writer.writeheader()
        writer.writerows({**r, "prediction": "50.0"} for r in rows)
    page = write_report([tmp_path / "flat"], tmp_path / "flat").read_text()
    assert "all predictions are equal" in page
    assert "NaN" not in (tmp_path / "flat" / "results.json").read_text()


def _broken(run: Path, folder: Path, name: str, content: bytes) -> Path:
    """A copy of a run with one of its files replaced."""
    shutil.copytree(run, folder)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("config.toml", b"[data\n", "config.toml is no TOML"),
        ("config.toml", b"a = '\xff'\n", "config.toml is no TOML"),
        ("log.jsonl", b'3\n{"event": "step", "loss": 1}\n', "log.jsonl holds 1 lines that are no"),
    ],
    ids=["toml", "latin-1-toml", "log"],
)
def test_a_file_the_report_can_do_without_is_named_on_the_page_if_it_is_broken(
    tmp_path: Path, run: Path, name: str, content: bytes, note: str
) -> None:
    folder = _broken(run, tmp_path / "run", name, content)
    page = write_report([folder], folder).read_text()
    assert note in page
    assert note in (folder / "report.md").read_text()


def test_a_last_line_of_the_log_that_was_cut_off_is_no_news(tmp_path: Path, run: Path) -> None:
    log = (run / "log.jsonl").read_bytes() + b'{"event": "st'
    folder = _broken(run, tmp_path / "run", "log.jsonl", log)
    assert "log.jsonl holds" not in write_report([folder], folder).read_text()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"1,a.png,3,3\n1,b.png,4,4\n", "id 1 stands in 2 rows"),
        (b"nan,a.png,3,3\n", "an id, a level or a box is no whole number"),
        (b"1e400,a.png,3,3\n", "an id, a level or a box is no whole number"),
        (b"1,\xe4.png,3,3\n", "is no CSV file in UTF-8"),
    ],
    ids=["twice", "nan", "infinite", "latin-1"],
)
def test_predictions_that_cannot_be_read_are_named_with_a_way_out(
    tmp_path: Path, run: Path, rows: bytes, words: str
) -> None:
    content = b"id,path,mos,prediction\n" + rows
    folder = _broken(run, tmp_path / "run", "predictions/test.csv", content)
    with pytest.raises(LmclError) as caught:
        write_report([folder], folder)
    assert f"predictions/test.csv: {words}" in str(caught.value)
    assert f"write it again with `lmcl eval {folder}`" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_folder_without_predictions_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LmclError, match="lmcl eval") as caught:
        write_report([tmp_path / "empty"], tmp_path)
    assert caught.value.exit_code == 4


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(LmclError, match="no such run folder"):
        write_report([tmp_path / "nowhere"], tmp_path)


def test_published_figures_have_sources_and_mark_other_protocols() -> None:
    rows = published_for("livec")
    assert [r.model for r in rows] == ["DR.Experts", "LML-IQA", "DEIQT"]
    assert all(r.cite and r.note and not r.comparable for r in rows)
    assert published_for("no-such-set") == []


def test_the_sign_of_an_inverted_model_stands_in_the_first_sentence(tmp_path, run) -> None:
    rows = table(run / "predictions" / "test.csv")
    (tmp_path / "inv" / "predictions").mkdir(parents=True)
    with (tmp_path / "inv" / "predictions" / "test.csv").open("w") as out:
        writer = csv.DictWriter(out, rows[0].keys())
        writer.writeheader()
        writer.writerows({**r, "prediction": str(-float(r["prediction"]))} for r in rows)
    page = write_report([tmp_path / "inv"], tmp_path / "inv").read_text()
    assert "the model is inverted" in page


def test_embeddings_are_brought_to_a_plane_by_umap_where_it_is_installed() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(8)[:2], 20, axis=0)
    xy, names = embedding_plane((centres + 0.05 * rng.normal(size=(40, 8))).astype(np.float32))
    assert names == ("UMAP 1", "UMAP 2")
    middles = xy[:20].mean(axis=0), xy[20:].mean(axis=0)
    assert np.linalg.norm(middles[0] - middles[1]) > xy[:20].std(axis=0).max()


def test_the_policy_allows_the_pages_own_style_and_script_by_hash_and_nothing_else(run) -> None:
    page = (run / "report.html").read_text()
    policy = page.partition('Policy" content="')[2].partition('">')[0]
    assert "unsafe" not in policy
    assert all(
        rule in policy
        for rule in ("default-src &#39;none&#39;", "base-uri &#39;none&#39;", "form-action")
    )
    assert " style=" not in page.partition("<body>")[2].partition("<script")[0]
    for kind in ("style", "script"):
        text = page.rpartition(f"<{kind}>")[2].partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src &#39;sha256-{digest}&#39;" in policy
