"""Show the data, what went wrong and the results on one page that a radiologist and an engineer both read.

in   --cache DIR    what preprocess.py wrote: index.csv, volumes, and train.csv where there are labels
     --src DIR      the DICOM tree, to show whole heads beside their volumes
     --outputs DIR  finished runs of train.py, at any depth
out  one HTML page on stdout that needs no other file and no network; progress goes to stderr
run  python eda.py > report.html

Numbers come from the tables and from the headers of the volumes; pixels are read of the shown examples only.
What is absent is said where it would stand. Patients are counted, never named.
exit 0 written, 1 nothing to report on, 2 wrong usage
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from sklearn.metrics import roc_curve

import common
from common import AP, LABELS, UID
from dicom import find_series, make_volume, read_series, to_lps, to_voxel

SHORT = (  # of the 14 labels
    *("L ICA infra", "R ICA infra", "L ICA supra", "R ICA supra", "L MCA", "R MCA", "ACom", "L ACA", "R ACA"),
    *("L PCom", "R PCom", "Basilar tip", "Other post.", "Present"),
)
MEASURES = {  # columns of the table, with name and meaning
    "age": ("Age (years)", "Not an input of the models."),
    "num_slices": ("Slices", "A slab of the volume is the mean of the slices in it."),
    "slice_mm": (
        "Distance between slices (mm)",
        "Where it is large, a small aneurysm touches one slice or two.",
    ),
    "thickness_mm": (
        "Slice thickness (mm)",
        "The smallest aneurysms are 2 mm wide: thicker slices blur them.",
    ),
    "row_mm": ("Pixel size (mm)", "Pixels finer than the volume's lose detail."),
    "coverage_mm": (
        "Height of the scan (mm)",
        "The volume shows what lies in the box, from the top of the head.",
    ),
    "slab_mm": ("Slab of the volume (mm)", "The thicker, the more a small aneurysm is averaged away."),
}
TEXT = dict.fromkeys((UID, "patient", "age"), str)  # types of columns that look like numbers
NAMES, TRUTH = list(LABELS), [f"label {name}" for name in LABELS]  # columns of oof.csv
PLACE = ["x_mm", "y_mm", "z_mm"]  # columns of proposals.csv
DIAGNOSTICS = ["oracle_wauc", "leak", "recall_10mm", "false_per_negative", "seconds"]  # of metrics.json
PLANES = ("axial", "coronal", "sagittal")  # across z, y, x
WHOLE_HEAD = {"base_slices": 256, "img_size": 256, "roi_mm": 280.0, "roi_top_mm": 600.0}
REACH_MM, NEAR_MM, ASKEW_MM = 20.0, 8.0, 10.0  # half of a projection; points shown on a slab; a wrong side
MAX_EXAMPLES, MAX_CASES, MAX_ROWS = 12, 6, 200  # bounds that keep the page small
list_series = functools.cache(find_series)

# --- what there is ------------------------------------------------------------------------------------------


def read_cache(cache: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """A row per series: index.csv, its labels (nan where there are none), facts of its volume; a row per
    annotated point; and what is wrong with train.csv. Raises ValueError or KeyError if index.csv is."""
    table, faults = pd.read_csv(cache / "index.csv", dtype=TEXT), []
    labels = pd.DataFrame(columns=[UID, "Modality", *NAMES])
    if (cache / "train.csv").is_file():
        try:
            labels = common.read_label_table(cache / "train.csv")
        except ValueError as error:
            faults.append(hide_folders(error))
    table = table.merge(labels, on=UID, how="left")
    table["modality"] = table["Modality"].fillna(table["modality"])  # the label table tells CTA from CT
    table["age"] = table["age"].map(common.parse_age)
    table = table.fillna({"modality": "unknown", "plane": "unknown", "reason": "", "notes": ""})
    facts, points = [], []
    for uid in table.loc[table["status"] != "failed", UID]:
        try:
            row, places = read_header(common.volume_path(cache, uid))
        except (OSError, ValueError) as error:
            row, places = {"unreadable": hide_folders(error)}, []
        facts.append({UID: uid, **row})
        points += [(uid, *place) for place in places]
    facts = pd.DataFrame(facts, columns=[UID, "unreadable", "settings", "slab_mm"])
    points = pd.DataFrame(points, columns=[UID, "label", "x_mm", "y_mm", "depth_mm", "depth"])
    return table.merge(facts, on=UID, how="left"), points, faults


def read_header(path: Path) -> tuple[dict, Iterable[tuple]]:
    """Facts of a cached volume, and of each point: label, mm to the left and to the back of the middle of the
    box, mm below its top, and that depth as a share of the box. No pixels are read."""
    tensors, meta = common.load_volume(path, ["points", "point_labels"])
    settings, spacing_mm = meta["settings"], meta["spacing_mm"]
    shape = np.array([settings["base_slices"], settings["img_size"], settings["img_size"]])
    z, y, x = ((tensors["points"] + 0.5 - shape / 2) * spacing_mm).T
    height_mm = shape[0] * spacing_mm[0]
    depth_mm = height_mm / 2 - z
    places = zip(tensors["point_labels"], x, y, depth_mm, depth_mm / height_mm, strict=True)
    return {"settings": json.dumps(settings), "slab_mm": spacing_mm[0]}, places


def read_runs(outputs: Path) -> tuple[list[dict], list[str]]:
    """The runs below a folder, and a line for each that is unfinished or cannot be read."""
    runs, faults = [], []
    for path in sorted(outputs.rglob("config.yaml")):
        try:
            runs.append(read_run(path.parent))
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"run {path.parent.name} is left out: {hide_folders(error)}")
    return runs, faults


def read_run(folder: Path) -> dict:
    """{folder, group: its name without seed and fold, weight, metrics, log, oof, proposals}."""
    cfg = common.load_config(folder / "config.yaml")
    run = {"folder": folder, "group": re.sub(r"_seed\d+_fold\d+$", "", folder.name)}
    run["weight"] = max(cfg.ensemble_weight, 1e-9)  # 0: a locator that only proposes
    run["metrics"] = json.loads((folder / "metrics.json").read_text())
    run["log"] = pd.read_csv(folder / "log.csv")[["epoch", "train_loss", "val_loss", "wauc"]]
    oof = pd.read_csv(folder / "oof.csv", dtype=TEXT)
    run["oof"] = oof[[UID, "patient", "modality", "plane", *NAMES, *TRUTH]]
    run["proposals"] = pd.DataFrame(columns=[UID, *PLACE, "score"])
    if cfg.task == "locate":
        run["proposals"] = pd.read_csv(folder / "proposals.csv", dtype=TEXT)[[UID, *PLACE, "score"]]
    if not np.isfinite(oof[NAMES + TRUTH].to_numpy(float)).all():
        raise ValueError("oof.csv: predictions are NaN or infinite")
    return run


def pool_oof(runs: list[dict]) -> pd.DataFrame:
    """A row per series: labels and the mean out-of-fold probabilities over runs, weighted as in infer.py."""
    rows = pd.concat([run["oof"].assign(weight=run["weight"]) for run in runs])
    rows["patient"] = rows["patient"].fillna(rows[UID])  # else a patient of its own
    rows[NAMES] = rows[NAMES].mul(rows["weight"], axis=0)
    series = rows.groupby(UID)
    means = series[NAMES].sum().div(series["weight"].sum(), axis=0)
    return series.first().assign(**means).reset_index()


def score_oof(rows: pd.DataFrame) -> dict:
    """common.score of a pooled table."""
    truth = rows[["patient", "plane"]].assign(Modality=rows["modality"])
    truth[NAMES] = rows[TRUTH]
    return common.score(truth, rows[NAMES].to_numpy())


# --- section: at a glance -----------------------------------------------------------------------------------


def describe_series(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    states = ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "doubtful", "failed"))
    return f"{len(table)} series of {plural(table['patient'].nunique(), 'patient')}: {states}."


def describe_score(result: dict, num_runs: int) -> str:
    present = result["per_label"][LABELS[AP]]
    return (
        f"wAUC {interval(result, 'wauc')}, AUC of {LABELS[AP]} {interval(present, 'auc')}: out-of-fold "
        f"predictions pooled over {plural(num_runs, 'run')}; {result['num_series']} series of "
        f"{plural(result['num_patients'], 'patient')}. In brackets: 95 % interval over "
        f"{result['draws_used']} draws of patients; one that leaves a label without a class does not count."
    )


def find_constant_runs(runs: list[dict]) -> list[str]:
    """A warning per run whose predictions hardly differ from series to series."""
    warnings = []
    for run in runs:
        low, high = run["oof"][LABELS[AP]].quantile([0.05, 0.95])
        if high - low < 0.02:
            warnings.append(
                f"NEARLY THE SAME FOR ALL SERIES: 90 % of what {run['folder'].name} predicts lies between "
                f"{low:.3f} and {high:.3f}. It does not tell series apart; whatever it scores is chance."
            )
    return warnings


# --- section: the data --------------------------------------------------------------------------------------


def data_section(table: pd.DataFrame) -> str:
    settings = pd.DataFrame(map(json.loads, table["settings"].dropna().unique()))
    planes = pd.crosstab(table["plane"], table["modality"], margins=True).reset_index()
    positives = table.groupby("modality")[NAMES].sum().T.astype(int)
    positives["all"] = positives.sum(axis=1)
    num_labelled = table[LABELS[AP]].notna().sum()
    figures = [draw_histogram(title, meaning, table, name) for name, (title, meaning) in MEASURES.items()]
    return f"""<section id="data"><h2>The data</h2>
        {show_table(settings, "Settings of the volumes; the box reaches down from the top of the head")}
        {show_table(planes, "Series by plane and modality")}
        {show_table(positives.reset_index(names="label"), f"Positive series of {num_labelled} with labels")}
        {grid(figures)}</section>"""


# --- section: the images ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What is drawn of a series: voxels uint8 (z, y, x), their affine to LPS mm, annotated points with their
    names, and the corners of the box that the model sees."""

    voxels: np.ndarray
    affine: np.ndarray
    points_lps: np.ndarray  # (P, 3)
    names: list[str]
    box_lps: np.ndarray  # (2, 3)
    settings: dict

    @property
    def place_lps(self) -> np.ndarray:
        """(3,) the first annotated point, else the middle of the box."""
        return [*self.points_lps, self.box_lps.mean(0)][0]


