"""Show the data, what went wrong and the results on one page that a radiologist and an engineer both read.

in   --cache DIR    (cache) what preprocess.py wrote: index.csv, volumes, train.csv where there are labels
     --src DIR      (dicoms) the DICOM tree, to show the head around the volume
     --outputs DIR  (outputs) finished runs of train.py, at any depth
     --limit N      only the first N series of index.csv, for a quick look; the results are of all series
out  one HTML page on stdout that needs no other file and no network; progress goes to stderr
run  python eda.py > report.html

Numbers come from tables and headers; pixels are read of the shown examples only. What is absent is said where
it would stand. Patients are counted, never named. Exit code 0 written, 1 nothing to report on, 2 wrong usage.
"""

import base64
import functools
import io
import json
import re
import sys
import time
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
from sklearn.metrics import roc_curve

import common
from common import AP, LABELS, UID
from dicom import VolumeSettings, find_series, make_volume, read_series, to_lps, to_voxel

MEASURES = {  # columns of index.csv, with name and meaning
    "age": ("Age (years)", "Not an input of the models."),
    "num_slices": ("Slices", "A slab of the volume is the mean of the slices in it."),
    "slice_mm": ("Distance between slices (mm)", "Where large, a small aneurysm touches one slice or two."),
    "thickness_mm": ("Slice thickness (mm)", "Thick slices blur the smallest aneurysms, of 2 mm."),
    "row_mm": ("Pixel size (mm)", "Pixels finer than the volume's lose detail."),
    "coverage_mm": ("Height of the scan (mm)", "The volume shows the part of it that lies in the box."),
}
TEXT = dict.fromkeys((UID, "patient", "plane", "reason", "notes"), str)  # columns, even if all are empty
X = "mm from the right side of the box"  # columns of points
Y = "mm from the front of the box"
DEPTH = "mm below the top of the box"
VIEWS = {
    "From below": (X, Y),
    "From the front": (X, DEPTH),
    "From the left": (Y, DEPTH),
}
NAMES = list(LABELS)  # columns of the truth
PROBS = [f"probability of {name}" for name in LABELS]  # columns of out-of-fold predictions
PRESENT, PROB_PRESENT = NAMES[AP], PROBS[AP]
PLACE = ["x_mm", "y_mm", "z_mm"]  # columns of proposals.csv, LPS
WHOLE_HEAD = VolumeSettings(base_slices=256, img_size=256, roi_mm=280.0, roi_top_mm=600.0)
REACH_MM, NEAR_MM = 20.0, 8.0  # half of a projection; points shown on a slab
RING = {"markersize": 10, "fillstyle": "none", "color": "yellow"}
MAX_CASES, MAX_ROWS = 6, 200  # bounds that keep the page small
list_series = functools.cache(find_series)

# --- what there is ------------------------------------------------------------------------------------------


