"""The pages in a real headless Chromium, driven by chromedriver's own HTTP protocol.

One browser serves all tests. Without chromium and chromedriver they skip: `apt-get install chromium
chromium-driver` brings both.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmcl.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no chromium with chromedriver: apt-get install chromium chromium-driver",
    ),
    pytest.mark.timeout(120),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
]


class Browser:
    """A WebDriver session: just the calls these tests need."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": FLAGS, "binary": CHROMIUM}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        found = self.call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{found['sessionId']}"

    def call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", {"features": [scheme]})
        # The window has a least width of 500; a phone is narrower.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", size)
        self.log("browser"), self.log("performance")
        self.call("/url", {"url": page.resolve().as_uri()})

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("/se/log", {"type": kind})
        return found

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        acts: list[dict[str, Any]] = [
            {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        ]
        if click:
            acts += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": acts}
        self.call("/actions", {"actions": [mouse]})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("/screenshot", method="GET")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        session = _connect(port)
        yield session
        session.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def _connect(port: int) -> Browser:
    for _ in range(100):
        try:
            return Browser(port)
        except urllib.error.HTTPError as error:
            with error:
                message = json.load(error)["value"]["message"]
            pytest.fail(f"chromedriver: {message.splitlines()[0]}")
        except urllib.error.URLError:
            time.sleep(0.1)
    pytest.fail("chromedriver did not answer within 10 s")


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_run) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "a run")
    return write_report([folder], folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, make_run) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / n, seed=i, pictures=False) for i, n in enumerate(("one", "two"))]
    return write_report(runs, root / "out")


