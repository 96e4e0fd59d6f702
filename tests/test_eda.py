"""eda.py: the report as a page (balanced, self-contained, escaped, opened in a browser) and its figures."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import phantom
import pytest
import yaml
from conftest import TINY

import common
import eda
from common import LABELS, LOCATIONS, UID

SCRIPT = Path(eda.__file__)
CFG = replace(TINY, img_size=64, base_slices=8, roi_mm=160.0)  # voxels of 20 x 2.5 x 2.5 mm
CENTRE = (3.5, 31.5, 31.5)
VOID = {"meta", "br", "hr", "img", "input", "link", "col", "area", "base", "wbr", "source", "embed"}
HOSTILE = '<script>alert(1)</script> & "quoted" <img src=x onerror=alert(2)>'
BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)


# --- synthetic input ----------------------------------------------------------------------------------------


def write_series(cache: Path, uid: str, points: list, shape: tuple = (8, 64, 64), bright: int = 100) -> None:
    """A cached ball with the given points (label, z, y, x); noise of its own makes it unlike the others."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(list(uid.encode())).integers(0, 20, shape)
    volume = np.where(z**2 + y**2 + x**2 < 0.8, bright + noise, 0).astype(np.uint8)
    rows = np.array(points, np.float32).reshape(-1, 4)
    affine = np.diag([20.0, 2.5, 2.5])[:, ::-1]
    affine = np.vstack([np.column_stack([affine, [-80.0, -80, 0]]), [0, 0, 0, 1]]).tolist()
    meta = {"spacing_mm": [20.0, 2.5, 2.5], "affine": affine, "settings": common.volume_settings(CFG)}
    common.save_volume(cache / f"{uid}.safetensors", volume, rows[:, 1:], rows[:, 0].astype(np.int64), meta)


def write_set(cache: Path, rows: list[dict]) -> None:
    """A cache of series given as {uid, kind, labels {k}, points [(k, z, y, x)], columns of index.csv}."""
    cache.mkdir(parents=True, exist_ok=True)
    index, train = [], []
    for row in rows:
        row = {"kind": "CTA", "labels": set(), "points": [], "status": "ok", "bright": 100} | row
        uid, labels, points = row.pop("uid"), row.pop("labels"), row.pop("points")
        kind, bright = row.pop("kind"), row.pop("bright")
        if row["status"] == "ok":
            write_series(cache, uid, points, bright=bright)
        usual = {"reason": "", "modality": "CT", "plane": "axial", "patient": f"secret{uid}", "age": "050Y"}
        usual |= {"sex": "F", "num_slices": 160, "rows": 512, "cols": 512, "slice_mm": 1.0, "row_mm": 0.5}
        usual |= {"col_mm": 0.5, "thickness_mm": 1.0, "coverage_mm": 160.0, "num_points": len(points)}
        usual |= {"transfer_syntax": "1.2.840.10008.1.2.1", "points_inside": len(points), "notes": ""}
        index.append({UID: uid} | usual | {"seconds": 1, "source": f"files of {uid}"} | row)
        named = {name: int(k in labels or (k == 13 and bool(labels))) for k, name in enumerate(LABELS)}
        train.append({UID: uid, "PatientAge": 61, "PatientSex": "Female", "Modality": kind} | named)
    pd.DataFrame(index).to_csv(cache / "index.csv", index=False)
    pd.DataFrame(train).to_csv(cache / "train.csv", index=False)


def six_series() -> list[dict]:
    """Three CTA, two MRA, one T2; ACom twice, left MCA once; three points; a coronal scan; one failure."""
    return [
        {"uid": "1.1", "labels": {6}, "points": [(6, 4, 20, 31.5)]},
        {
            "uid": "1.2",
            "labels": {6, 4},
            "points": [(6, *CENTRE), (4, 4, 30, 50)],
            "notes": "a; gap of 3.5 mm",
        },
        {"uid": "1.3", "plane": "coronal", "notes": "gap of 7 mm"},
        {"uid": "1.4", "kind": "MRA", "modality": "MR", "slice_mm": 3.0},
        {"uid": "1.5", "kind": "MRA", "modality": "MR", "slice_mm": 3.0, "thickness_mm": 3.0},
        {"uid": "1.6", "kind": "MRI T2", "modality": "MR", "age": ""},
        {"uid": "1.7", "status": "failed", "reason": "1.7: no slice could be decoded", "plane": ""},
    ]


