"""Show the data, what went wrong and the results on one page that a radiologist and an engineer both read.

in   --cache DIR    what preprocess.py wrote: index.csv, volumes, perhaps train.csv (default: cache)
     --src DIR      the DICOM tree, to show the head around the volume (default: dicoms)
     --outputs DIR  finished runs of train.py, at any depth (default: outputs)
     --limit N      only the first N series of index.csv, for a quick look (default: all); results are of all
out  one HTML page on stdout that needs no other file and no network; progress goes to stderr
run  python eda.py > report.html

Pixels are read of the shown examples only. What is absent is said where it would stand. Patients are counted,
never named. Exit code 0 written, 1 nothing to report on, 2 wrong usage.
"""

import base64
import functools
import io
import json
import re
import sys
import time
from argparse import SUPPRESS
from collections import defaultdict
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray
from pandas import DataFrame
from sklearn.metrics import roc_curve

import common
from common import AP, LABELS, PLACE, PRESENT, UID, UNDEFINED, load_volume, log, read_csv, score, volume_path
from dicom import VolumeSettings, find_series, make_volume, read_series, to_lps, to_voxel

MEASURES = {  # columns of index.csv, with their meaning
    "age": "Age in years, of train.csv where the files have none. Not an input of the models.",
    "num_slices": "Slices. A slab of the volume is the mean of the slices in it.",
    "slice_mm": "Distance between slices. Where large, a small aneurysm touches one slice or two.",
    "thickness_mm": "Slice thickness. Thick slices blur the smallest aneurysms, of 2 mm.",
    "row_mm": "Pixel size. Pixels finer than the volume's lose detail.",
    "coverage_mm": "Height of the scan. The volume shows the part of it that lies in the box.",
}
CURVES = {  # columns of log.csv, with their meaning
    "train_loss": "Training loss. Falls while the network fits the training series.",
    "val_loss": "Loss on patients held back. Rising while the other falls: overfitting.",
    "wauc": "wAUC on patients held back, without annotated crops. Chance is 0.5.",
}
TEXT = dict.fromkeys((UID, "patient", "plane", "reason", "notes", "sex"), str)  # even if all are empty
SIDES = ["mm from the box's right", "mm from the box's front", "mm below the box's top"]  # columns of points
PROBS = [f"probability of {name}" for name in LABELS]  # columns of out-of-fold predictions
PROB_PRESENT = PROBS[AP]
WHOLE_HEAD = VolumeSettings(base_slices=256, img_size=256, roi_mm=280.0, roi_top_mm=600.0)
REACH_MM, NEAR_MM = 20.0, 8.0  # half of a projection; points shown on a slab
CHART_STYLE = {"font.size": 8, "text.parse_math": False, "image.cmap": "gray", "legend.frameon": False}
list_series = functools.cache(find_series)


# --- what there is ------------------------------------------------------------------------------------------
def read_cache(cache: Path, limit: int | None = None) -> tuple:
    """A row per series: index.csv, labels, the volume's settings or why it is unreadable; a row per point."""
    columns = [*TEXT, *MEASURES, "status", "modality", "num_points", "points_inside"]
    table = read_csv(cache / "index.csv", columns, dtype=TEXT, nrows=limit)
    path = cache / "train.csv"
    labels = common.read_label_table(path) if path.is_file() else DataFrame(columns=[UID])
    labels = labels.reindex(columns=[UID, "Modality", "PatientAge", "PatientSex", *LABELS])
    table = table.merge(labels, on=UID, how="left")
    table["modality"] = table["Modality"].combine_first(table["modality"])  # CTA rather than CT
    table = table.fillna({"modality": "unknown", "plane": "unknown", "notes": ""})
    settings, faults, points = {}, {}, []
    for uid in table.query("status != 'failed'")[UID]:
        try:
            tensors, meta = load_volume(volume_path(cache, uid), ["points", "point_labels"])
        except (OSError, ValueError) as error:
            faults[uid] = hide_folders(error)
            continue
        settings[uid] = re.sub("[{}']", "", f"{meta['settings']}")
        height_mm = meta["settings"]["base_slices"] * meta["spacing_mm"][0]
        places_mm = (tensors["points"] + 0.5) * meta["spacing_mm"]
        for label, (z, y, x) in zip(tensors["point_labels"], places_mm, strict=True):
            artery = re.sub("^(Left|Right) ", "", LABELS[label])
            points.append((uid, artery, x, y, height_mm - z))
    table["settings"] = table[UID].map(settings)
    table["unreadable"] = table[UID].map(faults)
    return table, DataFrame(points, columns=[UID, "artery", *SIDES])