def place_of_row(browser: Browser, row: int) -> tuple[float, float]:
    browser.run(
        "document.querySelector('#agreement svg.points')"
        ".scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    box = browser.run(
        f"document.querySelector('#agreement circle[data-i=\"{row}\"]').getBoundingClientRect()"
    )
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.parametrize("which", ["page", "comparison"])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_load_without_errors_requests_or_sideways_scrolling(
    browser, request, which, width, dark
) -> None:
    file = request.getfixturevalue(which)
    browser.open(file, width=width, dark=dark)
    assert [e for e in browser.log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    sent = [json.loads(e["message"])["message"] for e in browser.log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
    ]
    assert {u.partition(":")[0] for u in urls} <= {"file", "data"}
    assert len([u for u in urls if u.startswith("file:")]) == 1
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width


def test_paper_is_light_by_day_and_dark_by_night(browser, page) -> None:
    shades = []
    for dark in (False, True):
        browser.open(page, width=800, dark=dark)
        shades.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    light, night = (sum(int(c) for c in s[4:-1].split(",")) for s in shades)
    assert light > 3 * 200
    assert night < 3 * 60


@pytest.mark.parametrize("which", ["page", "comparison"])
@pytest.mark.parametrize("width", [400, 1600])
def test_text_in_figures_stays_readable(browser, request, which, width) -> None:
    browser.open(request.getfixturevalue(which), width=width)
    least = browser.run(
        "Math.min(...[...document.querySelectorAll('svg.chart:not(.inline) text')]"
        ".map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)))"
    )
    assert least >= 9.5


def test_pointing_at_an_image_shows_it_and_leaving_hides_it(browser, page) -> None:
    browser.open(page, width=1200)
    browser.point(*place_of_row(browser, 17))
    card = "document.getElementById('card')"
    assert browser.run(f"{card}.hidden") is False
    assert browser.run(f"{card}.querySelector('img').naturalWidth") > 0
    path = browser.run("JSON.parse(document.getElementById('data').textContent).rows[17].path")
    assert path in browser.run(f"{card}.textContent")
    assert browser.run(f"{card}.querySelectorAll('.salient').length") == 1
    browser.point(4, 4)
    assert browser.run(f"{card}.hidden") is True


def test_a_click_keeps_the_image_until_escape(browser, page) -> None:
    browser.open(page, width=1200)
    browser.point(*place_of_row(browser, 30), click=True)
    browser.point(4, 4)
    assert browser.run("document.getElementById('card').hidden") is False
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert browser.run("document.getElementById('card').hidden") is True


def test_a_filter_dims_the_others_and_states_the_correlation_of_the_rest(browser, page) -> None:
    browser.open(page, width=1200)
    chip = "[...document.querySelectorAll('.chips button')].find(b => b.textContent === 'blur')"
    browser.run(f"{chip}.click()")
    tree = json.loads((page.parent / "results.json").read_text())
    blur = next(p for p in tree["runs"][0]["portions"] if p["name"] == "blur")
    status = browser.run("document.getElementById('status').textContent")
    assert f"{blur['n']} scored images, SRCC {blur['srcc']:.3f}" in status
    lit = browser.run("document.querySelectorAll('#agreement svg circle.p:not(.off)').length")
    assert lit == 2 * blur["n"]
    browser.run(f"{chip}.click()")
    assert browser.run("document.querySelectorAll('circle.off').length") == 0


def test_a_cell_of_the_heat_map_filters_by_distortion_and_level(browser, page) -> None:
    browser.open(page, width=1200)
    browser.run("document.querySelector('td.heat button').click()")
    assert "12 scored images" in browser.run("document.getElementById('status').textContent")


def test_a_name_with_markup_in_it_is_text_and_filters(browser, page) -> None:
    browser.open(page, width=1200)
    chip = (
        "[...document.querySelectorAll('.chips button')].find(b => b.textContent === 'night & fog')"
    )
    browser.run(f"{chip}.click()")
    assert browser.run("document.getElementById('status').textContent").startswith(
        "night & fog: 48"
    )


def test_the_attention_switch_lays_the_maps_over_the_images(browser, page) -> None:
    browser.open(page, width=1200)
    shown = "getComputedStyle(document.querySelector('.gallery .att')).display"
    assert browser.run(shown) == "none"
    browser.run("document.querySelector('input[data-show=show-attention]').click()")
    assert browser.run(shown) == "block"


def test_every_picture_of_the_gallery_is_decoded(browser, page) -> None:
    browser.open(page, width=1200)
    widths = browser.run("[...document.querySelectorAll('.gallery img')].map(i => i.naturalWidth)")
    assert len(widths) == 64
    assert min(widths) > 0


@pytest.fixture(scope="module")
def duels(tmp_path_factory) -> Path:
    """Pairs of images larger and smaller than their place on the page, with a long name."""
    from lmcl.report.gmad import common_pool, find_duels, read_scores, write_duels

    folder = tmp_path_factory.mktemp("gmad")
    rng = np.random.default_rng(0)
    names = [f"a-camera-with-a-long-name/{i:03d}.jpg" for i in range(30)]
    (folder / names[0]).parent.mkdir()
    for i, name in enumerate(names):
        size = (900, 600) if i % 3 else (64, 96)
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize(size).save(folder / name)
    for file in ("first.csv", "second.csv"):
        rows = "".join(f"{n},{rng.normal()},a set mos 0..100,true\n" for n in names)
        (folder / file).write_text("path,score,scale,higher_is_better\n" + rows)
    a, b = common_pool(read_scores(folder / "first.csv"), read_scores(folder / "second.csv"))
    found = [d for x, y in ((a, b), (b, a)) for d in find_duels(x, y, levels=2, tolerance=3.0)]
    return write_duels(found, a, b, levels=2, images=folder, output=folder / "out")


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    from lmcl.inference.filter import write_sheet
    from lmcl.inference.inputs import list_items
    from lmcl.inference.scores_file import Row

    folder = tmp_path_factory.mktemp("sheet")
    for i in range(24):
        size = ((300, 200), (120, 400), (32, 32))[i % 3]
        Image.new("RGB", size, (10 * i, 90, 60)).save(folder / f"IMG_20240101_{i:06d}_HDR.jpg")
    items = list_items([str(folder)])
    rows = [Row(path=x.path, score=i / 5, quality=i / 24, error="") for i, x in enumerate(items)]
    write_sheet(rows, items, folder / "sheet.html", scale="demo mos 1..5")
    return folder / "sheet.html"


@pytest.mark.parametrize("width", [400, 1600])
def test_pairs_stand_beside_each_other_and_no_image_is_blown_up(browser, duels, width) -> None:
    browser.open(duels, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    pairs = browser.run(
        "[...document.querySelectorAll('.pair')].map(p => [...p.querySelectorAll('img')]"
        ".map(i => { const r = i.getBoundingClientRect();"
        " return [r.left, r.right, r.top, r.width, i.naturalWidth]; }))"
    )
    assert len(pairs) >= 8
    for (l1, r1, t1, w1, n1), (l2, r2, t2, w2, n2) in pairs:
        assert l1 < r1 <= l2 < r2 <= width
        assert t1 == t2
        assert w1 <= n1 + 0.5
        assert w2 <= n2 + 0.5
    if width == 1600:  # there is room for every pixel
        assert max(w for pair in pairs for _, _, _, w, _ in pair) == 560
    assert [e for e in browser.log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.parametrize(("width", "columns"), [(400, 2), (1600, 8)])
def test_a_contact_sheet_fills_the_page_with_thumbnails(browser, sheet, width, columns) -> None:
    browser.open(sheet, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    places = browser.run(
        "[...document.querySelectorAll('.shot')].map(f => {"
        " const r = f.getBoundingClientRect(); return [r.left, r.top]; })"
    )
    assert len(places) == 24
    assert len({round(x) for x, _ in places}) == columns
    assert browser.run("document.querySelectorAll('nav a').length") == 0
    assert [e for e in browser.log("browser") if e["level"] == "SEVERE"] == []