def write_outputs(outputs: Path, uids: list[str], name: str = "net", strength: float = 2.0, **over) -> None:
    """Two folds of a run: half of the series have an ACom aneurysm; a locator has proposals and weights."""
    for fold in (0, 1):
        cfg = replace(CFG, model_name=name, fold=fold, num_folds=2, **over)
        folder, own = outputs / cfg.run_name, uids[fold::2]
        folder.mkdir(parents=True)
        truth = np.zeros((len(own), 14))
        truth[: len(own) // 2, [6, 13]] = 1
        rng = np.random.default_rng(fold)
        probs = 1 / (1 + np.exp(-(strength * truth - 1 + rng.normal(size=truth.shape))))
        oof = pd.DataFrame({UID: own, "patient": own, "modality": "CTA", "plane": "axial"})
        guesses = pd.DataFrame(probs, columns=list(LABELS))
        known = pd.DataFrame(truth, columns=[f"label {n}" for n in LABELS])
        pd.concat([oof, guesses, known], axis=1).to_csv(folder / "oof.csv", index=False)
        log = [
            {"epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e, "wauc": 0.5 + e / 20} for e in (1, 2, 3)
        ]
        pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
        metrics = {
            "wauc": 0.7 + fold / 10,
            "oracle_wauc": 0.9,
            "leak": None,
            "seconds": 90.0,
            "precision": "no",
        }
        (folder / "metrics.json").write_text(json.dumps(metrics | {"recall_10mm": [0.75, 0.5, 0.9]}))
        (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(cfg)))))
        if cfg.task == "locate":
            places = pd.DataFrame({UID: own, "z": 4.0, "y": 20.0, "x": 31.5, "score": 0.9, "label": 6})
            places.to_csv(folder / "proposals.csv", index=False)
            common.save_checkpoint(folder / "best_ema.safetensors", common.build_model(cfg), cfg, {})


def write_everything(folder: Path) -> list[str]:
    """Cache, outputs with a classifier and a locator, and a submission; the options that name them."""
    rows = six_series() + [{"uid": f"2.{i}"} for i in range(10)]
    rows.append({"uid": "2.99", "coverage_mm": 30.0})  # an outlier
    write_set(folder / "cache", rows)
    uids = [row["uid"] for row in rows if row.get("status") != "failed"]
    write_outputs(folder / "outputs", uids)
    write_outputs(folder / "outputs", uids, "test_efficientnet", task="locate", max_localizer_crops=0)
    submission = pd.DataFrame(np.full((len(uids), 14), 0.25), columns=list(LABELS))
    submission.insert(0, UID, uids)
    submission.to_csv(folder / "submission.csv", index=False)
    options = [f"--{name}={folder / name}" for name in ("cache", "outputs")]
    return [*options, f"--submission={folder / 'submission.csv'}", f"--src={folder}"]