def read_runs(outputs: Path) -> tuple:
    """Tables of all runs ({} without one): oof (truth, PROBS, weight), log, proposals, lists of metrics.json;
    the runs of a `group` differ in seed and fold. And what speaks against some."""
    tables, faults = defaultdict(list), []
    truth = [f"label {name}" for name in LABELS]
    for path in sorted(outputs.rglob("config.yaml")):
        folder = path.parent
        group = re.sub(r"_seed\d+_fold\d+$", "", folder.name)
        try:
            cfg = common.load_config(path)
            metrics = json.loads((folder / "metrics.json").read_text())
            oof = read_csv(folder / "oof.csv", [UID, "patient", "plane", "modality", *truth], dtype=TEXT)
            oof[PROBS] = oof[LABELS]
            oof[LABELS] = oof[truth]
            oof["Modality"] = oof["modality"]  # as common.score wants it
            oof["weight"] = max(cfg.ensemble_weight, 1e-9)  # 0: a locator that only proposes
            parts = {
                "oof": oof.assign(group=group),
                "log": pd.read_csv(folder / "log.csv").assign(group=group),
                "operating_points": DataFrame(metrics["operating_points"], dtype=float),
                "froc": DataFrame(metrics.get("froc"), dtype=float),  # of a locator
            }
            if cfg.task == "locate":
                proposals = read_csv(folder / "proposals.csv", [UID, *PLACE, "score"], dtype=TEXT)
                parts["proposals"] = proposals.assign(folder=folder)
            if metrics["is_nearly_constant"]:
                faults.append(f"{folder.name} PREDICTS NEARLY THE SAME FOR ALL SERIES: its score is chance.")
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"run {folder.name} is left out: {hide_folders(error)}")
            continue
        for name, table in parts.items():
            table.insert(0, "run", folder.name)
            tables[name].append(table)
    if not tables:
        faults.append(f"no finished training runs in {outputs}")
    return {name: pd.concat(parts) for name, parts in tables.items()}, faults


def pool_oof(rows: DataFrame) -> DataFrame:
    """A row per series: labels and the mean out-of-fold probabilities over runs, weighted as in infer.py."""
    series = rows.groupby(UID)
    pooled = series.first()
    sums = rows[PROBS].mul(rows["weight"], axis=0).groupby(rows[UID]).sum()
    pooled[PROBS] = sums.div(series["weight"].sum(), axis=0)
    return pooled.reset_index()


# --- sections -----------------------------------------------------------------------------------------------
def data_section(table: DataFrame) -> str:
    settings = table["settings"].value_counts().reset_index(name="series")
    planes = pd.crosstab(table["plane"], table["modality"], margins=True)
    positives = table.groupby("modality")[LABELS].sum().T.reset_index(names="label")
    return f"""<section id="data"><h2>The data</h2>
        {show_table(settings, "Settings of the volumes; the box reaches down from the top of the head.")}
        {show_table(planes.reset_index(), "Series by plane and modality.")}
        {show_table(positives, f"Positive series of {table[PRESENT].count()} with labels in train.csv.")}
        <div class="grid">
        {"".join(draw_histogram(text, table, column, "modality") for column, text in MEASURES.items())}
        </div></section>"""


@dataclass(frozen=True)
class Scan:
    """What is drawn of a series. Points and corners are LPS mm."""

    voxels: ndarray  # uint8 (z, y, x)
    affine: ndarray  # to LPS mm
    points: ndarray  # (P, 3) annotated
    box: ndarray  # (2, 3) corners of what the model sees
    place: ndarray  # (3,) the first annotated point, else the middle of the box
    settings: dict


def read_scan(uid: str, cache: Path) -> Scan:
    """The cached volume of a series."""
    tensors, meta = load_volume(volume_path(cache, uid))
    voxels, affine = tensors["volume"], np.array(meta["affine"])
    points = to_lps(tensors["points"], affine)
    box = to_lps(np.array([(0, 0, 0), voxels.shape]) - 0.5, affine)
    place = points[0] if len(points) else box.mean(0)
    return Scan(voxels, affine, points, box, place, meta["settings"])