def read_cache(cache: Path, limit: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per series: index.csv, its labels (nan where there are none), and the settings of its volume or
    why it is unreadable; and a row per annotated point. ValueError for a broken table."""
    columns = [*TEXT, *MEASURES, "status", "modality", "num_points", "points_inside"]
    table = common.read_csv(cache / "index.csv", columns, dtype=TEXT, nrows=limit)
    labels = pd.DataFrame(columns=[UID, "Modality", *NAMES])
    if (cache / "train.csv").is_file():
        labels = common.read_label_table(cache / "train.csv")
    table = table.merge(labels, on=UID, how="left")
    table["modality"] = table["Modality"].fillna(table["modality"])  # the label table tells CTA from CT
    table = table.fillna({"modality": "unknown", "plane": "unknown", "reason": "", "notes": ""})
    settings, faults = {}, {}
    points = []
    for uid in table.loc[table["status"] != "failed", UID]:
        path = common.volume_path(cache, uid)
        try:
            tensors, meta = common.load_volume(path, ["points", "point_labels"])
        except (OSError, ValueError) as error:
            faults[uid] = hide_folders(error)
            continue
        settings[uid] = json.dumps(meta["settings"])
        height_mm = meta["settings"]["roi_top_mm"]
        places_mm = (tensors["points"] + 0.5) * meta["spacing_mm"]
        for label, (z, y, x) in zip(tensors["point_labels"], places_mm, strict=True):
            depth_mm = height_mm - z
            points.append((uid, LABELS[label], x, y, depth_mm))
    points = pd.DataFrame(points, columns=[UID, "label", X, Y, DEPTH])
    table["settings"] = table[UID].map(settings)
    table["unreadable"] = table[UID].map(faults)
    return table, points


def read_runs(outputs: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables of `read_run` over all runs below a folder ({} without one), with the run's name in column
    `run`; and a line for each run that is unfinished or cannot be read."""
    tables, faults = defaultdict(list), []
    for path in sorted(outputs.rglob("config.yaml")):
        run = path.parent.name
        try:
            parts = read_run(path.parent)
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"run {run} is left out: {hide_folders(error)}")
            continue
        for name, table in parts.items():
            table.insert(0, "run", run)
            tables[name].append(table)
    return {name: pd.concat(parts) for name, parts in tables.items()}, faults


def read_run(folder: Path) -> dict[str, pd.DataFrame]:
    """Tables of a run: oof (truth, PROBS, weight, group), log (group), proposals, lists of metrics.json. The
    runs of a group differ in seed and fold alone."""
    cfg = common.load_config(folder / "config.yaml")
    weight = max(cfg.ensemble_weight, 1e-9)  # 0: a locator that only proposes
    group = re.sub(r"_seed\d+_fold\d+$", "", folder.name)
    metrics = json.loads((folder / "metrics.json").read_text())
    truth = [f"label {name}" for name in NAMES]
    columns = [UID, "patient", "plane", "modality", *NAMES, *truth]
    oof = common.read_csv(folder / "oof.csv", columns, dtype=TEXT)
    oof[PROBS] = oof[NAMES]
    oof[NAMES] = oof[truth]
    oof["Modality"] = oof["modality"]  # as common.score wants it
    proposals = pd.DataFrame(columns=[UID, *PLACE, "score"])
    if (folder / "proposals.csv").is_file():
        proposals = common.read_csv(folder / "proposals.csv", list(proposals), dtype=TEXT)
    return {
        "oof": oof.assign(weight=weight, group=group, is_constant=metrics["is_nearly_constant"]),
        "log": pd.read_csv(folder / "log.csv").assign(group=group),
        "proposals": proposals.assign(folder=folder),
        "operating_points": pd.DataFrame(metrics["operating_points"]),
        "froc": pd.DataFrame(metrics.get("froc")),  # of a locator
    }