def read_scan(uid: str, cache: Path) -> Scan:
    """The cached volume of a series."""
    tensors, meta = common.load_volume(common.volume_path(cache, uid))
    voxels, affine = tensors["volume"], np.array(meta["affine"])
    points_lps = to_lps(tensors["points"], affine)
    names = [SHORT[label] for label in tensors["point_labels"]]
    box_lps = to_lps([[-0.5] * 3, np.array(voxels.shape) - 0.5], affine)
    return Scan(voxels, affine, points_lps, names, box_lps, meta["settings"])


def read_whole_head(scan: Scan, uid: str, src: Path) -> Scan:
    """The same series read again from DICOM: a volume over a larger box."""
    folder = src / "series" / uid
    files = sorted(folder.iterdir()) if folder.is_dir() else list_series(src)[0][uid]
    settings = {name: scan.settings[name] for name in common.VOLUME_FIELDS}
    cfg = common.config_from_dict(settings | WHOLE_HEAD)
    volume = make_volume(read_series(files, uid), cfg.volume)
    return replace(scan, voxels=volume.voxels, affine=volume.affine)


def images_section(table: pd.DataFrame, points: pd.DataFrame, cache: Path, src: Path) -> str:
    """An example per modality and plane, with an annotated point where there is one."""
    cached = table.dropna(subset="slab_mm").assign(is_bare=~table[UID].isin(points[UID]))
    cached = cached.sort_values(["modality", "plane", "is_bare", UID])
    chosen = cached.drop_duplicates(["modality", "plane"])[:MAX_EXAMPLES]
    examples = [show_example(row, read_scan(row[UID], cache), src) for row in chosen.to_dict("records")]
    return f"""<section id="images"><h2>The images</h2>
        <p>A series per modality and plane, with an annotated aneurysm where there is one (ring). R and L are
        the patient's sides, A is the front, P the back. Blue: the box that the model sees. Projections are
        maxima over {2 * REACH_MM:.0f} mm. Arteries are bright in CTA and MRA; T2 shows them dark, best in the
        slices.</p>
        {"".join(examples) or absent("No readable volume in the cache.")}</section>"""