def read_whole_head(scan: Scan, uid: str, src: Path) -> Scan:
    """The same series read again from DICOM: a volume over a larger box."""
    files = list_series(src)[0].get(uid)
    if not files:
        raise ValueError(f"no such series in --src {src}")
    volume = make_volume(read_series(files, uid), WHOLE_HEAD)
    return replace(scan, voxels=volume.voxels, affine=volume.affine)


def images_section(table: DataFrame, cache: Path, src: Path) -> str:
    """An example per modality and plane, with an annotated point where there is one."""
    kinds = ["modality", "plane"]
    cached = table.dropna(subset="settings").sort_values([*kinds, "points_inside", "num_slices"])
    examples = []
    for row in cached.drop_duplicates(kinds, keep="last").to_dict("records"):
        log(f"example: {row['modality']}, {row['plane']}")
        examples.append(show_example(row, read_scan(row[UID], cache), src))
    return f"""<section id="images"><h2>The images</h2>
        <p>A series per modality and plane, with an annotated aneurysm where there is one (ring). R and L are
        the patient's sides, A is the front, P the back. Blue: the box that the model sees. Projections are
        maxima over {2 * REACH_MM:.0f} mm. Arteries are bright in CTA and MRA, dark in slices of T2.</p>
        {"".join(examples) or absent("No readable volume in the cache.")}</section>"""


def show_example(row: dict, scan: Scan, src: Path) -> str:
    """A series: where the box lies in the head, and a slice before and after."""
    axis = {"coronal": 1, "sagittal": 2}.get(row["plane"], 0)
    head, fault, before = scan, "", ""
    try:
        head = read_whole_head(scan, row[UID], src)
        before = show_plane("Before: the whole head", head, axis, scan.place)
    except (ValueError, OSError) as error:
        fault = f"The volume alone is shown: {hide_folders(error)}"
    spacing = f"slices {row['num_slices']:.0f}, {row['slice_mm']:.2f} mm apart"
    return f"""<h3>{escape(row["modality"])}, {escape(row["plane"])}</h3>
        {absent(f"{row[UID]}, {row['status']}: {spacing}. {row['notes']} {fault}")}
        <div class="grid panes">
        {show_plane("Coronal projection", head, 1, scan.place, REACH_MM)}
        {show_plane("Sagittal projection", head, 2, scan.place, REACH_MM)}
        {before}{show_plane("In the volume", scan, axis, scan.place)}</div>"""


def points_section(points: DataFrame) -> str:
    """All annotated points in the frame of the box, along its three sides."""
    charts = [draw_histogram(f"Points, {side}.", points, side, "artery") for side in SIDES if len(points)]
    return f"""<section id="points"><h2>Where the aneurysms are</h2>
        <div class="grid">{absent("No annotated points in the cache.") if points.empty else ""}
        {"".join(charts)}</div></section>"""


def find_troubles(table: DataFrame, cache: Path) -> dict:
    """Title -> a row per case; notes that differ in numbers only are of one kind, shown by one of them."""
    outside = table.query("points_inside < num_points")
    years = table["PatientAge"].map(common.parse_age)
    sexes = table["sex"] + table["PatientSex"].astype(str).str[0]
    is_other = (abs(table["age"] - years) >= 1) | sexes.isin(["FM", "MF"])
    notes = table["notes"].str.split("; ").explode()
    notes = notes[notes != ""]
    kinds = notes.str.replace(r"(?<!\w)[-+]?\d[\d.]*(?![\w,]*\))", "n", regex=True)
    examples = notes.rename("such as").groupby(kinds).transform("first")
    path = cache / "faults.csv"
    faults = read_csv(path, ["fault", "case"], dtype=str) if path.is_file() else DataFrame()
    return {
        "Series that failed": table.query("status == 'failed'")[[UID, "reason"]],
        "Doubtful volumes": table.query("status == 'doubtful'")[[UID, "reason", "notes"]],
        "Unreadable volumes": table[[UID, "unreadable"]].dropna(),
        "Annotated points left out or outside the box": outside[[UID, "num_points", "points_inside"]],
        "Age or sex unlike train.csv": table.loc[is_other, [UID, "age", "PatientAge", "sex", "PatientSex"]],
        "Faults of labels, points and files": faults,
        "Kinds of repairs and assumptions": examples.value_counts().reset_index(name="series"),
    }