def pool_oof(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per series: labels and the mean out-of-fold probabilities over runs, weighted as in infer.py."""
    pooled = rows.groupby(UID).first()
    weighted = rows[PROBS].mul(rows["weight"], axis=0)
    sums = weighted.groupby(rows[UID]).sum()
    weights = rows.groupby(UID)["weight"].sum()
    pooled[PROBS] = sums.div(weights, axis=0)
    return pooled.reset_index()


# --- sections: the data, the images, where the aneurysms are ------------------------------------------------


def data_section(table: pd.DataFrame) -> str:
    settings = table["settings"].dropna().unique()
    settings = pd.DataFrame(map(json.loads, settings))
    planes = pd.crosstab(table["plane"], table["modality"], margins=True)
    positives = table.groupby("modality")[NAMES].sum().T
    labelled = f"Positive series of {table[PRESENT].count()} with labels in train.csv."
    figures = []
    for column, (title, meaning) in MEASURES.items():
        figures.append(draw_histogram(title, meaning, table, column, "modality"))
    return f"""<section id="data"><h2>The data</h2>
        {show_table(settings, "Settings of the volumes; the box reaches down from the top of the head.")}
        {show_table(planes.reset_index(), "Series by plane and modality.")}
        {show_table(positives.reset_index(names="label"), labelled)}
        <div class="grid">{"".join(figures)}</div></section>"""


@dataclass(frozen=True)
class Scan:
    """What is drawn of a series. Points and corners are LPS mm."""

    voxels: np.ndarray  # uint8 (z, y, x)
    affine: np.ndarray  # to LPS mm
    points: np.ndarray  # (P, 3) annotated
    box: np.ndarray  # (2, 3) corners of what the model sees
    place: np.ndarray  # (3,) the first annotated point, else the middle of the box
    settings: dict


def read_scan(uid: str, cache: Path) -> Scan:
    """The cached volume of a series."""
    tensors, meta = common.load_volume(common.volume_path(cache, uid))
    voxels = tensors["volume"]
    affine = np.array(meta["affine"])
    points = to_lps(tensors["points"], affine)
    edges = np.array([[0, 0, 0], voxels.shape]) - 0.5
    box = to_lps(edges, affine)
    place = points[0] if len(points) else box.mean(0)
    return Scan(voxels, affine, points, box, place, meta["settings"])


def read_whole_head(scan: Scan, uid: str, src: Path) -> Scan:
    """The same series read again from DICOM: a volume over a larger box."""
    files = sorted((src / "series" / uid).glob("*"))
    if not files:
        series, _ = list_series(src)
        files = series.get(uid, [])
    volume = make_volume(read_series(files, uid), WHOLE_HEAD)
    return replace(scan, voxels=volume.voxels, affine=volume.affine)


def images_section(table: pd.DataFrame, cache: Path, src: Path) -> str:
    """An example per modality and plane, with an annotated point where there is one."""
    kinds = ["modality", "plane"]
    cached = table.dropna(subset="settings").sort_values([*kinds, "points_inside", "num_slices"])
    chosen = cached.drop_duplicates(kinds, keep="last")
    examples = []
    for row in chosen.to_dict("records"):
        common.log(f"example: {row['modality']}, {row['plane']}")
        examples.append(show_example(row, read_scan(row[UID], cache), src))
    return f"""<section id="images"><h2>The images</h2>
        <p>A series per modality and plane, with an annotated aneurysm where there is one (ring). R and L are
        the patient's sides, A is the front, P the back. Blue: the box that the model sees. Projections are
        maxima over {2 * REACH_MM:.0f} mm. Arteries are bright in CTA and MRA; T2 shows them dark, best in the
        slices.</p>
        {"".join(examples) or absent("No readable volume in the cache.")}</section>"""


def show_example(row: dict, scan: Scan, src: Path) -> str:
    """A series: where the box lies in the head, and a slice before and after."""
    axis = {"coronal": 1, "sagittal": 2}.get(row["plane"], 0)
    head, fault = scan, ""
    try:
        head = read_whole_head(scan, row[UID], src)
    except (ValueError, OSError) as error:
        fault = f"The volume alone is shown: {hide_folders(error)}"
    spacing = f"slices {row['num_slices']:.0f}, {row['slice_mm']:.2f} mm apart"
    return f"""<h3>{escape(row["modality"])}, {escape(row["plane"])}</h3>
        {absent(f"{row[UID]}: {spacing}. {row['notes']} {fault}")}
        <div class="grid panes">
        {show_plane("Coronal projection", head, 1, scan.place, REACH_MM)}
        {show_plane("Sagittal projection", head, 2, scan.place, REACH_MM)}
        {show_plane("Before: as acquired", head, axis, scan.place)}
        {show_plane("After: in the volume", scan, axis, scan.place)}</div>"""


def points_section(points: pd.DataFrame) -> str:
    """All annotated points in the frame of the box, from three sides; their depth below its top."""
    artery = points["label"].str.replace("^(Left|Right) ", "", regex=True)
    points = points.assign(artery=artery)
    figures = [draw_histogram("Depth (mm)", "Below the top of the box.", points, DEPTH, "artery")]
    for view, (x, y) in VIEWS.items():
        axes = new_chart(x, y, 5.0)
        for name, rows in points.groupby("artery"):
            axes.scatter(rows[x], rows[y], s=9, label=name)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        figures.append(show_chart(view, "All annotated points, in the box that the model sees.", axes))
    return f"""<section id="points"><h2>Where the aneurysms are</h2>
        <div class="grid">{"".join(figures) if len(points) else absent("No annotated points in the cache.")}
        </div></section>"""


# --- section: what went wrong -------------------------------------------------------------------------------


def find_troubles(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> a row per case; notes that differ in numbers only are of one kind."""
    failed = table.query("status == 'failed'")
    doubtful = table.query("status == 'doubtful'")
    outside = table.query("points_inside < num_points")
    notes = table["notes"].str.split("; ").explode()
    notes = notes[notes != ""].str.replace(r"(?<!\w)[-+]?\d[\d.]*(?![\w,]*\))", "n", regex=True)
    return {
        "Series that failed": failed[[UID, "reason"]],
        "Doubtful volumes": doubtful[[UID, "reason", "notes"]],
        "Unreadable volumes": table.dropna(subset="unreadable")[[UID, "unreadable"]],
        "Points outside the box": outside[[UID, "num_points", "points_inside"]],
        "Kinds of repairs and assumptions": notes.value_counts().reset_index(name="series"),
    }


# --- sections: the results, the hardest cases ---------------------------------------------------------------

CURVES = {  # columns of log.csv, with their meaning
    "train_loss": "Falls while the network fits the training series.",
    "val_loss": "Of patients held back. Rising while the other falls: overfitting.",
    "wauc": "Of patients held back, without annotated crops. Chance is 0.5.",
}


def results_section(runs: dict[str, pd.DataFrame], result: dict) -> str:
    """Groups of runs beside each other, all runs last and on top; result: common.score of all."""
    scores, parts = [], []
    roc = new_chart("false alarms: share of negatives", "sensitivity: share of positives")
    for group, rows in [*runs["oof"].groupby("group"), ("all runs", runs["oof"])]:
        table = pool_oof(rows)
        score = common.score(table, table[PROBS].to_numpy(), 500)
        scores.append({"runs": group, "wAUC": interval(score, "wauc")})
        false_alarms, sensitivity, _ = roc_curve(table[PRESENT], table[PROB_PRESENT])
        roc.plot(false_alarms, sensitivity, label=group)
    for name in ("label", "modality", "plane"):
        rows = pd.DataFrame(result[f"per_{name}"]).T
        rows = rows.drop(columns="undefined", errors="ignore").reset_index(names=name)
        parts.append(show_table(rows, f"The pooled predictions by {name}."))
    return f"""<section id="results"><h2>The results</h2>
        {show_table(pd.DataFrame(scores), "Runs compared, on patients held back.")}
        {show_table(runs["operating_points"], "Operating points with 95 % intervals over draws of patients.")}
        {show_table(runs["froc"], "FROC with 95 % intervals over draws of patients.")}
        <div class="grid">{"".join(training_figures(runs["log"]))}
        {show_chart("ROC of Aneurysm Present", "Chance is the diagonal.", roc)}</div>
        {"".join(parts)}</section>"""


def training_figures(logs: pd.DataFrame) -> list[str]:
    """Losses and validation wAUC by epoch, the mean over the runs of a group."""
    means = logs.groupby(["epoch", "group"])[list(CURVES)].mean()
    figures = []
    for column, caption in CURVES.items():
        axes = new_chart("epoch", column)
        means[column].unstack().plot(ax=axes, style=".-", legend=False)
        figures.append(show_chart(column, caption, axes))
    return figures


def cases_section(proposals: pd.DataFrame, pooled: pd.DataFrame, cache: Path) -> str:
    """The predictions that are most wrong, of positives and of negatives."""
    errors = abs(pooled[PRESENT] - pooled[PROB_PRESENT]).sort_values(ascending=False)
    hardest = pooled.loc[errors.index].groupby(PRESENT).head(MAX_CASES)
    cases = []
    for row in hardest.to_dict("records"):
        common.log(f"hard case: {row[UID]}")
        places = proposals[proposals[UID] == row[UID]]
        try:
            cases.append(show_case(row, places, read_scan(row[UID], cache)))
        except (OSError, ValueError) as error:
            cases.append(absent(f"{row[UID]}: {hide_folders(error)}"))
    return f"""<section id="cases"><h2>The hardest cases</h2>
        <p>The slab of a locator's likeliest place, else of the annotated one; beside it the locator's
        probability of an aneurysm over the slab: violet 0.3, red 0.5, yellow 0.9.</p>
        {"".join(cases)}</section>"""


def show_case(row: dict, places: pd.DataFrame, scan: Scan) -> str:
    """A slab and, where a locator has places (rows of proposals), its heat map."""
    place, heat = scan.place, None
    if len(places):
        best = places.sort_values("score").iloc[-1]
        place = best[PLACE].to_numpy(float)
        heat = compute_heat(scan, best["folder"])
    truth = [name for name in NAMES if row[name]]
    return f"""<h3>{escape(row["Modality"])} …{escape(row[UID][-8:])}</h3>
        {absent(f"Predicted {row[PROB_PRESENT]:.2f}, truth: {', '.join(truth) or 'no aneurysm'}.")}
        <div class="grid panes">
        {show_plane("Slab", scan, 0, place)}
        {show_plane("Heat map", scan, 0, place, heat=heat) if len(places) else ""}</div>"""


def compute_heat(scan: Scan, folder: Path) -> np.ndarray:
    """(Z, h, w) a locator's probability of an aneurysm at a place, the sum of its 13 maps. ValueError if the
    locator takes other volumes."""
    run = common.load_run(folder)
    if scan.settings != common.volume_settings(run.cfg):
        raise ValueError(f"{folder.name}: its volumes have other settings than those of the cache")
    with torch.inference_mode():
        images = torch.from_numpy(scan.voxels)[None].float() / 255
        maps = run.model(images).maps[0]
    return maps.sigmoid().sum(0).numpy()


# --- charts, pictures, tables -------------------------------------------------------------------------------

CHART_STYLE = {"font.size": 8, "text.parse_math": False, "image.cmap": "gray", "legend.frameon": False}


def new_chart(x_name: str, y_name: str, height: float = 2.6) -> Axes:
    axes = Figure(figsize=(4.2, height), layout="constrained").subplots()
    axes.set(xlabel=x_name, ylabel=y_name)
    return axes


def show_chart(title: str, caption: str, axes: Axes) -> str:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.figure.legend(loc="outside upper left")
    return show_picture(title, caption, axes.figure, "white")


def draw_histogram(title: str, caption: str, table: pd.DataFrame, column: str, kind: str) -> str:
    """How often a column has which value, stacked by another column."""
    table = table.dropna(subset=column).reset_index()
    if table.empty:
        return absent(f"{title}: no series states it.")
    values = table.pivot(columns=kind, values=column).round(3)  # equal but for rounding: equal
    axes = new_chart(title, "number")
    axes.hist(values.to_numpy(), 25, stacked=True, label=list(values))
    return show_chart(title, caption, axes)


def show_plane(
    title: str,
    scan: Scan,
    axis: int,
    place: np.ndarray,
    reach_mm: float = 0.0,
    heat: np.ndarray | None = None,
) -> str:
    """The plane through a place, or the maximum within reach of it, head up: with directions, a ring around
    each point near it, the box, and a heat map (Z, h, w) on a scale from 0 to 1."""
    figure = Figure(figsize=(3.4, 3.6), layout="constrained")
    axes = figure.subplots()
    down, across = (a for a in range(3) if a != axis)
    spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    planes = np.moveaxis(scan.voxels, axis, 0)
    last_index = len(planes) - 1
    middle = round(to_voxel(place, scan.affine)[0, axis])
    middle = min(max(middle, 0), last_index)
    reach = round(reach_mm / spacing_mm[axis])
    image = planes[max(middle - reach, 0) : middle + reach + 1].max(0)
    plain = axes.imshow(image, vmin=0, vmax=255)
    if heat is not None:
        slab = heat[middle]
        extent = plain.get_extent()
        axes.imshow(slab, "inferno", vmin=0, vmax=1, alpha=slab, extent=extent)
    axes.set_aspect(spacing_mm[down] / spacing_mm[across])
    first, last = to_voxel(scan.box, scan.affine)[:, [across, down]]
    width, height = last - first
    axes.add_patch(Rectangle(first, width, height, fill=False, color="C0"))
    for point in to_voxel(scan.points, scan.affine):
        away_mm = abs(point[axis] - middle) * spacing_mm[axis]
        if away_mm <= max(reach_mm, NEAR_MM):
            axes.plot(point[across], point[down], "o", **RING)
    if axis:
        axes.invert_yaxis()  # z grows upwards
    axes.set_axis_off()
    axes.set_title("RRA"[axis], loc="left", color="white")
    axes.set_title("LLP"[axis], loc="right", color="white")
    return show_picture(f"{title}, plane {middle} of 0 to {last_index}", "", figure)


def show_picture(title: str, caption: str, figure: Figure, colour: str = "black") -> str:
    data = io.BytesIO()
    figure.savefig(data, format="webp", dpi=150, facecolor=colour)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"""<figure><figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>
        <img alt="{escape(title)}" src="{uri}"></figure>"""


def show_table(table: pd.DataFrame, caption: str = "") -> str:
    """A table, escaped; of a long one the first and the last rows, and how many it has."""
    if table.empty:
        return absent(f"{caption} None.")
    table = table.rename_axis(columns=None)
    with pd.option_context("display.max_colwidth", None):
        body = table.to_html(
            index=False,
            border=0,
            na_rep="–",
            float_format="{:.4g}".format,
            max_rows=MAX_ROWS,
            show_dimensions="truncate",
        )
    return f'<figure class="table"><figcaption>{escape(caption)}</figcaption>{body}</figure>'


def absent(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def hide_folders(error: Exception) -> str:
    """The message without the folders of its paths."""
    return re.sub(r"\S*/", "", str(error))


def interval(result: dict, name: str) -> str:
    """`0.712 (0.65 to 0.77, 1990 draws)`, or why there is no interval."""
    if not result["draws_used"]:
        return f"{result[name]:.3f} (too few positives for an interval)"
    return f"{result[name]:.3f} ({result['low']:.2f} to {result['high']:.2f}, {result['draws_used']} draws)"


# --- the page -----------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1c1e21; --soft: #5c6166; --line: #d5d8db; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #15171a; --fore: #e6e8ea; --soft: #a3a9af; --line: #3b4046; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; background: var(--back); color: var(--fore);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; print-color-adjust: exact; }
nav { position: sticky; top: 0; z-index: 1; padding: 6px 0; background: var(--back); display: flex;
  flex-wrap: wrap; gap: 2px 14px; border-bottom: 1px solid var(--line); } nav a { color: var(--fore); }
section { scroll-margin-top: 70px; } h2 { margin: 40px 0 8px; } h3 { margin: 24px 0 6px; }
p, li { max-width: 85ch; } th { text-align: left; } .soft { color: var(--soft); font-size: 13px; }
.grid { display: grid; gap: 24px; margin: 16px 0; --width: 340px; } .panes { --width: 260px; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(var(--width), 100%), 1fr)); }
figure { margin: 0; break-inside: avoid; } img { width: 100%; height: auto; display: block; }
figcaption, table { font-size: 13px; line-height: 1.4; } figcaption { margin-bottom: 4px; }
.table { display: inline-block; vertical-align: top; overflow: auto; max-width: 100%; max-height: 500px;
  margin: 8px 0 16px; padding-right: 36px; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 2px 7px; min-width: 4em; vertical-align: top; }