# --- the page as a page -------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Checks that tags balance; collects tags, attributes, the text, and tooltips and words per figure."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.figures = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if "figure" in self.open:
            if self.open[-1] == "b":
                self.current = self.figures.setdefault(data, [])
            self.current.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def report(*options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The report on everything that can be there, made as a user makes it."""
    folder = tmp_path_factory.mktemp("whole")
    done = report(*write_everything(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_balanced_html_that_refers_to_nothing_outside(whole):
    page = Page(whole)
    assert whole.startswith("<!DOCTYPE html>") and {"svg", "image", "table", "figure"} <= set(page.tags)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:80])
        assert not name.startswith("on")
    assert "@import" not in whole and "url(" not in whole
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", whole)
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for _, name, value in page.attributes if name == "href" and value[0] == "#"} <= ids


def test_every_drawing_has_a_title_and_the_page_stays_small(whole):
    figures = re.findall(r'<svg viewBox="[^"]*" role="img">(.{0,40})', whole)
    assert len(figures) > 30 and all(start.startswith("<title>") for start in figures)
    assert len(whole.encode()) < 20e6


def test_no_patient_is_on_the_page(whole):
    assert "secret" not in whole


def test_stdout_carries_the_page_even_if_a_library_prints(tmp_path):
    write_set(tmp_path / "cache", six_series()[:2])
    noisy = "def loud(*paths):\n  print('noise'); os.system('echo noise'); return read(*paths)\n"
    command = (
        f"import os, eda; read = eda.read_table\n{noisy}eda.read_table = loud; raise SystemExit(eda.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": SCRIPT.parent},
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("noise") == 2 and done.stdout.startswith("<!DOCTYPE") and "noise" not in done.stdout
    )


def test_a_cache_alone_is_enough_and_what_is_absent_is_said(tmp_path):
    rows = [{"uid": "1.1"}, {"uid": "1.2", "kind": "MRA"}]
    write_set(tmp_path / "cache", rows)
    (tmp_path / "cache" / "train.csv").unlink()
    done = report(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = Page(done.stdout).text
    for line in (
        "No labels:",
        "No annotated points",
        "No training runs",
        "No vessel masks",
        "infer.py > submission.csv",
    ):
        assert line in text
    assert "Not found at --src" in text and "All slabs." in text


def test_a_cache_of_nothing_but_failures_is_reported(tmp_path):
    write_set(tmp_path / "cache", [{"uid": "1.1", "status": "failed", "reason": "empty folder"}])
    done = report(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "empty folder" in Page(done.stdout).text and "No readable volume" in done.stdout


def test_a_damaged_volume_is_listed_and_the_rest_goes_on(tmp_path):
    write_set(tmp_path / "cache", six_series())
    (tmp_path / "cache" / "1.4.safetensors").write_bytes(b"not a volume")
    (tmp_path / "cache" / "1.5.safetensors").unlink()
    done = report(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Series that could not be used: 3" in Page(done.stdout).text


def test_nothing_to_report_on_is_one_line_and_exit_1(tmp_path):
    done = report(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and len(done.stderr.splitlines()) == 1


def test_a_named_path_that_does_not_exist_is_wrong_usage(tmp_path):
    done = report("--cache", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "--cache nowhere: does not exist" in done.stderr


def test_text_from_files_is_escaped(tmp_path):
    rows = [
        {"uid": "1.1", "kind": HOSTILE, "plane": HOSTILE, "sex": HOSTILE, "notes": HOSTILE, "age": HOSTILE}
    ]
    rows[0] |= {"transfer_syntax": HOSTILE, "labels": {6}, "points": [(6, *CENTRE)]}
    rows += [{"uid": "1.2", "status": "failed", "reason": HOSTILE}, {"uid": HOSTILE, "status": "failed"}]
    write_set(tmp_path / "cache", rows)
    table = pd.read_csv(tmp_path / "cache" / "train.csv").assign(PatientSex=HOSTILE, PatientAge=HOSTILE)
    table.to_csv(tmp_path / "cache" / "train.csv", index=False)
    write_outputs(tmp_path / "outputs", ["1.1", "1.2", "3.1", HOSTILE])
    folder = tmp_path / "outputs" / "<b onclick=alert(3)>_seed0_fold0"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"precision": "<i>", "wauc": 0.5}')
    (tmp_path / "outputs" / "broken").mkdir()
    (tmp_path / "outputs" / "broken" / "metrics.json").write_text(f"{{{HOSTILE}")
    (tmp_path / "submission.csv").write_text(f"{UID},{HOSTILE}\n1.1,2\n")
    done = report(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert page.text.count("<script>") >= 5  # as words
    assert not {"script", "img", "i"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_odd_values_break_no_chart(tmp_path):
    """Nothing but zeros, nan or infinity; an image one pixel wide; one epoch; no row at all."""
    write_outputs(tmp_path, [f"1.{i}" for i in range(8)])
    for name, row in (("net_seed0_fold0", "1,0,nan,inf"), ("net_seed0_fold1", "1,0,,")):
        (tmp_path / name / "log.csv").write_text(f"epoch,train_loss,val_loss,wauc\n{row}\n")
    runs, faults = eda.read_runs(tmp_path)
    assert len(runs) == 2 and not faults
    figures = eda.training_figures({"net": runs})
    values = pd.Series([np.inf, np.nan, 3.0])
    figures.append(eda.histogram("One.", "", values, pd.Series(["CTA"] * 3), ["CTA"], "mm"))
    figures.append(eda.histogram("None.", "", values[:2], pd.Series(["CTA"] * 2), ["CTA"], "mm"))
    figures.append(eda.bars("No bars.", "", [], []))
    figures += [
        eda.pane("thin", np.zeros((4000, 1), np.uint8), (1.0, 0.1)),
        eda.pane("flat", np.zeros((1, 9)), (1, 1)),
    ]
    page = Page("".join(figures))
    assert "nan" not in "".join(figures) and "inf" not in "".join(figures)
    assert page.text.count("No series") == 2 and "CTA: 1" in page.text


# --- its figures against hand-counted values ----------------------------------------------------------------


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("six")
    write_set(folder / "cache", six_series())
    done = report(cwd=folder)
    assert done.returncode == 0, done.stderr
    return Page(done.stdout)


def bars_of(page: Page, title: str) -> set[str]:
    """Tooltips of a figure's bars, without the figure's own words."""
    return {word for word in page.figures[title] if re.search(r": \d+( from .*)?$", word)}


def test_series_are_counted_by_modality_plane_sex_and_age(six):
    assert "7 series of 7 patients, 6 of them cached." in six.text
    assert bars_of(six, "Series by modality.") == {"CTA, CTA: 4", "MRA, MRA: 2", "MRI T2, MRI T2: 1"}
    planes = {"axial, CTA: 2", "coronal, CTA: 1", "unknown, CTA: 1", "axial, MRA: 2", "axial, MRI T2: 1"}
    assert bars_of(six, "Series by plane.") == planes
    assert bars_of(six, "Series by sex.") == {"Female, CTA: 4", "Female, MRA: 2", "Female, MRI T2: 1"}
    assert "Median 61; 0 series do not state it. Not an input." in six.text


def test_prevalence_and_points_per_series_are_counted(six):
    figure = six.figures["Prevalence of the labels."]
    assert bars_of(six, "Prevalence of the labels.") == {"ACom, CTA: 2", "L MCA, CTA: 1", "Present, CTA: 2"}
    assert figure.count("2 (33 %)") == 2 and figure.count("1 (17 %)") == 1 and figure.count("0 (0 %)") == 11
    points = {"0, CTA: 1", "1, CTA: 1", "2, CTA: 1", "0, MRA: 2", "0, MRI T2: 1"}
    assert bars_of(six, "Annotated points per series.") == points


def test_shapes_say_what_they_mean_for_a_slab(six):
    assert "In 33 % of the series slices lie more than 2 mm apart" in six.text  # 2 of 6
    assert "In 17 % of the series a slice is thicker than 2 mm" in six.text  # 1 of 6
    assert "A slab is as thick as 20.0 slices (median)" in six.text  # 20 mm of 1 mm
    assert "fills 0.1 slabs and 1 pixels, one of 10 mm 0.5 slabs and 4 pixels" in six.text  # 20 and 2.5 mm
    assert "Median 20.0 mm." in six.text
    spacing = bars_of(six, "Distance between slices.")
    assert {re.sub(" from.*", "", bar) for bar in spacing} == {"CTA: 3", "MRA: 2", "MRI T2: 1"}
    assert bars_of(six, "Transfer syntax.") >= {"Explicit VR Little Endian, CTA: 3"}
    assert bars_of(six, "Matrix size.") >= {"512 × 512, MRA: 2"}


def test_locations_found_together_are_counted(tmp_path):
    write_set(tmp_path, six_series())
    table, _ = eda.read_table(tmp_path, tmp_path)
    page = Page(eda.cooccurrence_table(table[table["status"] == "ok"]))
    cells = [word for word in page.words if word == "·" or word.isdigit()]
    counts = np.array([0 if cell == "·" else int(cell) for cell in cells]).reshape(13, 13)
    expected = np.zeros((13, 13), int)
    expected[6, 6], expected[4, 4], expected[4, 6], expected[6, 4] = 2, 1, 1, 1
    assert (counts == expected).all()


def test_points_stand_in_millimetres_from_the_middle_and_the_top(tmp_path):
    write_set(tmp_path, six_series())
    _, points = eda.read_table(tmp_path, tmp_path)
    places = points.set_index([UID, "label"])[["x_mm", "y_mm", "depth_mm"]]
    assert places.loc[("1.2", 6)].tolist() == [0, 0, 80]  # the middle of a box 160 mm deep
    # slab 4 of 8 of 20 mm lies 60 to 80 mm below the top; 18.5 columns left, 1.5 rows in front of the middle
    assert places.loc[("1.2", 4)].tolist() == [46.25, -3.75, 70]


def test_ages_are_read_in_every_form():
    assert [eda.years(text) for text in ("086Y", "61", "61.0", "006M")] == [86, 61, 61, 0.5]
    assert np.isnan(eda.years("unknown")) and np.isnan(eda.years(""))


def test_what_went_wrong_is_found_and_counted(tmp_path):
    rows = [{"uid": f"3.{i}"} for i in range(10)]
    rows[0] |= {"coverage_mm": 20.0}  # far from 160
    rows[1] |= {"bright": 230}
    rows[2] |= {"labels": {6}}  # labelled, without a point
    rows[3] |= {"points": [(6, *CENTRE)]}  # a point, without its label
    rows[4] |= {"labels": {4}, "points": [(4, 4, 30, 10)]}  # left, but (31.5 - 10) 2.5 = 54 mm to the right
    rows[5] |= {"labels": {4}, "points": [(4, 4, 30, 28)]}  # 9 mm to the right: may be askew
    rows[6] |= {"labels": {6}, "points": [(6, 9, 31, 31)], "num_points": 1, "points_inside": 0}
    rows[7] |= {"source": "files of 3.8"}
    write_set(tmp_path, [*rows, *six_series()])
    shutil.copy(tmp_path / "3.8.safetensors", tmp_path / "3.9.safetensors")
    table, points = eda.read_table(tmp_path, tmp_path)
    ok = table[table["status"] == "ok"]
    far = [(row["series"], row["what"], row["value"]) for row in eda.find_outliers(ok)]
    assert ("3.0", "Coverage along the slices", "20") in far
    assert {uid for uid, _, _ in far} == {"3.0", "3.1"}
    found = {(row["series"], row["what"]) for row in eda.contradictions(ok, points)}
    acom, mca = LOCATIONS[6], LOCATIONS[4]
    assert found == {
        ("3.2", f"{acom} is labelled, but has no point"),
        ("3.3", f"a point in {acom}, whose label is 0"),
        ("3.4", f"a point in {mca} lies 54 mm to the right of the middle"),
    }
    assert eda.find_outside(ok) == [{"series": "3.6", "outside": 1}]
    duplicates = {(row["series"], row["why"]) for row in eda.find_duplicates(ok)}
    assert duplicates == {("3.8 = 3.9", "the same image"), ("3.7 = 3.8", "files of the same names and sizes")}
    assert eda.count_notes(ok) == [
        {"kind": "gap of n mm", "series": 2, "for example": "gap of 3.5 mm"},
        {"kind": "a", "series": 1, "for example": "a"},
    ]


def test_presence_without_a_location_is_a_contradiction(tmp_path):
    write_set(tmp_path, [{"uid": "1.1", "labels": {13}}])
    table, points = eda.read_table(tmp_path, tmp_path)
    assert [row["what"] for row in eda.contradictions(table, points)] == [
        "Aneurysm Present is 1, but 0 locations are labelled"
    ]


def test_pooled_predictions_are_the_weighted_mean_of_the_runs(tmp_path):
    def run(uids: list[str], value: float, weight: float) -> dict:
        names = [f"label {name}" for name in LABELS]
        oof = pd.DataFrame({UID: uids, "patient": [None] * len(uids), "modality": "CTA", "plane": "axial"})
        probs = pd.DataFrame(np.full((len(uids), 14), value), columns=list(LABELS))
        truth = pd.DataFrame(np.ones((len(uids), 14)), columns=names)
        return {"oof": pd.concat([oof, probs, truth], axis=1), "settings": {"ensemble_weight": weight}}

    pooled = eda.pool_oof(
        [run(["1", "2"], 0.2, 1.0), run(["2"], 0.8, 2.0), {"oof": pd.DataFrame(), "settings": {}}]
    )
    assert pooled[UID].tolist() == ["1", "2"] and pooled["patient"].tolist() == ["1", "2"]
    assert pooled[LABELS[13]].tolist() == pytest.approx([0.2, 0.6])  # (0.2 + 2 x 0.8) / 3


def test_results_are_those_of_the_metric_and_say_what_is_undefined(tmp_path):
    uids = [f"1.{i}" for i in range(40)]
    write_outputs(tmp_path / "outputs", uids, "net")
    write_outputs(tmp_path / "outputs", uids, "other", strength=0.5, lr=5.0e-4)
    done = report(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = Page(done.stdout).text
    runs, faults = eda.read_runs(tmp_path / "outputs")
    assert len(runs) == 4 and not faults
    result = eda.score_oof(eda.pool_oof(runs))
    assert f"wAUC {result['wauc']:.3f} ({result['low']:.2f} to {result['high']:.2f}) on 40 series" in text
    own = eda.score_oof(eda.pool_oof(runs[:2]))["per_label"][LABELS[6]]
    truth, probs = (
        np.concatenate([run["oof"][c] for run in runs[:2]]) for c in (f"label {LABELS[6]}", LABELS[6])
    )
    pairs = [(p > q) + 0.5 * (p == q) for p in probs[truth == 1] for q in probs[truth == 0]]
    assert own["auc"] == pytest.approx(np.mean(pairs))
    assert "Only one class, so no AUC: Left Infraclinoid" in text and "n = 20" in text
    assert "lr 0.0005, model_name other" in text and "0.75 (0.7 to 0.8)" in text and "1 × 2" in text


def test_a_run_that_cannot_be_read_is_named_and_left_out(tmp_path):
    write_outputs(tmp_path, [f"1.{i}" for i in range(8)])
    (tmp_path / "net_seed0_fold0" / "oof.csv").write_text("SeriesInstanceUID,patient\n1,2\n")
    runs, faults = eda.read_runs(tmp_path)
    assert len(runs) == 1 and len(faults) == 1 and "net_seed0_fold0" in faults[0]


def test_hard_cases_show_the_locators_places_and_heat_maps(whole):
    page = Page(whole)
    assert "Highest-scored negatives" in page.text and "Lowest-scored positives" in page.text
    assert page.text.count("The same with the heat map") >= 12 and "No heat maps" not in page.text


def test_whole_volumes_are_read_of_the_examples_only(tmp_path, monkeypatch):
    write_set(tmp_path, [{"uid": f"4.{i}", "labels": {6}, "points": [(6, *CENTRE)]} for i in range(60)])
    read, load = [], common.load_volume
    monkeypatch.setattr(common, "load_volume", lambda path, *a: read.append(path) or load(path, *a))
    table, points = eda.read_table(tmp_path, tmp_path)
    assert not read and len(points) == 60
    eda.data_section(table, points)
    eda.images_section(table, points, tmp_path, tmp_path)
    eda.points_section(table, points, tmp_path)
    eda.trouble_section(table, points, tmp_path)
    assert 0 < len(read) <= 25  # one example, twenty heads


# --- images from DICOM --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dicoms")
    phantom.make_set(folder, series=8, seed=3, matrix=64)
    return folder


def test_a_small_scan_keeps_every_voxel_where_it_lies(dicoms):
    planes = set()
    for uid, files in common.find_series(dicoms)[0].items():
        series = common.read_series(files, uid)
        scan, affine, axis = eda.whole_scan(series, most=10_000)
        planes.add(series.plane)
        assert axis == ("axial", "coronal", "sagittal").index(series.plane)
        assert (np.diag(affine[:3, :3][::-1]) > 0).all()  # z up, y back, x left
        rng = np.random.default_rng(0)
        n, rows, cols = len(series.frames), series.frames[0].rows, series.frames[0].cols
        for _ in range(20):
            i, r, c = (int(rng.integers(size)) for size in (n, rows, cols))
            lps = np.array(series.frames[i].position) + c * series.frames[i].spacing_mm[1] * np.array(
                series.frames[i].row_dir
            )
            lps = lps + r * series.frames[i].spacing_mm[0] * np.array(series.frames[i].col_dir)
            voxel = common.to_voxel(lps, affine)[0]
            assert np.abs(voxel - np.rint(voxel)).max() < 0.1, series.plane
            assert scan[tuple(np.rint(voxel).astype(int))] == pytest.approx(series.values(i)[r, c], abs=1e-3)
    assert len(planes) > 1


def test_phantoms_are_shown_from_their_files_without_their_patients(dicoms, tmp_path):
    command = [sys.executable, str(SCRIPT.parent / "preprocess.py"), "--src", str(dicoms), "--dst", "cache"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert made.returncode == 0, made.stderr
    done = report("--src", str(dicoms), "--cache", "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page, labels = Page(done.stdout), pd.read_csv(dicoms / "train.csv")
    for kind, count in labels["Modality"].value_counts().items():
        assert f"{kind}, {kind}: {count}" in page.figures["Series by modality."]
    prevalence = [word for word in page.figures["Prevalence of the labels."] if re.search(r"\d \(\d+", word)]
    assert [int(word.split()[0]) for word in prevalence] == labels[list(LABELS)].sum().tolist()
    assert "Coronal projection of the scan" in page.text and "Not found at --src" not in page.text
    assert "could not be read again" not in page.text
    import pydicom

    for path in dicoms.glob("series/*/*.dcm"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert header.PatientID and str(header.PatientID) not in done.stdout


def test_a_vessel_mask_lands_on_the_voxels_that_it_marks():
    shape, affine = (4, 6, 8), np.array([[0, 0, 2.0, -7], [0, 2.0, 0, 3], [5.0, 0, 0, 11], [0, 0, 0, 1]])
    ras = np.diag([-1.0, -1, 1, 1]) @ np.array(
        [[2.0, 0, 0, -7], [0, 2.0, 0, 3], [0, 0, 5.0, 11], [0, 0, 0, 1]]
    )
    mask = np.zeros((8, 6, 4), bool)  # i, j, k = x, y, z of the same grid
    mask[7, 2, 1] = mask[0, 5, 3] = True
    assert np.argwhere(eda.mask_voxels(mask, ras, affine, shape)).tolist() == [[1, 2, 7], [3, 5, 0]]


def test_vessel_masks_are_drawn_where_nibabel_is_installed(tmp_path, monkeypatch):
    write_set(tmp_path / "cache", [{"uid": "1.1"}, {"uid": "1.2"}])
    (tmp_path / "segmentations").mkdir()
    (tmp_path / "segmentations" / "1.2_vessels.nii.gz").write_bytes(b"")
    table, _ = eda.read_table(tmp_path / "cache", tmp_path)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert "pip install nibabel" in eda.masks_part(table, tmp_path / "cache", tmp_path)
    image = types.SimpleNamespace(dataobj=np.ones((4, 4, 4)), affine=np.diag([-1.0, -1, 1, 1]))
    monkeypatch.setitem(sys.modules, "nibabel", types.SimpleNamespace(load=lambda path: image))
    part = Page(eda.masks_part(table, tmp_path / "cache", tmp_path / "series"))
    assert part.tags.count("image") == 3 and "vessels of …1.2" in part.text


# --- opened in a browser ------------------------------------------------------------------------------------

PROBE = """<script>
addEventListener("load", async () => {
  const uris = [...document.querySelectorAll("image, img")].map((one) => one.getAttribute("href") || one.src);
  const loaded = await Promise.all(uris.map((uri) => new Promise((done) => {
    const image = new Image();
    image.onload = () => done(image.naturalWidth > 0);
    image.onerror = () => done(false);
    image.src = uri;
  })));
  const wide = [...document.querySelectorAll("main *")].filter((one) => !one.closest(".scroll, svg") &&
    one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80));
  parent.postMessage({ images: loaded.length, broken: loaded.filter((ok) => !ok).length, wide,
    scroll: document.documentElement.scrollWidth, inner: innerWidth,
    back: getComputedStyle(document.body).backgroundColor,
    fore: getComputedStyle(document.body).color }, "*");
});
</script>"""


def browse(page: str, folder: Path, width: int, *flags: str) -> tuple[dict, list[str]]:
    """What the probe saw in a frame of that width, and the lines on the browser's console."""
    (folder / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    listen = (
        'onmessage = (sent) => { document.querySelector("pre").textContent = JSON.stringify(sent.data); }'
    )
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:2000px"></iframe>'
    (folder / "frame.html").write_text(f"<pre></pre><script>{listen}</script>{frame}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--window-size=1400,2100"]
    command += ["--virtual-time-budget=60000", *flags, "--dump-dom", f"file://{folder / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, flags=re.S)
    assert found and found[1], f"the browser said nothing: {done.stderr[-500:]}"
    return json.loads(html.unescape(found[1])), [
        line for line in done.stderr.splitlines() if ":CONSOLE" in line
    ]


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on the PATH (apt-get install chromium)"
)


@needs_browser
def test_the_probe_sees_a_wide_page_a_broken_image_and_an_error(tmp_path):
    bad = '<p style="width:900px">x</p><img src="data:image/png;base64,AA">'
    bad = f"<body><main>{bad}</main><script>nope()</script></body>"
    seen, console = browse(bad, tmp_path, 390)
    assert (
        (seen["images"], seen["broken"]) == (1, 1) and seen["scroll"] > seen["inner"] == 390 and seen["wide"]
    )
    assert console and "nope" in console[0]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it_without_sideways_scrolling(whole, tmp_path, width):
    seen, console = browse(whole, tmp_path, width)
    assert seen["inner"] == width and seen["scroll"] <= width and not seen["wide"]
    assert seen["images"] > 30 and seen["broken"] == 0
    assert not console


@needs_browser
def test_the_page_follows_the_readers_light_or_dark(whole, tmp_path):
    light, _ = browse(whole, tmp_path, 1280, "--blink-settings=preferredColorScheme=1")
    dark, _ = browse(whole, tmp_path, 1280, "--blink-settings=preferredColorScheme=0")
    brightness = [sum(map(int, re.findall(r"\d+", seen["back"])[:3])) for seen in (light, dark)]
    assert brightness[0] > 700 and brightness[1] < 100
    assert light["fore"] != dark["fore"]