def trouble_section(troubles: dict) -> str:
    return f"""<section id="trouble"><h2>What went wrong</h2>
        {"".join(f"<h3>{title}: {len(rows)}</h3>{show_table(rows)}" for title, rows in troubles.items())}
        </section>"""


def results_section(runs: dict, result: dict) -> str:
    """Groups of runs beside each other, all runs last and on top; result: common.score of all."""
    scores, figures, parts = [], [], []
    for column, caption in CURVES.items():
        axes = new_chart("epoch", column)
        runs["log"].pivot_table(column, "epoch", "run").plot(ax=axes, style=".-", legend=False)
        figures.append(show_chart(caption, axes))
    axes = new_chart("false alarms: share of negatives", "sensitivity: share of positives")
    for group, rows in [*runs["oof"].groupby("group"), ("all runs", runs["oof"])]:
        table = pool_oof(rows)
        wauc = common.describe_wauc(score(table, table[PROBS].to_numpy()))
        scores.append({"runs": group, "wAUC": wauc})
        false_alarms, sensitivity, _ = roc_curve(table[PRESENT], table[PROB_PRESENT])
        axes.plot(false_alarms, sensitivity, label=group)
    figures.append(show_chart("ROC of Aneurysm Present. Chance is the diagonal.", axes))
    for name in ("label", "modality", "plane"):
        rows = DataFrame(result[f"per_{name}"]).T.reset_index(names=name)
        parts.append(show_table(rows, f"The pooled predictions by {name}."))
    return f"""<section id="results"><h2>The results</h2>
        {show_table(DataFrame(scores), "Runs compared, on patients held back.")}
        {show_table(runs["operating_points"], f"Operating points, 95 % intervals over patients. {UNDEFINED}")}
        {show_table(runs["froc"], "FROC: the share of points (positives) with a proposal within 10 mm.")}
        <div class="grid">{"".join(figures)}</div>{"".join(parts)}</section>"""


def cases_section(runs: dict, pooled: DataFrame, cache: Path) -> str:
    """The predictions that are most wrong, of positives and of negatives."""
    errors = abs(pooled[PRESENT] - pooled[PROB_PRESENT])
    ordered = pooled.loc[errors.sort_values(ascending=False).index]
    hardest = ordered.groupby(PRESENT).head(6)
    proposals = runs.get("proposals", DataFrame(columns=[UID]))
    cases = []
    for row in hardest.to_dict("records"):
        log(f"hard case: {row[UID]}")
        try:
            places = proposals[proposals[UID] == row[UID]]
            cases.append(show_case(row, places, read_scan(row[UID], cache)))
        except (OSError, ValueError) as error:
            cases.append(absent(f"{row[UID]}: {hide_folders(error)}"))
    return f"""<section id="cases"><h2>The hardest cases</h2>
        <p>The slab of a locator's likeliest place, else of the annotated one; beside it the locator's
        probability of an aneurysm over the slab: violet 0.3, red 0.5, yellow 0.9.</p>
        {"".join(cases) or absent("None of the predicted series is in the cache.")}</section>"""


def show_case(row: dict, places: DataFrame, scan: Scan) -> str:
    """A slab and, where a locator has places, its heat map. ValueError if it takes other volumes."""
    place, heat = scan.place, None
    if len(places):
        best = places.sort_values("score").iloc[-1]
        place = best[PLACE].to_numpy(float)
        run = common.load_run(best["folder"])
        if scan.settings != common.volume_settings(run.cfg):
            raise ValueError(f"{run.folder.name}: its volumes have other settings than those of the cache")
        with torch.inference_mode():
            images = torch.from_numpy(scan.voxels)[None].float() / 255
            maps = run.model(images).maps[0]  # (13, Z, h, w) logits; the probabilities add up
        heat = maps.sigmoid().sum(0).numpy()
    truth = [name for name in LABELS if row[name]]
    return f"""<h3>{escape(row["Modality"])} …{escape(row[UID][-8:])}</h3>
        {absent(f"Predicted {row[PROB_PRESENT]:.2f}, truth: {', '.join(truth) or 'no aneurysm'}.")}
        <div class="grid panes">
        {show_plane("Slab", scan, 0, place)}
        {show_plane("Heat map", scan, 0, place, heat=heat) if len(places) else ""}</div>"""