def show_example(row: dict, scan: Scan, src: Path) -> str:
    """A series: where the box lies in the head, and a slice before and after."""
    whole, fault, axis = scan, "", PLANES.index(row["plane"])
    try:
        whole = read_whole_head(scan, row[UID], src)
    except (ValueError, OSError, KeyError) as error:
        fault = f"The volume alone is shown, DICOM is not at hand: {hide_folders(error)}"
    facts = f"{row[UID]}: {row['num_slices']} slices, {row['slice_mm']:.2f} mm apart. {row['notes']} {fault}"
    return f"""<h3>{esc(row["modality"])}, {esc(row["plane"])}</h3>{absent(facts)}<div class="grid panes">
        {show_plane("Coronal projection", whole, 1, REACH_MM)}
        {show_plane("Sagittal projection", whole, 2, REACH_MM)}
        {show_plane("Before: as acquired", whole, axis)}
        {show_plane("After: in the volume", scan, axis)}</div>"""


# --- section: where the aneurysms are -----------------------------------------------------------------------


def points_section(table: pd.DataFrame, points: pd.DataFrame) -> str:
    """All annotated points in the frame of the box, from three sides; their depth below its top."""
    points = points.merge(table[[UID, "modality"]], on=UID)
    points["artery"] = [re.sub("^[LR] ", "", SHORT[label]) for label in points["label"]]
    names = {"x_mm": "right  ←  mm  →  left", "y_mm": "front  ←  mm  →  back", "depth_mm": "mm below the top"}
    meaning = f"{(points['depth'] < 1 / 3).mean():.0%} of the points lie in the upper third of their box."
    figures = [draw_histogram("Depth below the top of the box (mm)", meaning, points, "depth_mm", "points")]
    for view, x, y in (
        ("From below", "x_mm", "y_mm"),
        ("From the front", "x_mm", "depth_mm"),
        ("From the left", "y_mm", "depth_mm"),
    ):
        axes = new_chart(names[x], names[y], 4.2)
        for artery, rows in points.groupby("artery"):
            axes.scatter(rows[x], rows[y], s=9, label=artery)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        figures.append(show_chart(view, "0 is the middle of the box that the model sees.", axes))
    return f"""<section id="points"><h2>Where the aneurysms are</h2>
        {grid(figures) if len(points) else absent("No annotated points in the cache.")}</section>"""


