"""eda.py: the report as a page (self-contained, escaped, opened in a browser) and its figures."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import phantom
import pytest
import yaml
from conftest import TINY, change, write_cached_series

import common
import eda
from common import LABELS, UID
from dicom import find_series, to_lps, to_voxel

ROOT = Path(eda.__file__).parent
CFG = change(TINY, img_size=64, roi_top_mm=32.0)  # voxels of 4 x 2.5 x 2.5 mm, a box of 32 x 160 x 160 mm
AFFINE = np.array([[0, 0, 2.5, 0], [0, 2.5, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1]])
CENTRE = (3.5, 31.5, 31.5)
HOSTILE = '<script>alert(1)</script> & "quoted" <img src=x onerror=alert(2)>'
UIDS = [f"1.{i}" for i in range(1, 7)] + [f"2.{i}" for i in range(10)]
BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
INDEX = {"modality": "CT", "plane": "axial", "age": 50, "num_slices": 160, "slice_mm": 1.0, "row_mm": 0.5}
INDEX |= {"sex": "F", "status": "ok", "reason": "", "notes": "", "thickness_mm": 1.0, "coverage_mm": 160.0}
SEVEN = [  # ACom twice, left MCA once
    {"uid": "1.1", "labels": {6}, "points": [(6, 4, 20, 31.5)]},
    {"uid": "1.2", "labels": {6, 4}, "points": [(6, *CENTRE), (4, 4, 30, 50)]},
    {"uid": "1.3", "plane": "coronal"},
    {"uid": "1.4", "kind": "MRA", "status": "doubtful", "reason": "air is the brightest value"},
    {"uid": "1.5", "kind": "MRA"},
    {"uid": "1.6", "kind": "MRI T2", "age": ""},
    {"uid": "1.7", "status": "failed", "reason": "no slice could be decoded", "plane": ""},
]


def write_set(cache: Path, rows: list[dict], **train_columns) -> None:
    """A cache of series given as {uid, kind, labels {k}, points [(k, z, y, x)], columns of index.csv}."""
    cache.mkdir(parents=True, exist_ok=True)
    index, train = [], []
    for row in rows:
        row = {"kind": "CTA", "labels": set(), "points": []} | INDEX | row
        uid, labels, kind, points = (row.pop(name) for name in ("uid", "labels", "kind", "points"))
        counts = {"num_points": len(points), "points_inside": len(points)}
        index.append({UID: uid, "patient": f"secret{uid}"} | counts | row)
        truth = {name: int(k in labels or (k == 13 and bool(labels))) for k, name in enumerate(LABELS)}
        train.append({UID: uid, "Modality": kind} | truth)
        if row["status"] != "failed":
            write_cached_series(cache, uid, CFG, points, len(index))
    pd.DataFrame(index).to_csv(cache / "index.csv", index=False)
    pd.DataFrame(train).assign(**train_columns).to_csv(cache / "train.csv", index=False)


def write_runs(outputs: Path, uids: list[str], strength: float = 2.0, **settings) -> None:
    """Two folds of a run: half of the series have an ACom aneurysm; a locator has proposals and weights."""
    for fold in (0, 1):
        cfg = change(CFG, fold=fold, num_folds=2, **settings)
        folder, fold_uids = outputs / cfg.run_name, uids[fold::2]
        folder.mkdir(parents=True)
        truth = np.zeros((len(fold_uids), 14))
        truth[: len(truth) // 2, [6, 13]] = 1
        noise = np.random.default_rng(fold).normal(size=truth.shape)
        table = pd.DataFrame(common.sigmoid(strength * (2 * truth - 1 + noise)), columns=list(LABELS))
        table[[f"label {name}" for name in LABELS]] = truth
        table = table.assign(**{UID: fold_uids, "patient": fold_uids, "modality": "CTA", "plane": "axial"})
        table.to_csv(folder / "oof.csv", index=False)
        log = {"epoch": [1, 2], "train_loss": [0.9, 0.5], "val_loss": [0.9, 0.6], "wauc": [0.5, 0.6]}
        pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
        points = [{"specificity": 0.9, "threshold": 0.61, "sensitivity": 0.5, "low": None, "draws_used": 0}]
        metrics = {"operating_points": points, "froc": [{"false_positives": 2.0, "sensitivity": None}]}
        common.write_json(folder / "metrics.json", metrics | {"is_nearly_constant": strength < 0.01})
        (folder / "config.yaml").write_text(yaml.safe_dump(common.config_to_dict(cfg)))
        if cfg.task == "locate":
            places = pd.DataFrame({UID: fold_uids, "score": 0.9, "label": 6})
            places[["x_mm", "y_mm", "z_mm"]] = to_lps([CENTRE], AFFINE)[0]
            places.to_csv(folder / "proposals.csv", index=False)
            meta = {"prior": [0.1] * 14, "decoys": [], "val_uids": [], "locator": ""}
            common.save_checkpoint(folder / "best_ema.safetensors", common.build_model(cfg), cfg, meta)


class Page(html.parser.HTMLParser):
    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.attributes, words = set(), [], []
        self.handle_data = words.append
        self.feed(re.sub(r"<style.*?</style>", "", markup, flags=re.S))
        self.text = " ".join(" ".join(words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes += attrs


def report(folder: Path) -> Page:
    return Page(eda.make_page(folder / "cache", folder / "dicoms", folder / "outputs"))


def run_script(folder: Path, *options: str, script: str = "eda.py") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> str:
    """The report on a cache with two damaged volumes, a classifier that learned nothing and a locator."""
    folder = tmp_path_factory.mktemp("everything")
    write_set(folder / "cache", SEVEN + [{"uid": uid} for uid in [*UIDS[6:], "3.1", "3.2"]])
    (folder / "cache" / "3.1.safetensors").write_bytes(b"not a volume")
    (folder / "cache" / "3.2.safetensors").unlink()
    (folder / "cache" / "faults.csv").write_text("fault,case\nA point whose label is 0,1.5\n")
    write_runs(folder / "outputs", UIDS, strength=0.001)
    write_runs(folder / "outputs", UIDS, task="locate")
    done = run_script(folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_refers_to_nothing_outside_of_it(everything):
    page = Page(everything)
    assert everything.startswith("<!DOCTYPE html>") and {"img", "table", "nav"} <= page.tags
    assert not {"script", "link", "iframe", "object", "embed", "base"} & page.tags
    ids = {value for name, value in page.attributes if name == "id"}
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith("data:image/") or value.removeprefix("#") in ids, (name, value[:80])
    assert "@import" not in everything and "url(" not in everything and len(everything.encode()) < 5e6


def test_the_top_says_what_was_run_what_came_out_and_what_to_look_at(everything):
    top, first = Page(everything).text.split("The results Runs compared")[0].split("Look at this first")
    assert "python eda.py --cache cache --src dicoms --outputs outputs; 20" in top and "torch" in top
    assert "series: 19, patients: 19, ok: 17, doubtful: 1, failed: 1" in top
    assert "pooled; runs: 4, series: 16, patients: 16" in top
    assert "Not in --cache: 0." in top and "–: fewer than 5 patients" in everything
    assert first.count("NEARLY THE SAME FOR ALL SERIES") == 2 and "test_efficientnet_seed0_fold1" in first
    assert "Series that failed: 1; first {'SeriesInstanceUID': '1.7', 'reason': 'no slice" in first
    assert "Doubtful volumes: 1; first {'SeriesInstanceUID': '1.4', 'reason': 'air is" in first
    assert "Unreadable volumes: 2; first {'SeriesInstanceUID': '3.1', 'unreadable': " in first
    assert "first {'fault': 'A point whose label is 0" in first
    text, cases = Page(everything).text.split("The hardest cases")[-2:]
    assert cases.count("Slab, plane 4 of 0 to 7") == cases.count("Heat map") == 12  # a place at z = 3.5
    assert "safetensors" not in cases and "secret" not in everything  # no patient
    assert "1.2, ok: slices 160, 1.00 mm apart" in text and text.count("Points, mm ") == 3


def test_what_is_absent_or_broken_is_said_and_the_rest_goes_on(tmp_path):
    write_set(tmp_path / "cache", [{"uid": "1.1"}])
    (tmp_path / "cache" / "train.csv").unlink()
    text = report(tmp_path).text
    for line in ("series: 1, patients: 1", "Positive series of 0 with labels", "No annotated points"):
        assert line in text and "Before: the whole head" not in text
    assert "no finished training runs in " in text and "The volume alone is shown" in text
    write_set(tmp_path / "cache", [{"uid": "1.1", "status": "failed", "reason": "empty folder"}])
    text = report(tmp_path).text
    assert "empty folder" in text and "No readable volume" in text
    write_runs(tmp_path / "outputs", UIDS[:6])
    for name, content in (("train.csv", '"'), ("index.csv", "a,b\n1,2\n"), ("index.csv", "")):
        (tmp_path / "cache" / name).write_text(content)
        text = report(tmp_path).text
        assert f"no data: {tmp_path}/cache/{name}: " in text and "Not in --cache: 5." in text
    (tmp_path / "cache" / "index.csv").unlink()
    done = run_script(tmp_path, "--cache", "wrong")
    assert done.returncode == 0 and "no data: wrong/index.csv: no such file; expected" in done.stderr
    assert "python eda.py --cache wrong --src dicoms" in done.stdout


def test_runs_that_are_unfinished_or_broken_are_named_and_left_out(tmp_path):
    write_runs(tmp_path, UIDS)
    write_runs(tmp_path, UIDS, task="locate")
    (tmp_path / "test_efficientnet_seed0_fold0" / "oof.csv").write_text(f"{UID},patient\n1,2\n")
    (tmp_path / "test_efficientnet_seed0_fold1" / "metrics.json").write_text("{}")
    (tmp_path / "locator_test_efficientnet_seed0_fold0" / "proposals.csv").write_text("")
    runs, faults = eda.read_runs(tmp_path)
    assert all(set(table["run"]) == {"locator_test_efficientnet_seed0_fold1"} for table in runs.values())
    assert len(faults) == 3 and all("is left out" in fault for fault in faults)


def test_nothing_to_report_on_is_one_line_and_a_limited_report_says_so(tmp_path):
    done = run_script(tmp_path, "--limit", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"eda\.py: nothing to report on.*\n", done.stderr)
    write_set(tmp_path / "cache", SEVEN)
    page = run_script(tmp_path, "--limit", "2").stdout
    assert "--limit 2;" in page and "series: 2, patients: 2, ok: 2" in page


def test_text_from_files_is_escaped(tmp_path):
    row = {"uid": "1.1", "plane": HOSTILE, "notes": HOSTILE, "modality": f"{HOSTILE}$x^{{"}
    write_set(tmp_path / "cache", [row, {"uid": "1.2", "status": "failed", "reason": HOSTILE}])
    (tmp_path / "cache" / "train.csv").unlink()
    write_runs(tmp_path / "outputs", ["1.1", HOSTILE, "3.1", "3.2"])
    folder = tmp_path / "outputs" / "test_efficientnet_seed0_fold0"
    folder.rename(folder.with_name("<b onclick=alert(3)>_seed0_fold0"))
    with matplotlib.rc_context(eda.CHART_STYLE):
        page = report(tmp_path)
    assert page.text.count("<script>") >= 5  # as words
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]


def test_series_labels_and_points_are_counted_and_placed(tmp_path):
    write_set(tmp_path, SEVEN)
    table, points = eda.read_cache(tmp_path)
    text = Page(eda.data_section(table)).text
    assert "plane CTA MRA MRI T2 All axial 2 2 1 5 coronal 1 0 0 1 unknown 1 0 0 1 All 4 2 1 7" in text
    assert "Left Middle Cerebral Artery 1 0 0 " in text and "Anterior Communicating Artery 2 0 0 " in text
    places = points.set_index([UID, "artery"])[eda.SIDES]
    assert places.loc[("1.2", LABELS[6])].tolist() == [80, 80, 16]  # the middle of a box of 160 x 160 x 32 mm
    # The middle of slab 4 of 8 of 4 mm lies 14 mm below the top; 50.5 columns and 30.5 rows of 2.5 mm.
    assert places.loc[("1.2", "Middle Cerebral Artery")].tolist() == [126.25, 76.25, 14]


def test_points_outside_other_ages_and_kinds_of_notes_are_listed(tmp_path):
    notes = ["a; gap of 3.5 mm (2 images)", "gap of 7 mm (1 images)", "no (0020,0032) in 3 files"]
    rows = [{"uid": f"3.{i}", "notes": text, "age": 50 - i} for i, text in enumerate(notes)]
    rows.append({"uid": "3.4", "sex": "M", "points": [(6, 9, 31, 31)], "points_inside": 0})
    write_set(tmp_path, rows, PatientAge=50, PatientSex="Female")
    troubles = eda.find_troubles(eda.read_cache(tmp_path)[0], tmp_path)
    assert troubles["Annotated points left out or outside the box"].to_numpy().tolist() == [["3.4", 1, 0]]
    assert troubles["Age or sex unlike train.csv"][UID].tolist() == ["3.1", "3.2", "3.4"]
    counts = troubles["Kinds of repairs and assumptions"].to_numpy().tolist()
    assert counts == [["gap of 3.5 mm (2 images)", 2], ["a", 1], ["no (0020,0032) in 3 files", 1]]


def test_results_are_those_of_the_metric_with_the_draws_they_stand_on(tmp_path):
    for settings in ({}, {"strength": 0.5, "tag": "weak", "ensemble_weight": 3.0}):
        write_runs(tmp_path, [f"1.{i}" for i in range(40)], **settings)
    runs, column = eda.read_runs(tmp_path)[0], eda.PROBS[6]
    pooled = eda.pool_oof(runs["oof"])
    strong, weak = runs["oof"].set_index(UID).loc["1.4", column]
    assert strong != weak
    assert pooled.set_index(UID).loc["1.4", column] == pytest.approx((strong + 3 * weak) / 4)
    truth, probs = pooled[LABELS[6]], pooled[column]
    pairs = [(p > q) + 0.5 * (p == q) for p in probs[truth == 1] for q in probs[truth == 0]]
    result = common.score(pooled, pooled[eda.PROBS].to_numpy(), 200)
    acom = result["per_label"][LABELS[6]]
    assert acom["auc"] == pytest.approx(np.mean(pairs))
    rows = eda.pool_oof(runs["oof"].query("group == 'test_efficientnet_weak'"))
    group = common.score(rows, rows[eda.PROBS].to_numpy())
    text = Page(eda.results_section(runs, result)).text
    assert f"{LABELS[6]} {acom['auc']:.4g} {acom['low']:.4g} {acom['high']:.4g} 200 20" in text
    assert f"{LABELS[0]} – – – 0 0" in text  # one class: no AUC, no interval
    assert f"test_efficientnet_weak {common.describe_wauc(group)}" in text
    assert "test_efficientnet_seed0_fold0 0.9 0.61 0.5 – 0 " in text  # what metrics.json has as null
    assert "test_efficientnet_seed0_fold0 2 – " in text and "None" not in text
    assert "–: fewer than 5 patients with or without, a class is missing" in text


def test_phantoms_are_shown_from_their_files_where_the_volume_lies(tmp_path):
    phantom.make_set(tmp_path / "dicoms", series=4, seed=3, matrix=64)
    options = ("--src", "dicoms", "--dst", "cache", "--set", "img_size=64")
    assert run_script(tmp_path, *options, script="preprocess.py").returncode == 0
    assert report(tmp_path).text.count("Before: the whole head") == 4
    for uid in find_series(tmp_path / "dicoms")[0]:
        scan = eda.read_scan(uid, tmp_path / "cache")
        corners = to_voxel(scan.box, eda.read_whole_head(scan, uid, tmp_path / "dicoms").affine)
        assert (corners[0] < corners[1]).all() and corners[1, 0] == pytest.approx(255.5, abs=3)  # equal tops


def test_a_projection_is_a_maximum_near_the_place_with_sides_a_ring_and_the_box(monkeypatch):
    monkeypatch.setattr(eda, "show_chart", lambda caption, axes: axes)
    voxels = np.zeros((8, 64, 64), np.uint8)
    voxels[4, 30, 20], voxels[4, 60, 40] = 200, 255  # 30 rows apart: 75 mm
    box = to_lps([(-0.5, -0.5, -0.5), (7.5, 63.5, 63.5)], AFFINE)
    *points, place = to_lps([(4, 30, 20), (4, 60, 40), (4, 31, 0)], AFFINE)
    axes = eda.show_plane("", eda.Scan(voxels, AFFINE, points, box, place, {}), 1, place, 20.0)
    image, (ring,) = np.asarray(axes.images[0].get_array()), axes.lines
    assert image[4, 20] == 200 and image.max() == 200  # the other spot lies beyond 20 mm
    assert np.ravel(ring.get_data()) == pytest.approx([20, 4])  # column, slab
    assert (axes.get_title("left"), axes.get_title("right")) == ("R", "L")
    assert axes.patches[0].get_bbox().bounds == pytest.approx((-0.5, -0.5, 64, 8))
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # head up


PROBE = """<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)], box = (e) => e.getBoundingClientRect();
  const wide = all("nav, nav a, main *").filter((e) => !e.closest(".table") && box(e).right > innerWidth + 1);
  parent.postMessage({ images: all("img").length, broken: all("img").filter((e) => !e.naturalWidth).length,
    narrow: all("img").filter((e) => box(e).width < 250).length, wide: wide.length, inner: innerWidth, scroll:
    document.documentElement.scrollWidth, back: getComputedStyle(document.body).backgroundColor }, "*");
});
</script>"""
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --dump-dom --disable-quic "
FLAGS += "--disable-background-networking --virtual-time-budget=60000 --window-size=1400,2100"


def browse(page: str, folder: Path, width: int, scheme: int) -> dict:
    """What the probe sees in a frame of that width (windows are wider); scheme 0: dark, 1: light."""
    (folder / "page.html").write_text(page + PROBE)
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:2000px"></iframe>'
    listen = "onmessage = (e) => { document.querySelector('pre').textContent = JSON.stringify(e.data); }"
    (folder / "frame.html").write_text(f"<pre></pre><script>{listen}</script>{frame}")
    flags = f"{FLAGS} --user-data-dir={folder}/profile --blink-settings=preferredColorScheme={scheme}"
    command = [BROWSER, *flags.split(), f"file://{folder}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    answer = re.search(r"<pre>(.+?)</pre>", done.stdout, flags=re.S)
    assert answer, f"the browser said nothing: {done.stderr[-500:]}"
    return json.loads(answer[1])


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")
@pytest.mark.parametrize(("width", "scheme", "back"), [(1280, 1, "255"), (390, 0, "21")])
def test_a_browser_shows_all_of_it_in_width_and_colours(everything, tmp_path, width, scheme, back):
    seen = browse(everything, tmp_path, width, scheme)
    assert seen["inner"] == width >= seen["scroll"] and seen["wide"] == 0
    assert seen["images"] > 20 and seen["broken"] == seen["narrow"] == 0
    assert seen["back"].startswith(f"rgb({back},")
    bad = '<main><p style="width:1300px">x</p><img src="data:image/png;base64,AA"></main>'
    seen = browse(f"<body>{bad}</body>", tmp_path, width, scheme)  # the probe sees what is wrong
    assert seen["wide"] and (seen["images"], seen["broken"]) == (1, 1) and seen["scroll"] > width
