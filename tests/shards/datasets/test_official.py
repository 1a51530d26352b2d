"""Miniatures of the official layouts, each with the quirks that trip readers up."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import scipy.io

from shards.build.build import build
from shards.datasets import (
    agiqa3k,
    biq2021,
    csiq,
    flive,
    kadid10k,
    koniq10k,
    live,
    livec,
    spaq,
    tid2013,
)
from shards.errors import ShardError
from shards.sample import DataSet, Sample


def touch(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def by_path(dataset: DataSet) -> dict[str, Sample]:
    samples = list(dataset.samples())
    found = {sample.path: sample for sample in samples}
    assert len(found) == len(samples)
    return found


# --- LIVE ------------------------------------------------------------------------------------


@pytest.fixture
def live_root(tmp_path: Path) -> Path:
    root = tmp_path / "nested" / "databaserelease2"
    names = [f"{folder}/img{k + 1}.bmp" for folder, count in live.BLOCKS for k in range(count)]
    touch(root, [*names, "refimgs/woman.bmp", "refimgs/bikes.bmp"])
    copies = np.zeros((1, live.ROWS), np.uint8)
    copies[0, ::5] = 1
    dmos = np.linspace(-2.64, 111.77, live.ROWS)[None]
    dmos[copies == 1] = 0
    scipy.io.savemat(
        root / "dmos_realigned.mat", {"dmos_new": dmos, "dmos_std": dmos * 0 + 5, "orgs": copies}
    )
    cells = np.empty((1, live.ROWS), object)
    cells[0, :] = [["woman.bmp", "bikes.bmp"][k % 2] for k in range(live.ROWS)]
    scipy.io.savemat(root / "refnames_all.mat", {"refnames_all": cells})
    return tmp_path


def test_live_skips_reference_copies_and_keeps_folders_apart(live_root: Path) -> None:
    samples = by_path(live.open_live(live_root))
    assert len(samples) == live.ROWS - len(range(0, live.ROWS, 5))
    assert "jp2k/img1.bmp" not in samples
    assert {"jp2k/img2.bmp", "wn/img2.bmp", "fastfading/img2.bmp"} <= set(samples)
    assert samples["jp2k/img2.bmp"].file.parts[-2:] == ("jp2k", "img2.bmp")
    assert {sample.group for sample in samples.values()} == {"woman", "bikes"}


def test_live_row_k_of_a_block_is_img_k_plus_1(live_root: Path) -> None:
    samples = by_path(live.open_live(live_root))
    dmos = scipy.io.loadmat(str(next(live_root.rglob("dmos_realigned.mat"))))["dmos_new"][0]
    assert samples["jpeg/img1.bmp"].mos == pytest.approx(dmos[227])
    assert samples["jpeg/img1.bmp"].distortion == "jpeg"


def test_live_lower_scores_are_better(live_root: Path) -> None:
    score = live.open_live(live_root).score
    assert score is not None
    assert score.to_unit(np.array([score.low]))[0] == 1.0


def test_live_refuses_the_damaged_copy_in_circulation(live_root: Path) -> None:
    path = next(live_root.rglob("refnames_all.mat"))
    cells = np.empty((779, 1), object)
    cells[:, 0] = "woman.bmp"
    scipy.io.savemat(path, {"refnames_all": cells})
    with pytest.raises(ShardError, match="refnames_all has 779 entries instead of 982"):
        live.open_live(live_root)


def test_live_says_which_label_file_was_used(live_root: Path) -> None:
    path = next(live_root.rglob("dmos_realigned.mat"))
    content = scipy.io.loadmat(str(path))
    path.unlink()
    scipy.io.savemat(
        path.with_name("dmos.mat"), {"dmos": content["dmos_new"], "orgs": content["orgs"]}
    )
    assert live.open_live(live_root).facts.source == "dmos.mat (dmos)"


# --- CSIQ ------------------------------------------------------------------------------------

_CSIQ = [
    (1600, 1, "noise", 1, 0.02, 0.062),
    (1600, 4, "jpeg 2000", 2, 0.03, 0.3),
    ("elk", 6, "contrast", 3, 0.04, 0.2),
    ("elk", 2, "blur", 5, 0.05, 1.0),
]
_CSIQ_FILES = [
    "dst_imgs/awgn/1600.AWGN.1.png",
    "dst_imgs/jpeg2000/1600.jpeg2000.2.png",
    "dst_imgs/contrast/elk.contrast.3.png",
    "dst_imgs/blur/elk.BLUR.5.png",
    "dst_imgs/blur/elk.BLUR.4.png",  # has no label
]


@pytest.fixture
def csiq_root(tmp_path: Path) -> Path:
    book = openpyxl.Workbook()
    book.active.title = "notes"
    sheet = book.create_sheet("all_by_image")
    sheet.cell(2, 4, "CSIQ")
    names = ("image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos")
    for column, name in enumerate(names, start=4):
        sheet.cell(4, column, name)
        for row, values in enumerate(_CSIQ, start=5):
            sheet.cell(row, column, values[column - 4])
    sheet.cell(5 + len(_CSIQ) + 3, 4, None)
    book.save(tmp_path / "csiq.DMOS.xlsx")
    return tmp_path


@pytest.mark.parametrize("layout", ["official", "repacked", "flat"])
def test_csiq_reads_every_layout(csiq_root: Path, layout: str) -> None:
    change = {
        "official": lambda name: name,
        "repacked": lambda name: name.replace("awgn/", "AWGN/").replace("blur/", "BLUR/"),
        "flat": lambda name: "dst_imgs_all/" + name.rpartition("/")[2],
    }[layout]
    touch(csiq_root, [change(name) for name in [*_CSIQ_FILES, "src_imgs/1600.png"]])
    samples = by_path(csiq.open_csiq(csiq_root))
    assert list(samples) == [name.rpartition("/")[2] for name in _CSIQ_FILES[:4]]
    assert all(sample.file.is_file() for sample in samples.values())
    first = samples["1600.AWGN.1.png"]
    assert (first.group, first.distortion, first.level) == ("1600", "awgn", 1)


def test_csiq_number_cell_and_text_list_give_the_same_names(csiq_root: Path) -> None:
    touch(csiq_root, _CSIQ_FILES)
    from_book = {s.path: s.mos for s in csiq.open_csiq(csiq_root).samples()}
    (csiq_root / "csiq.DMOS.xlsx").unlink()
    lines = [f"{name} {mos}" for name, mos in from_book.items()]
    (csiq_root / "csiq_label.txt").write_text("\n".join(lines), encoding="utf-8")
    assert {s.path: s.mos for s in csiq.open_csiq(csiq_root).samples()} == from_book


def test_csiq_names_with_dots_make_distinct_keys(
    csiq_root: Path, picture: Callable[..., bytes]
) -> None:
    for seed, name in enumerate(_CSIQ_FILES):
        (csiq_root / name).parent.mkdir(parents=True, exist_ok=True)
        (csiq_root / name).write_bytes(picture(seed))
    manifest = build(csiq.open_csiq(csiq_root), csiq_root / "out", workers=1)
    assert manifest.num_samples == len(_CSIQ)


# --- TID2013 ---------------------------------------------------------------------------------


def test_tid_resolves_its_three_spellings(tmp_path: Path) -> None:
    (tmp_path / "mos_with_names.txt").write_text(
        "5.51429 I01_01_1.bmp\n5.56757 i01_02_1.bmp\n4.5 I01_11_1.BMP\n0.24242 I01_13_1.BMP\n",
        encoding="ascii",
    )
    (tmp_path / "mos_std.txt").write_text("0.1\n0.2\n0.3\n0.4\n", encoding="ascii")
    touch(
        tmp_path / "distorted_images",
        ["i01_01_1.bmp", "I01_02_1.BMP", "i01_11_1.bmp", "I01_13_1.BMP"],
    )
    touch(tmp_path / "reference_images", ["I01.BMP", "i25.bmp"])
    samples = by_path(tid2013.open_tid2013(tmp_path))
    assert list(samples) == ["i01_01_1.bmp", "i01_02_1.bmp", "i01_11_1.bmp", "i01_13_1.bmp"]
    assert all(sample.file.is_file() for sample in samples.values())
    assert {sample.group for sample in samples.values()} == {"i01"}
    assert [s.mos_std for s in samples.values()] == [0.1, 0.2, 0.3, 0.4]


def test_tid_refuses_two_files_that_differ_in_case(tmp_path: Path) -> None:
    (tmp_path / "mos_with_names.txt").write_text("5.5 I01_01_1.bmp\n", encoding="ascii")
    touch(tmp_path / "distorted_images", ["I01_01_1.bmp", "i01_01_1.BMP"])
    with pytest.raises(ShardError, match="differ only in upper and lower case"):
        tid2013.open_tid2013(tmp_path)


def test_tid_deviations_must_belong_to_the_scores(tmp_path: Path) -> None:
    (tmp_path / "mos_with_names.txt").write_text("5.5 I01_01_1.bmp\n", encoding="ascii")
    (tmp_path / "mos_std.txt").write_text("0.1\n0.2\n", encoding="ascii")
    touch(tmp_path / "distorted_images", ["I01_01_1.bmp"])
    with pytest.raises(ShardError, match=r"2 lines, mos_with_names.txt has 1"):
        tid2013.open_tid2013(tmp_path)


# --- KADID-10k -------------------------------------------------------------------------------


def test_kadid_dmos_is_a_mos_and_var_a_deviation(tmp_path: Path) -> None:
    (tmp_path / "kadid10k").mkdir()
    (tmp_path / "kadid10k/dmos.csv").write_text(
        "dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.57,0.496\n"
        "I81_25_05.png,I81.png,1.0,0.0\n",
        encoding="utf-8",
    )
    names = ["I01.png", "I81.png", "I01_01_01.png", "I81_25_05.png"]
    touch(tmp_path / "kadid10k/images", names)
    dataset = kadid10k.open_kadid10k(tmp_path)
    samples = by_path(dataset)
    assert list(samples) == ["I01_01_01.png", "I81_25_05.png"]
    assert dataset.score is not None
    assert dataset.score.kind == "mos"
    assert dataset.score.higher_is_better
    assert samples["I01_01_01.png"].mos_std == 0.496
    assert (samples["I81_25_05.png"].distortion, samples["I81_25_05.png"].level) == (
        "contrast change",
        5,
    )


# --- LIVE Challenge --------------------------------------------------------------------------


@pytest.fixture
def livec_root(tmp_path: Path) -> Path:
    data = tmp_path / "ChallengeDB_release/ChallengeDB_release/Data"
    data.mkdir(parents=True)
    names = [f"t{k}.bmp" for k in range(1, 8)]
    names += [f"{k}.{'JPG' if 533 <= k < 1160 else 'bmp'}" for k in range(3, 1165)]
    cells = np.empty((livec.ROWS, 1), object)
    cells[:, 0] = names
    mos = np.linspace(3.42, 92.43, livec.ROWS)[None]
    scipy.io.savemat(data / "AllImages_release.mat", {"AllImages_release": cells})
    scipy.io.savemat(data / "AllMOS_release.mat", {"AllMOS_release": mos})
    scipy.io.savemat(data / "AllStdDev_release.mat", {"AllStdDev_release": mos * 0 + 9})
    touch(data.parent / "Images", names[7:])
    touch(data.parent / "Images/trainingImages", names[:7])
    return tmp_path


def test_livec_drops_the_seven_training_rows(livec_root: Path) -> None:
    samples = by_path(livec.open_livec(livec_root))
    assert len(samples) == 1162
    assert not any(name.startswith("t") for name in samples)
    assert samples["533.JPG"].file.is_file()
    mos = np.linspace(3.42, 92.43, livec.ROWS)
    assert samples["3.bmp"].mos == pytest.approx(mos[7])


def test_livec_refuses_another_order_of_rows(livec_root: Path) -> None:
    path = next(livec_root.rglob("AllImages_release.mat"))
    cells = scipy.io.loadmat(str(path))["AllImages_release"][::-1]
    scipy.io.savemat(path, {"AllImages_release": cells})
    with pytest.raises(ShardError, match="the first 7 rows are not the training images"):
        livec.open_livec(livec_root)


# --- KonIQ-10k -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "high", "mos", "part"),
    [
        (
            "koniq10k_distributions_sets.csv",
            "image_name,c1,c_total,MOS,SD,set\n1.jpg,0.1,105,77.4,0.5,training\n"
            "2.jpg,0.1,105,68.7,0.5,validation\n3.jpg,0.1,99,3.9,0.6,test\n",
            100.0,
            77.4,
            "train",
        ),
        (
            "koniq10k_scores_and_distributions.csv",
            '"image_name","c1","c_total","MOS","SD","MOS_zscore"\n"1.jpg",0,105,3.9,0.5,77.4\n'
            '"2.jpg",0,105,3.8,0.5,68.7\n"3.jpg",0,99,1.1,0.6,3.9\n',
            100.0,
            77.4,
            "",
        ),
        (
            "koniq10k_scores.csv",
            "image_name,MOS,SD\n1.jpg,3.9,0.5\n2.jpg,3.8,0.4\n3.jpg,1.1,0.3\n",
            5.0,
            3.9,
            "",
        ),
    ],
    ids=["z-scaled-MOS", "MOS_zscore-wins", "raw-MOS"],
)
def test_koniq_mos_has_two_meanings(
    tmp_path: Path, file: str, text: str, high: float, mos: float, part: str
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    touch(tmp_path, [f"{size}/{k}.jpg" for size in ("1024x768", "512x384") for k in (1, 2, 3)])
    dataset = koniq10k.open_koniq10k(tmp_path)
    samples = by_path(dataset)
    assert dataset.score is not None
    assert (dataset.score.high, samples["1.jpg"].mos, samples["1.jpg"].part) == (high, mos, part)
    assert samples["1.jpg"].file.parent.name == "1024x768"


# --- FLIVE -----------------------------------------------------------------------------------


@pytest.fixture
def flive_root(tmp_path: Path) -> Path:
    names = ["voc_emotic_ava/AVA__1.jpg", "voc_emotic_ava/JPEGImages__2.JPG"]
    names += ["blur_dataset/motion0044.jpg", "EE371R/cj23478+019.jpg"]
    (tmp_path / "labels_image.csv").write_text(
        "name,mos\n" + "".join(f"{name},{70 + k}\n" for k, name in enumerate(names)),
        encoding="utf-8",
    )
    (tmp_path / "labels640.csv").write_text(f"mos_image,name_image\n70,{names[0]}\n")
    (tmp_path / "labels=640_padded.csv").write_text(
        f"mos_image,name_image,is_valid\n71,{names[1]},True\n72,{names[2]},False\n"
    )
    patches = [f"patches/{name.rpartition('/')[2]}_patch_1.jpg" for name in names[:2]]
    (tmp_path / "labels_patch.csv").write_text(
        "name,mos\n" + "".join(f"{name},60\n" for name in patches), encoding="utf-8"
    )
    touch(tmp_path / "database", [*names, *patches])
    return tmp_path


def test_flive_parts_and_the_images_in_no_list(flive_root: Path) -> None:
    samples = by_path(flive.open_flive(flive_root))
    assert [sample.part for sample in samples.values()] == ["test", "val", "train", ""]
    assert all(sample.file.is_file() for sample in samples.values())


def test_flive_patches_have_two_endings_and_stay_with_their_image(flive_root: Path) -> None:
    samples = by_path(flive.open_flive(flive_root, patches=True))
    patch = samples["patches/JPEGImages__2.JPG_patch_1.jpg"]
    assert (patch.group, patch.part) == ("voc_emotic_ava/JPEGImages__2.JPG", "val")
    assert patch.file.is_file()


# --- SPAQ, AGIQA-3K, BIQ2021 -----------------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["MOS and Image attribute scores", "MOS_and_Image_attribute_scores"]
)
def test_spaq_reads_its_workbooks(tmp_path: Path, label: str) -> None:
    folder = tmp_path / "SPAQ zip/Annotations"
    folder.mkdir(parents=True)
    book = openpyxl.Workbook()
    for row in (("Image name", "MOS", "Noisiness"), ("00001.jpg", 50, 1), ("00002.jpg", 2.5, 1)):
        book.active.append(row)
    book.save(folder / f"{label}.xlsx")
    book = openpyxl.Workbook()
    for row in (("Image name", "Animal", "Others"), ("00001.jpg", 0, 1), ("00002.jpg", 0.7, 0.3)):
        book.active.append(row)
    book.save(folder / "Scene category labels.xlsx")
    touch(tmp_path / "SPAQ zip/TestImage", ["00001.jpg", "00002.jpg"])
    samples = by_path(spaq.open_spaq(tmp_path))
    assert [(s.mos, s.subset) for s in samples.values()] == [(50.0, "Others"), (2.5, "Animal")]


def test_agiqa_groups_by_prompt(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(
        "name,prompt,adj1,mos_quality,std_quality\nDALLE2_000.png,a cat,,3.1,0.4\n"
        'midjourney_000.png,a cat,,4.1,0.2\nDALLE2_001.png,"a dog, barking",,1.5,0.3\n',
        encoding="utf-8",
    )
    names = ["DALLE2_000.png", "midjourney_000.png", "DALLE2_001.png"]
    touch(tmp_path / "images", names)
    samples = by_path(agiqa3k.open_agiqa3k(tmp_path))
    assert [sample.group for sample in samples.values()] == ["a cat", "a cat", "a dog, barking"]


@pytest.fixture
def biq_root(tmp_path: Path) -> Path:
    touch(tmp_path / "Images", ["ss02 (1014).JPG", "ss01 (3).jpg", "ss03 (7).jpg"])
    (tmp_path / "Train (Images and MOS).csv").write_text(
        "Image Name,MOS,,\nss02 (1014).jpg,0.4357,,\nss03 (7).jpg,0.5,,\n"
    )
    (tmp_path / "Test (Images and MOS).csv").write_text("Image Name,MOS\nss01 (3).jpg,0.9\n")
    return tmp_path


def test_biq2021_brackets_case_and_parts(biq_root: Path) -> None:
    samples = by_path(biq2021.open_biq2021(biq_root))
    assert [(s.path, s.subset, s.part) for s in samples.values()] == [
        ("ss02 (1014).JPG", "ss02", "train"),
        ("ss03 (7).jpg", "ss03", "train"),
        ("ss01 (3).jpg", "ss01", "test"),
    ]
    assert all(sample.file.is_file() for sample in samples.values())


def test_biq2021_refuses_an_image_without_a_label(biq_root: Path) -> None:
    touch(biq_root / "Images", ["ss01 (99).jpg"])
    with pytest.raises(ShardError, match=r"1 images have no label .* 'ss01 \(99\).jpg'"):
        biq2021.open_biq2021(biq_root)


# --- all -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "open_",
    [
        agiqa3k.open_agiqa3k,
        biq2021.open_biq2021,
        csiq.open_csiq,
        flive.open_flive,
        kadid10k.open_kadid10k,
        koniq10k.open_koniq10k,
        live.open_live,
        livec.open_livec,
        spaq.open_spaq,
        tid2013.open_tid2013,
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("there", [True, False], ids=["empty-folder", "no-folder"])
def test_a_folder_without_the_set_is_named_with_exit_code_4(
    tmp_path: Path, open_: Callable[..., DataSet], there: bool
) -> None:
    root = tmp_path / "nothing"
    if there:
        root.mkdir()
    with pytest.raises(ShardError, match="nothing") as caught:
        open_(root)
    assert caught.value.exit_code == 4
