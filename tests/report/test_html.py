"""The report page: self-contained, safe with hostile names and texts, and usable in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohort import findings, gpuprep

from gpuprep.compute.hu_histogram import Histogram
from gpuprep.errors import RequestError
from gpuprep.output.manifest import Manifest
from gpuprep.output.preview import encode_jpeg
from gpuprep.output.records import SeriesResult
from gpuprep.report.html import write_report
from gpuprep.testing import write_series

HOSTILE = "</script><img src=x onerror=alert(1)>"
JPEG = encode_jpeg(np.full((128, 392, 3), 90, dtype=np.uint8))


class Page(HTMLParser):
    """A page as parsed by `html.parser`: tags, and the content of scripts and styles."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[dict[str, str | None], str]] = []
        self._within: dict[str, str | None] | None = None
        self.feed(file.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = {**dict(attrs), "tag": tag} if tag in ("script", "style") else None

    def handle_endtag(self, _tag: str) -> None:
        self._within = None

    def handle_data(self, data: str) -> None:
        if self._within is not None:
            self.contents.append((self._within, data))

    def json(self, name: str) -> Any:
        (found,) = [text for tag, text in self.contents if tag.get("id") == name]
        return json.loads(found)


def result(number: int, **more: Any) -> SeriesResult:
    """Return the result of a series without flags."""
    histogram = Histogram((-1000, 400))
    for hu, voxels in ((-1000, 400), (-850, 200), (-100, 80), (50, 300), (600, 20)):
        histogram.add(np.repeat(np.arange(hu - 10, hu + 11, dtype=np.int16), voxels), 1.0, 0.0)
    defaults: dict[str, Any] = {
        "key": f"1.2.{number}", "series_uid": f"1.2.{number}", "study_uid": "1", "series_number": number,
        "source": f"/dicom/patient-{number:03d}", "status": "ok", "slices": 100 + number, "folder": f"p{number:03d}",
        "source_shape": (100 + number, 512, 512), "source_spacing_mm": (2.5, 0.7, 0.7), "hu_min": -1024.0,
        "hu_mean": -600.0 - number, "hu_max": 2000.0, "padding_share": 0.2, "quality": histogram.to_dict(),
        "shape": (250, 512, 512), "spacing_mm": (1.0, 0.7, 0.7), "files": 252, "bytes": 10**8, "read_s": 0.25,
        "process_s": 0.5, "write_s": 0.25 + number, "finished": "2026-01-02T03:04:05.000+00:00",
    }  # fmt: skip
    return SeriesResult(**(defaults | more))


def output(out: Path, results: list[SeriesResult]) -> Path:
    """Make an output folder with a manifest and preview pictures."""
    out.mkdir()
    with closing(Manifest(out / "manifest.sqlite")) as manifest:
        for r in results:
            manifest.put(r)
            if r.status != "rejected":
                (out / r.folder).mkdir(parents=True)
                (out / r.folder / "preview.jpg").write_bytes(JPEG)
    return out


def rejected(number: int, **more: Any) -> SeriesResult:
    """Return the result of a rejected series."""
    missing = dict.fromkeys(
        ("source_shape", "source_spacing_mm", "hu_min", "hu_mean", "hu_max", "padding_share", "shape")
    )
    reason = {"status": "rejected", "codes": ("gap",), "reason": "GeometryError: slices are missing", "folder": ""}
    times = dict.fromkeys(("read_s", "process_s", "write_s"), 0.0)
    return result(number, **(missing | reason | times | {"quality": None} | more))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An output folder with markup in all names and texts."""
    label = {"name": HOSTILE, "value": 1, "file": "labels", "ml": 1.5}
    folder = HOSTILE.replace("/", "|")
    texts: Any = {"warnings": (HOSTILE,), "irregularities": (HOSTILE,), "labels": (label,), "folder": folder}
    return output(
        tmp_path / "out",
        [
            result(1, source=f"/{HOSTILE}", status="fixed", codes=(HOSTILE,), **texts),
            rejected(2, source=f"/dicom/{HOSTILE}", reason=f"Error: {HOSTILE}"),
        ],
    )


def test_the_page_contains_each_series_and_its_picture(tmp_path: Path) -> None:
    out = output(tmp_path / "out", [result(1), rejected(2), result(3, slices=5)])
    assert write_report(out) == str(out / "report.html")
    page = Page(out / "report.html")
    cohort = page.json("cohort")
    rows = [dict(zip(cohort["columns"], row, strict=True)) for row in cohort["rows"]]
    assert [(r["name"], r["status"], r["slices"], r["flags"]) for r in rows] == [
        ("p001", "ok", 101, []),
        ("/dicom/patient-002", "rejected", 102, ["gap"]),
        ("p003", "ok", 5, ["few-slices"]),
    ]
    assert (rows[0]["air_hu"], rows[0]["tissue_hu"], rows[0]["hu_mean"]) == (-1000, 50, -601)
    assert [r["seconds"] for r in rows] == [2.0, None, 4.0]
    assert cohort["bytes"] == 3 * 10**8
    assert base64.b64decode(page.json("s0")["picture"]) == JPEG
    assert page.json("s1")["picture"] is None
    assert page.json("s2")["flags"] == ["only 5 slices"]
    assert sorted(p.name for p in out.iterdir()) == ["manifest.sqlite", "p001", "p003", "report.html"]


def test_texts_are_not_parsed_as_markup(hostile: Path) -> None:
    write_report(hostile)
    page = Page(hostile / "report.html")
    assert not [tag for tag, _ in page.tags if tag == "img"]
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None, "application/json", "application/json"]
    assert [row[0] for row in page.json("cohort")["rows"]] == [HOSTILE.replace("/", "|"), f"/dicom/{HOSTILE}"]
    assert page.json("s0")["warnings"] == [HOSTILE]
    assert HOSTILE not in (hostile / "report.html").read_text()


def test_the_policy_allows_the_embedded_script_and_style_only(hostile: Path) -> None:
    write_report(hostile)
    page = Page(hostile / "report.html")
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = {}
    for tag, text in page.contents:
        if tag.get("type") is None:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            allowed[tag["tag"]] = f"'sha256-{digest}'"
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {allowed['style']}; script-src {allowed['script']}; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not [a for _, a in page.tags for name in ("src", "style", "onclick", "onload") if name in a]
    assert [a["href"] for _, a in page.tags if "href" in a] == ["data:,"]
    text = (hostile / "report.html").read_text()
    assert re.findall(r"https?://[^\"'\s]+", text) == [
        "http://www.w3.org/2000/svg"
    ]  # a namespace, which is not fetched


def test_the_report_is_written_on_request_and_passes_verification(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 3000, (6, 16, 16)).astype(np.int16)
    write_series(tmp_path / "dicom" / "report.html" / "ct", stored, (2.0, 0.8, 0.7))
    write_series(tmp_path / "dicom" / "p2", stored, (2.0, 0.8, 0.7))
    out = tmp_path / "out"
    ran = gpuprep(
        "convert", tmp_path / "dicom" / "report.html", tmp_path / "dicom" / "p2", "--out", out, "--size", "24",
        "--index", "none", "--backend", "cpu", "--report", "--jobs", "1",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert f"report in {out}/report.html" in ran.stdout
    names = [row[0] for row in Page(out / "report.html").json("cohort")["rows"]]
    assert names == ["p2", "%72eport.html/ct"]  # escaped, because an output folder must not have the name of the report
    assert findings(out) == []
    elsewhere = tmp_path / "mine.html"
    ran = gpuprep("report", out, "--to", elsewhere)
    assert (ran.returncode, ran.stdout) == (0, f"report in {elsewhere}\n")
    assert Page(elsewhere).json("cohort")["rows"] == Page(out / "report.html").json("cohort")["rows"]


def test_errors_of_the_report_name_cause_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no manifest: give the --out of a run"):
        write_report(tmp_path)
    out = output(tmp_path / "out", [result(1)])
    with pytest.raises(RequestError, match=r"lies in .*: choose a path outside of it, or omit --to"):
        write_report(out, out / "p001" / "page.html")
    with pytest.raises(RequestError, match="there is no folder"):
        write_report(out, tmp_path / "absent" / "page.html")
    assert write_report(out, out / "report.html") == str(out / "report.html")
    assert not list(tmp_path.rglob("*.part"))


def test_a_series_without_picture_or_metrics_is_listed(tmp_path: Path) -> None:
    out = output(tmp_path / "out", [result(1, quality=None), result(2)])
    shutil.rmtree(out / "p002")
    os.unlink(out / "p001" / "preview.jpg")
    page = Page(Path(write_report(out)))
    assert [(page.json(s)["picture"], page.json(s)["quality"] is None) for s in ("s0", "s1")] == [
        (None, True),
        (None, False),
    ]


def test_the_number_of_pictures_per_page_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuprep.report.html.MAX_PICTURES", 2)
    out = output(tmp_path / "out", [result(n) for n in range(3)])
    page = Page(Path(write_report(out)))
    assert [page.json(f"s{n}")["picture"] is None for n in range(3)] == [False, False, True]
    assert page.json("cohort")["pictures"] == 2


def test_the_report_of_an_object_store_is_uploaded_to_the_store(memory: Any, tmp_path: Path) -> None:
    import gpuprep

    stored = np.random.default_rng(0).integers(0, 3000, (4, 16, 16)).astype(np.int16)
    write_series(tmp_path / "ct", stored, (2.0, 0.8, 0.7))
    gpuprep.convert(tmp_path / "ct", "memory://bucket/out", gpuprep.Recipe(size=(16, 16)), backend="cpu")
    assert write_report("memory://bucket/out") == "memory://bucket/out/report.html"
    (tmp_path / "page.html").write_bytes(memory.cat("/bucket/out/report.html"))
    page = Page(tmp_path / "page.html")
    (row,) = page.json("cohort")["rows"]
    preview = memory.cat(f"/bucket/out/{row[0]}/preview.jpg")
    assert base64.b64decode(page.json("s0")["picture"]) == preview


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium; tests that use it are skipped if it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("Chromium is absent (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for switch in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1500,1000",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=paths[1]))
    yield driver
    driver.quit()


class BrowserPage:
    """A report opened in a browser."""

    def __init__(self, driver: Any, out: Path) -> None:
        self.driver = driver
        driver.get_log("performance"), driver.get_log("browser")
        self.url = Path(write_report(out)).as_uri()
        driver.get(self.url)

    def column(self, title: str) -> Any:
        """Return the button that sorts by a column."""
        return next(button for button in self.all("thead button") if button.text.startswith(title))

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        (found,) = self.all(selector)
        return found

    def names(self) -> list[str]:
        script = "return [...document.querySelectorAll('td.series button')].map(b => b.innerText)"
        return list(self.driver.execute_script(script))

    def wait_for(self, names: list[str]) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10, 0.02).until(lambda _: self.names() == names, f"they are not {names}")

    def press(self, key: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.driver.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def requests(self) -> list[str]:
        """Return the URLs that were requested, without the page itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert self.url in urls
        return [url for url in urls if not url.startswith((self.url, "data:", "chrome:", "chrome-untrusted:"))]


def test_a_browser_sorts_filters_and_opens_details(chromium: Any, tmp_path: Path) -> None:
    label = {"name": "Heart", "value": 2, "file": "labels", "ml": 512.0}
    out = output(
        tmp_path / "out",
        [result(1, slices=300), rejected(2), result(3, slices=5), result(4, status="fixed", codes=("tilt",),
         irregularities=("leans by 5°",), labels=(label,), slices=40)],
    )  # fmt: skip
    page = BrowserPage(chromium, out)
    all_names = ["p001", "/dicom/patient-002", "p003", "p004"]
    # Sorted by source folder, like the manifest.
    page.wait_for(all_names)
    assert "4 series: 2 ok, 1 fixed, 1 rejected" in page.one("#about").text
    assert len(page.all("td.picture img")) == 3
    assert chromium.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth === 392)")
    assert len(page.all("#distributions svg")) == 8

    slices = page.column("Slices")
    slices.click()
    page.wait_for(["p003", "p004", "/dicom/patient-002", "p001"])
    assert [th.get_attribute("aria-sort") for th in page.all("thead th[aria-sort]")] == ["ascending"]
    slices.click()
    page.wait_for(["p001", "/dicom/patient-002", "p004", "p003"])
    page.column("Air peak").click()  # the rejected series has no air peak and comes last
    page.wait_for(["p001", "p003", "p004", "/dicom/patient-002"])

    page.press("/")
    page.press("patient-00")
    page.press(" gap")
    page.wait_for(["/dicom/patient-002"])
    assert page.one("#count").text == "1 of 4 series"
    page.one("#controls button[type=reset]").click()
    page.wait_for(["p001", "p003", "p004", "/dicom/patient-002"])
    for button in page.all("#statuses button"):
        if "fixed" in button.text or "rejected" in button.text:
            button.click()
    page.wait_for(["p004", "/dicom/patient-002"])
    page.one("#controls button[type=reset]").click()
    chromium.find_element("css selector", "#flag option[value=few-slices]").click()
    page.wait_for(["p003"])
    page.one("#controls button[type=reset]").click()

    page.all("td.series button")[2].send_keys("\n")
    assert page.one("dialog[open] h2").text == "p004"
    text = page.one("dialog").text
    assert "leans by 5°" in text
    assert "Heart 512 ml" in text
    assert "air 40 %" in text  # (400 · 21) of 21,000 voxels
    swatch = page.one("dialog .swatch").value_of_css_property("background-color")
    assert swatch.replace(" ", "") in ("rgb(64,196,255)", "rgba(64,196,255,1)")  # the second colour
    assert len(page.all("dialog figure svg")) == 2
    page.press("ARROW_LEFT")
    assert page.one("dialog[open] h2").text == "p003"
    assert "only 5 slices" in page.one("dialog").text
    page.press("ESCAPE")
    assert page.all("dialog[open]") == []
    assert chromium.get_log("browser") == []
    assert page.requests() == []