def new_chart(x_name: str, y_name: str) -> Axes:
    axes = Figure(figsize=(4.2, 3.4), layout="constrained").subplots()
    axes.set(xlabel=x_name, ylabel=y_name)
    return axes


def show_chart(caption: str, axes: Axes) -> str:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.figure.legend(loc="outside upper left")
    data = io.BytesIO()
    axes.figure.savefig(data, format="webp", dpi=150)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"""<figure><figcaption>{escape(caption)}</figcaption>
        <img alt="{escape(caption)}" src="{uri}"></figure>"""


def draw_histogram(caption: str, table: DataFrame, column: str, kind: str) -> str:
    """How often a column has which value, stacked by another column."""
    table = table.dropna(subset=column)
    if table.empty:
        return absent(f"{caption} No series states it.")
    # values that are equal but for rounding are equal
    kinds, values = zip(*table[column].round(3).groupby(table[kind]), strict=True)
    axes = new_chart(column, "number")
    axes.hist(values, 25, stacked=True, label=kinds)
    return show_chart(caption, axes)


def show_plane(
    title: str, scan: Scan, axis: int, place: ndarray, reach_mm: float = 0.0, heat: ndarray | None = None
) -> str:
    """The plane through a place, or the maximum within reach of it, head up: with directions, a ring around
    each point near it, the box, and a heat map (Z, h, w) on a scale from 0 to 1."""
    axes = new_chart("", "")
    spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    planes = np.moveaxis(scan.voxels, axis, 0)
    centre, first, last, *points = to_voxel([place, *scan.box, *scan.points], scan.affine)
    middle = np.clip(round(centre[axis]), 0, len(planes) - 1)
    reach = round(reach_mm / spacing_mm[axis])
    image = planes[max(middle - reach, 0) : middle + reach + 1].max(0)
    extent = axes.imshow(image, vmin=0, vmax=255).get_extent()
    if heat is not None:
        axes.imshow(heat[middle], "inferno", vmin=0, vmax=1, alpha=heat[middle], extent=extent)
    down, across = np.delete([0, 1, 2], axis)
    axes.set_aspect(spacing_mm[down] / spacing_mm[across])
    sides = [across, down]
    axes.add_patch(Rectangle(first[sides], *(last - first)[sides], fill=False, color="C0"))
    for point in points:
        if abs(point[axis] - middle) * spacing_mm[axis] <= max(reach_mm, NEAR_MM):
            axes.plot(point[across], point[down], "yo", markersize=10, fillstyle="none")
    if axis:
        axes.invert_yaxis()  # z grows upwards
    axes.set_axis_off()
    axes.set_title("RRA"[axis], loc="left")
    axes.set_title("LLP"[axis], loc="right")
    return show_chart(f"{title}, plane {middle} of 0 to {len(planes) - 1}", axes)


def show_table(table: DataFrame, caption: str = "") -> str:
    """A table, escaped."""
    if table.empty:
        return absent(f"{caption} None.")
    table = table.rename_axis(columns=None).rename(columns=lambda name: str(name).replace("_", " "))
    with pd.option_context("display.max_colwidth", None):
        body = table.to_html(border=0, index=False, na_rep="–", float_format="{:.4g}".format)
    return f'<figure class="table"><figcaption>{escape(caption)}</figcaption>{body}</figure>'


def absent(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def hide_folders(error: Exception) -> str:
    """The message without the folders of its paths."""
    return re.sub(r"[^\s']*/", "", str(error))


STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1c1e21; --soft: #5c6166; --line: #d5d8db; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #15171a; --fore: #e6e8ea; --soft: #a3a9af; --line: #3b4046; } }
* { box-sizing: border-box; } section { scroll-margin-top: 70px; } .table { vertical-align: top; }
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; background: var(--back); color: var(--fore);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; } nav a { color: var(--fore); }
nav { position: sticky; top: 0; z-index: 1; padding: 6px 0; background: var(--back); display: flex;
  flex-wrap: wrap; gap: 2px 14px; border-bottom: 1px solid var(--line); } h2 { margin: 40px 0 8px; }