@media print { nav { display: none; } .table { overflow: visible; max-height: none; } }
"""


def describe_score(result: dict, num_runs: int) -> str:
    return (
        f"wAUC {interval(result, 'wauc')}: predictions out of fold, pooled; runs: {num_runs}, series: "
        f"{result['num_series']}, patients: {result['num_patients']}. In brackets: 95 % interval, and over "
        f"how many draws of patients; a draw that leaves a label without a class does not count."
    )


def make_page(cache: Path, src: Path, outputs: Path, limit: int | None = None) -> str:
    """What was run, what came out and what to look at first; then the sections."""
    sections, facts = [], []
    runs, warnings = read_runs(outputs)
    try:
        table, points = read_cache(cache, limit)
    except (OSError, ValueError) as error:
        warnings.append(f"No data, since index.csv or train.csv cannot be read: {hide_folders(error)}")
    else:
        counts = {"series": len(table), "patients": table["patient"].nunique()}
        counts |= table["status"].value_counts().to_dict()
        facts.append(", ".join(f"{name}: {count}" for name, count in counts.items()))
        troubles = find_troubles(table)
        parts = []
        for title, rows in troubles.items():
            parts.append(f"<h3>{title}: {len(rows)}</h3>{show_table(rows)}")
            if len(rows):
                warnings.append(f"{title}: {len(rows)}; first {' '.join(map(str, rows.iloc[0]))}")
        sections += [data_section(table), images_section(table, cache, src), points_section(points)]
        sections.append(f'<section id="trouble"><h2>What went wrong</h2>{"".join(parts)}</section>')
    if runs:
        pooled = pool_oof(runs["oof"])
        result = common.score(pooled, pooled[PROBS].to_numpy())
        facts.append(describe_score(result, runs["oof"]["run"].nunique()))
        for name in runs["oof"].query("is_constant")["run"].unique():
            warnings.insert(0, f"{name} PREDICTS NEARLY THE SAME FOR ALL SERIES: its score is chance.")
        sections += [results_section(runs, result), cases_section(runs["proposals"], pooled, cache)]
    else:
        facts.append("No finished training runs.")
    names = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
        <meta name="viewport" content="width=device-width, initial-scale=1">
        <title>Intracranial aneurysms</title><style>{STYLE}</style></head>
        <body><h1>Intracranial aneurysms</h1>
        <nav>{"".join(f'<a href="#{name}">{title}</a>' for name, title in names)}</nav><main>
        <p>python eda.py --cache {escape(cache.absolute().name)} --src {escape(src.absolute().name)}
        --outputs {escape(outputs.absolute().name)}{f" --limit {limit}" if limit else ""};
        {time.strftime("%Y-%m-%d %H:%M %Z")};
        Python {sys.version.split()[0]}, torch {torch.__version__}, pandas {pd.__version__},
        numpy {np.__version__}. Research software, not a medical device.</p>
        {"".join(f"<p><b>{escape(text)}</b></p>" for text in facts)}
        <h3>Look at this first</h3>
        <ul>{"".join(f"<li>{escape(text)}</li>" for text in warnings or ["Nothing stands out."])}</ul>
        {"".join(sections)}</main></body></html>
"""


def main() -> int:
    parser = common.make_parser(__doc__)
    for name in ("cache", "dicoms", "outputs"):
        option = name.replace("dicoms", "src")
        parser.add_argument(f"--{option}", type=Path, default=name, metavar="DIR")
    parser.add_argument("--limit", type=common.positive_int, metavar="N")
    args = parser.parse_args()
    index = args.cache / "index.csv"
    if not index.is_file() and not args.outputs.is_dir():
        common.log(f"eda.py: nothing to report on: no {index}, no folder {args.outputs}")
        return 1
    stdout = common.reserve_stdout()
    with matplotlib.rc_context(CHART_STYLE):
        page = make_page(**vars(args))
    try:
        with stdout:
            stdout.write(page)
    except OSError as error:  # a full disk, or a reader such as `head` that has gone
        common.log(f"eda.py: stdout: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