# --- section: what went wrong -------------------------------------------------------------------------------


def find_troubles(table: pd.DataFrame, points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> a row per case."""
    outside = table.query("points_inside < num_points")
    return {
        "Series that failed": table.query("status == 'failed'")[[UID, "reason"]],
        "Doubtful volumes": table.query("status == 'doubtful'")[[UID, "reason", "notes"]],
        "Unreadable volumes": table.dropna(subset="unreadable")[[UID, "unreadable"]],
        "Points outside the box": outside[[UID, "num_points", "points_inside"]],
        "Labels and points at odds": find_contradictions(table.dropna(subset="slab_mm"), points),
        "Kinds of repairs and assumptions": count_notes(table),
    }


def find_contradictions(cached: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Where labels, points and sides do not fit each other."""
    points = points.assign(label=[LABELS[label] for label in points["label"]])
    pairs = cached.melt(UID, NAMES[:AP], "label", "stated").merge(points, how="left")
    side = pairs["label"].str.split().str[0].map({"Left": 1, "Right": -1})
    faults = {
        "a point, but the label is 0": (pairs["stated"] == 0) & pairs["x_mm"].notna(),
        "labelled, but no point": (pairs["stated"] == 1) & pairs["x_mm"].isna(),
        "a point on the other side": pairs["x_mm"] * side < -ASKEW_MM,
    }
    pairs["what"] = np.select(list(faults.values()), list(faults), "")
    return pairs.loc[pairs["what"] != "", [UID, "label", "what"]]


def count_notes(table: pd.DataFrame) -> pd.DataFrame:
    """Kinds of notes, most frequent first; notes that differ in numbers only are of one kind."""
    notes = table["notes"].str.split("; ").explode()
    kinds = notes.str.replace(r"(?<![\w(,])[-+]?\d[\d.]*", "n", regex=True)
    return kinds[kinds != ""].value_counts().reset_index(name="series")


def trouble_section(troubles: dict[str, pd.DataFrame]) -> str:
    parts = []
    for title, rows in troubles.items():
        parts.append(f"<h3>{title}: {len(rows)}</h3>")
        parts.append(show_table(rows) if len(rows) else absent("None."))
    return f"""<section id="trouble"><h2>What went wrong</h2>{"".join(parts)}</section>"""


# --- section: the results -----------------------------------------------------------------------------------


def results_section(runs: list[dict], pooled: pd.DataFrame, result: dict) -> str:
    tables = {}
    for group in sorted({run["group"] for run in runs}):
        tables[group] = pool_oof([run for run in runs if run["group"] == group])
    figures = [*training_figures(runs, list(tables)), roc_figure(tables | {"all runs": pooled})]
    parts = []
    for name in ("label", "modality", "plane"):
        rows = pd.DataFrame(result[f"per_{name}"]).T.drop(columns="undefined", errors="ignore")
        parts.append(show_table(rows.reset_index(names=name), f"The pooled predictions by {name}"))
    return f"""<section id="results"><h2>The results</h2><p>{esc(describe_score(result, len(runs)))}</p>
        {runs_table(runs, tables)}{points_table(runs, "operating_points")}{points_table(runs, "froc")}
        {grid(figures)}{"".join(parts)}</section>"""


def runs_table(runs: list[dict], tables: dict[str, pd.DataFrame]) -> str:
    """A row per group of runs: the score of its pooled predictions, the mean diagnostics of its runs."""
    metrics = pd.DataFrame([run["metrics"] for run in runs]).reindex(columns=DIAGNOSTICS)
    metrics = metrics.map(lambda value: np.ravel(value)[0]).astype(float)  # [value, low, high] or a value
    means = metrics.groupby([run["group"] for run in runs]).mean()
    means.insert(0, "wAUC", [interval(score_oof(tables[group]), "wauc") for group in means.index])
    caption = (
        "Runs compared, on patients held back. oracle_wauc: with crops at annotated places, which no new "
        "patient has; leak: what that adds. Both are diagnostics, not results."
    )
    return show_table(means.reset_index(names="runs"), caption)


def points_table(runs: list[dict], key: str) -> str:
    """A list of metrics.json, such as the operating points, of all runs that have it."""
    rows = [{"run": run["folder"].name, **row} for run in runs for row in run["metrics"].get(key, [])]
    return show_table(pd.DataFrame(rows), key.replace("_", " ")) if rows else ""


def training_figures(runs: list[dict], groups: list[str]) -> list[str]:
    """Losses and validation wAUC by epoch; the runs of one group share a colour."""
    figures = []
    for column, caption in (
        ("train_loss", "Falls while the network fits the training series."),
        ("val_loss", "Of patients held back. Rising while the other falls: overfitting."),
        ("wauc", "Of patients held back, without annotated crops. Chance is 0.5."),
    ):
        axes = new_chart("epoch", column)
        for run in runs:
            colour = f"C{groups.index(run['group'])}"
            axes.plot(run["log"]["epoch"], run["log"][column], ".-", color=colour, label=run["group"])
        figures.append(show_chart(column, caption, axes))
    return figures


def roc_figure(tables: dict[str, pd.DataFrame]) -> str:
    """ROC of Aneurysm Present per group of runs; the last one on top."""
    axes = new_chart("false alarms: share of negatives", "found: share of positives")
    for name, rows in tables.items():
        if rows[TRUTH[AP]].nunique() == 2:
            false_alarms, found, _ = roc_curve(rows[TRUTH[AP]], rows[LABELS[AP]])
            axes.plot(false_alarms, found, label=name)
    return show_chart("ROC of Aneurysm Present", "Chance is the diagonal.", axes)


# --- section: the hardest cases -----------------------------------------------------------------------------


def cases_section(runs: list[dict], pooled: pd.DataFrame, cache: Path) -> str:
    """The predictions that are most wrong, of positives and of negatives."""
    proposals = pd.concat([run["proposals"].assign(folder=run["folder"]) for run in runs])
    errors = (pooled[TRUTH[AP]] - pooled[LABELS[AP]]).abs()
    rows = pooled.assign(error=errors).sort_values("error", ascending=False)
    cases = []
    for row in rows.groupby(TRUTH[AP]).head(MAX_CASES).to_dict("records"):
        places = proposals[proposals[UID] == row[UID]].sort_values("score")
        try:
            cases.append(show_case(row, places, read_scan(row[UID], cache)))
        except (OSError, ValueError) as error:
            cases.append(absent(f"{row[UID]}: {hide_folders(error)}"))
    return f"""<section id="cases"><h2>The hardest cases</h2>
        <p>Left the slab of a locator's likeliest place, else of the annotated one; right the same slab with the
        locator's probability of an aneurysm, or a coronal projection where there is no locator.</p>
        {grid(cases, "wide")}</section>"""


def show_case(row: dict, places: pd.DataFrame, scan: Scan) -> str:
    """A slab, beside it its heat map or a coronal projection. places: rows of proposals, the best one last."""
    figure = Figure(figsize=(7, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(places):
        place_lps = places[PLACE].to_numpy(float)[-1]
        draw_plane(right, scan, 0, place_lps)
        draw_heat(right, scan, place_lps, places["folder"].iloc[-1])
    else:
        place_lps = scan.place_lps
        draw_plane(right, scan, 1, place_lps, REACH_MM)
    draw_plane(left, scan, 0, place_lps)
    truth = ", ".join(scan.names) or ("positive" if row[TRUTH[AP]] else "negative")
    title = f"{row['modality']} …{row[UID][-8:]}"
    return show_picture(title, f"Truth: {truth}. Predicted: {row[LABELS[AP]]:.2f}.", figure)


def draw_heat(axes: Axes, scan: Scan, place_lps: np.ndarray, folder: Path) -> None:
    """A locator's probability of an aneurysm, the sum of its 13 maps, over the slab of a place, on a scale from
    0 to 1. Raises ValueError if the locator cannot be asked."""
    run = common.load_run(folder)
    difference = common.describe_difference(scan.settings, common.volume_settings(run.cfg))
    if difference:
        raise ValueError(f"{folder.name} has volumes of other settings: {difference}")
    with torch.inference_mode():
        maps = run.model(torch.from_numpy(scan.voxels)[None].float() / 255).maps
    z = round(to_voxel(place_lps, scan.affine)[0, 0])
    heat = maps[0, :, z].sigmoid().sum(0).numpy()
    edges = np.array(scan.voxels.shape) - 0.5
    extent = (-0.5, edges[2], edges[1], -0.5)
    image = axes.imshow(heat, "inferno", extent=extent, alpha=heat, vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes).ax.tick_params(colors="white")


# --- charts, pictures, tables -------------------------------------------------------------------------------

FORE = "#123457"  # becomes the page's own text colour, light or dark
CHART_STYLE = {
    "font.size": 8,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "gray",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), FORE),
}
LETTERS = {"color": "white", "fontsize": 8, "path_effects": [withStroke(linewidth=2, foreground="black")]}


def new_chart(x_name: str, y_name: str, height: float = 2.6) -> Axes:
    axes = Figure(figsize=(4.2, height), layout="constrained").subplots()
    axes.set(xlabel=x_name, ylabel=y_name)
    return axes


def show_chart(title: str, caption: str, axes: Axes) -> str:
    """The chart as inline SVG; equal labels stand in the legend once."""
    handles, names = axes.get_legend_handles_labels()
    keys = dict(zip(names, handles, strict=True))
    if len(keys) > 1:
        axes.figure.legend(keys.values(), keys, loc="outside upper left", ncols=2)
    text = io.StringIO()
    axes.figure.savefig(text, format="svg", transparent=True)
    drawing = text.getvalue()
    drawing = re.sub(r' id="\w+_\d+"', "", drawing[drawing.index("<svg") :])  # each id once on a page
    return show_figure(title, caption, drawing.replace(FORE, "currentColor"))


def draw_histogram(title: str, caption: str, table: pd.DataFrame, column: str, unit: str = "series") -> str:
    """Values of a column, stacked by modality."""
    groups = list(table.dropna(subset=column).groupby("modality")[column])
    if not groups:
        return absent(f"{title}: no series states it.")
    kinds, values = zip(*groups, strict=True)
    axes = new_chart(title, unit)
    axes.hist(values, 24, stacked=True, label=kinds)
    return show_chart(title, caption, axes)


def draw_plane(axes: Axes, scan: Scan, axis: int, place_lps: np.ndarray, reach_mm: float = 0.0) -> None:
    """The plane through a place, or the maximum within reach of it, head up: with directions, a bar of 50 mm,
    the points near it, and the box."""
    down, across = (a for a in range(3) if a != axis)
    steps = np.linalg.norm(scan.affine[:3, :3], axis=0)
    centre, num = to_voxel(place_lps, scan.affine)[0, axis], scan.voxels.shape[axis]
    reach = reach_mm / steps[axis]
    first, last = np.clip(np.rint([centre - reach, centre + reach]), 0, num - 1).astype(int)
    image = scan.voxels.take(range(first, last + 1), axis).max(axis)
    axes.imshow(image, vmin=0, vmax=255, aspect=steps[down] / steps[across])
    axes.set_axis_off()
    if axis:
        axes.invert_yaxis()  # z grows upwards
    for point, name in zip(to_voxel(scan.points_lps, scan.affine), scan.names, strict=True):
        if abs(point[axis] - centre) * steps[axis] <= max(reach_mm, NEAR_MM):
            axes.plot(point[across], point[down], "o", markersize=10, fillstyle="none", color="yellow")
            axes.text(point[across], point[down], f"   {name}", **LETTERS)
    low, high = to_voxel(scan.box_lps, scan.affine)[:, [across, down]]
    axes.add_patch(Rectangle(low, *(high - low), fill=False, color="C0"))
    bar = 50 / steps[across] / image.shape[1]
    axes.plot([0.05, 0.05 + bar], [0.04, 0.04], color="white", transform=axes.transAxes)
    for x, y, text in ((0.05, 0.06, "50 mm"), (0.02, 0.5, "RRA"[axis]), (0.94, 0.5, "LLP"[axis])):
        axes.text(x, y, text, transform=axes.transAxes, **LETTERS)


def show_plane(title: str, scan: Scan, axis: int, reach_mm: float = 0.0) -> str:
    figure = Figure(figsize=(3.4, 3.4))
    draw_plane(figure.add_axes((0, 0, 1, 1)), scan, axis, scan.place_lps, reach_mm)
    return show_picture(title, "", figure)


def show_picture(title: str, caption: str, figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="jpeg", dpi=150, facecolor="black")
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return show_figure(title, caption, f'<img alt="{esc(title)}" src="{uri}">')


def show_figure(title: str, caption: str, body: str) -> str:
    return f"<figure><figcaption><b>{esc(title)}.</b> {esc(caption)}</figcaption>{body}</figure>"


def show_table(table: pd.DataFrame, caption: str = "") -> str:
    """The first rows of a table, escaped."""
    table = table.rename_axis(columns=None)
    with pd.option_context("display.max_colwidth", None):
        body = table[:MAX_ROWS].to_html(index=False, border=0, na_rep="–", float_format="{:.4g}".format)
    if len(table) > MAX_ROWS:
        caption += f" ({MAX_ROWS} of {len(table)} rows)"
    return f'<p>{esc(caption)}</p><div class="scroll">{body}</div>'


def grid(figures: Iterable[str], kind: str = "") -> str:
    return f'<div class="grid {kind}">{"".join(figures)}</div>'


def absent(text: str) -> str:
    """A line in place of what is absent."""
    return f'<p class="soft">{esc(text)}</p>'


def esc(text: str) -> str:
    return html.escape(text)


def hide_folders(error: Exception) -> str:
    """The message without the folders of its paths, on one line."""
    return re.sub(r"\S*/", "", " ".join(str(error).split()))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def interval(result: dict, name: str) -> str:
    """`0.712 (0.65 to 0.77)`; a dash where undefined."""
    if np.isnan(result[name]):
        return "–"
    return f"{result[name]:.3f} ({result['low']:.2f} to {result['high']:.2f})"


# --- the page -----------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1c1e21; --soft: #5c6166; --line: #d5d8db; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #15171a; --fore: #e6e8ea; --soft: #a3a9af; --line: #3b4046; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; background: var(--back); color: var(--fore);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; print-color-adjust: exact; }
nav { position: sticky; top: 0; z-index: 1; padding: 6px 0; background: var(--back);
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 2px 14px; }
nav a { color: var(--fore); }
section { scroll-margin-top: 70px; } h2 { margin: 40px 0 8px; } h3 { margin: 24px 0 6px; }
p, li { max-width: 85ch; } .soft { color: var(--soft); font-size: 13px; }
.grid { display: grid; gap: 24px; margin: 16px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--width, 340px), 100%), 1fr)); }
.wide { --width: 520px; } .panes { --width: 260px; }
figure { margin: 0; break-inside: avoid; } figure svg, img { width: 100%; height: auto; display: block; }
figcaption, table { font-size: 13px; line-height: 1.4; } figcaption { margin-bottom: 4px; }
.scroll { overflow: auto; max-height: 480px; margin: -6px 0 20px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 2px 7px; min-width: 4em; text-align: left; vertical-align: top; }
@media print { nav { display: none; } .scroll { overflow: visible; max-height: none; } }
"""


def make_page(cache: Path, src: Path, outputs: Path) -> str:
    """What was run, what came out and what to look at first; then the sections."""
    sections, facts = [], []
    runs, warnings = read_runs(outputs)
    try:
        table, points, faults = read_cache(cache)
    except (OSError, ValueError, KeyError) as error:
        warnings.append(f"No data: index.csv of the cache: {hide_folders(error)}")
    else:
        facts.append(describe_series(table))
        troubles = find_troubles(table, points)
        for title, rows in troubles.items():
            if len(rows):
                warnings.append(f"{title}: {len(rows)}; first {', '.join(map(str, rows.iloc[0]))}")
        warnings += faults
        sections += [data_section(table), images_section(table, points, cache, src)]
        sections += [points_section(table, points), trouble_section(troubles)]
    if runs:
        pooled = pool_oof(runs)
        result = score_oof(pooled)
        facts.append(describe_score(result, len(runs)))
        warnings = find_constant_runs(runs) + warnings
        sections += [results_section(runs, pooled, result), cases_section(runs, pooled, cache)]
    else:
        facts.append("No finished training runs.")
    names = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
        <meta name="viewport" content="width=device-width, initial-scale=1">
        <title>Intracranial aneurysms</title><style>{STYLE}</style></head>
        <body><h1>Intracranial aneurysms: data and results</h1>
        <nav>{"".join(f'<a href="#{name}">{title}</a>' for name, title in names)}</nav><main>
        <p>python eda.py --cache {esc(cache.name)} --src {esc(src.name)} --outputs {esc(outputs.name)};
        {time.strftime("%Y-%m-%d %H:%M %Z")}; Python {sys.version.split()[0]}, torch {torch.__version__},
        pandas {pd.__version__}, numpy {np.__version__}. Research software, not a medical device.</p>
        {"".join(f"<p><b>{esc(text)}</b></p>" for text in facts)}
        <h3>Look at this first</h3>
        <ul>{"".join(f"<li>{esc(text)}</li>" for text in warnings or ["Nothing stands out."])}</ul>
        {"".join(sections)}</main></body></html>
"""


def main() -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--cache", type=Path, metavar="DIR", default=Path("cache"), help="default: cache")
    parser.add_argument("--src", type=Path, metavar="DIR", default=Path("dicoms"), help="default: dicoms")
    parser.add_argument(
        "--outputs", type=Path, metavar="DIR", default=Path("outputs"), help="default: outputs"
    )
    args = parser.parse_args()
    if not (args.cache / "index.csv").is_file() and not args.outputs.is_dir():
        common.log(f"nothing to report on: neither {args.cache}/index.csv nor {args.outputs}/ exists")
        return 1
    stdout = common.reserve_stdout()
    with matplotlib.rc_context(CHART_STYLE), stdout:
        stdout.write(make_page(args.cache, args.src, args.outputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