def test_a_browser_shows_markup_as_text(chromium: Any, hostile: Path) -> None:
    page = BrowserPage(chromium, hostile)
    page.wait_for([HOSTILE.replace("/", "|"), f"/dicom/{HOSTILE}"])
    assert f"#2\n{HOSTILE}\nrejected" in page.one("tbody").text  # the reason without the class of the error
    assert HOSTILE in [option.text.rpartition(" (")[0] for option in page.all("#flag option")]
    page.all("td.series button")[0].click()
    text = page.one("dialog").text
    assert text.count(HOSTILE) == 4  # structure, irregularity, warning, source folder
    assert page.all("img[src=x]") == []
    assert chromium.get_log("browser") == []  # no alert and no violation of the policy
    assert page.requests() == []


def test_a_browser_shows_many_series_in_pages(chromium: Any, tmp_path: Path) -> None:
    one = result(0)
    results = [replace(one, key=str(n), folder=f"p{n:03d}", source=f"/d/{n:03d}", slices=30 + n) for n in range(120)]
    page = BrowserPage(chromium, output(tmp_path / "out", results))
    page.wait_for([f"p{n:03d}" for n in range(50)])
    page.one("#next").click()
    page.wait_for([f"p{n:03d}" for n in range(50, 100)])
    assert page.one("#page").text == "51 – 100 of 120"
    assert len(page.all("td.picture img")) == 50
    page.one("#next").click()
    page.wait_for([f"p{n:03d}" for n in range(100, 120)])
    assert not page.one("#next").is_enabled()
    page.column("Slices").click()
    page.column("Slices").click()
    page.wait_for([f"p{n:03d}" for n in range(119, 69, -1)])
    chromium.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert len(page.names()) == 120
    chromium.execute_script("dispatchEvent(new Event('afterprint'))")
    assert len(page.names()) == 50
    assert chromium.get_log("browser") == []