p, li { max-width: 85ch; } th { text-align: left; } .soft { color: var(--soft); font-size: 13px; }
.grid { display: grid; gap: 24px; margin: 16px 0; --width: 340px;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--width), 100%), 1fr)); } .panes { --width: 260px; }
figure { margin: 0; break-inside: avoid; } img { width: 100%; height: auto; display: block; }
figcaption, table { font-size: 13px; line-height: 1.4; } h3 { margin: 24px 0 6px; }
.table { display: inline-block; overflow: auto; max-width: 100%; max-height: 500px; padding: 8px 36px 8px 0; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 2px 7px; min-width: 4em; vertical-align: top; }
@media print { nav { display: none; } .table { overflow: visible; max-height: none; } }
"""
HEAD = f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Intracranial aneurysms</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>
<body><h1>Intracranial aneurysms</h1><p>Research software, not a medical device.</p>"""


def make_page(cache: Path, src: Path, outputs: Path, limit: int | None = None) -> str:
    """What was run, what came out and what to look at first; then the sections."""
    sections, facts, troubles = [], [], {}
    runs, warnings = read_runs(outputs)
    try:
        table, points = read_cache(cache, limit)
        troubles = find_troubles(table, cache)
    except (OSError, ValueError) as error:
        warnings.append(f"no data: {error}")
    if not (runs or troubles):
        raise ValueError(f"nothing to report on: {'; '.join(warnings)}")
    warnings += [f"no such folder: --src {src}; heads are not shown, but volumes"] * (not src.is_dir())
    for text in warnings:
        log(text)
    if troubles:
        counts = str(table["status"].value_counts().to_dict())[1:-1].replace("'", "")
        facts.append(f"series: {len(table)}, patients: {table['patient'].nunique()}, {counts}")
        for title, rows in troubles.items():
            if len(rows):
                warnings.append(f"{title}: {len(rows)}; first {rows.iloc[0].dropna().to_dict()}")
        sections = [data_section(table), images_section(table, cache, src)]
        sections += [points_section(points), trouble_section(troubles)]
    if runs:
        pooled = pool_oof(runs["oof"])
        result = score(pooled, pooled[PROBS].to_numpy())
        is_here = pooled[UID].isin([path.stem for path in cache.glob("*.safetensors")])
        facts.append(
            f"wAUC {common.describe_wauc(result)}: out of fold, pooled; runs: {runs['oof']['run'].nunique()}"
            f", series: {len(pooled)}, patients: {result['num_patients']}. Not in --cache: {sum(~is_here)}."
        )
        sections += [results_section(runs, result), cases_section(runs, pooled[is_here], cache)]
    names = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    return f"""{HEAD}<nav>{"".join(f'<a href="#{name}">{title}</a>' for name, title in names)}</nav><main>
        <p>python eda.py --cache {escape(str(cache))} --src {escape(str(src))}
        --outputs {escape(str(outputs))}{f" --limit {limit}" if limit else ""};
        {time.strftime("%Y-%m-%d %H:%M %Z")}; Python {sys.version.split()[0]}, torch {torch.__version__}.</p>
        {"".join(f"<p><b>{escape(text)}</b></p>" for text in facts)}<h3>Look at this first</h3>
        <ul>{"".join(f"<li>{escape(text)}</li>" for text in warnings or ["Nothing stands out."])}</ul>
        {"".join(sections)}</main></body></html>"""


def main() -> int:
    parser = common.make_parser(__doc__)
    parser.usage = "eda.py [options]"
    for name, default in {"cache": "cache", "src": "dicoms", "outputs": "outputs"}.items():
        parser.add_argument(f"--{name}", type=Path, default=default, help=SUPPRESS)  # the manual lists them
    parser.add_argument("--limit", type=common.positive_int, help=SUPPRESS)
    args = parser.parse_args()
    try:
        with common.reserve_stdout() as stdout, matplotlib.rc_context(CHART_STYLE):
            stdout.write(make_page(**vars(args)))
            return 0
    except ValueError as error:
        log(f"eda.py: {error}")
    except OSError as error:  # a full disk, or a reader such as `head` that has gone
        log(f"eda.py: {error.filename or 'stdout'}: {error.strerror or error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
