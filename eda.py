"""Show the data, what went wrong and the results on one page that a radiologist and an engineer both read.

in   --cache DIR    (cache) what preprocess.py wrote: index.csv, volumes, train.csv where there are labels
     --src DIR      (dicoms) the DICOM tree, to show whole heads beside their volumes
     --outputs DIR  (outputs) finished runs of train.py, at any depth
out  one HTML page on stdout that needs no other file and no network; progress goes to stderr
run  python eda.py > report.html

Numbers come from the tables and from the headers of the volumes; pixels are read of the shown examples only.
What is absent is said where it would stand. Patients are counted, never named.
exit 0 written, 1 nothing to report on, 2 wrong usage
"""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import sys
import time
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from sklearn.metrics import roc_curve

import common
from common import AP, LABELS, UID
from dicom import find_series, make_volume, read_series, to_lps, to_voxel

SHORT = (  # of the 14 labels
    "L ICA infra",
    "R ICA infra",
    "L ICA supra",
    "R ICA supra",
    "L MCA",
    "R MCA",
    "ACom",
    "L ACA",
    "R ACA",
    "L PCom",
    "R PCom",
    "Basilar tip",
    "Other post.",
    "Present",
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
TEXT = dict.fromkeys((UID, "patient", "plane", "reason", "notes"), str)  # columns, even if all are empty
NAMES, TRUTH = list(LABELS), [f"label {name}" for name in LABELS]  # columns of oof.csv
PRESENT, IS_PRESENT = NAMES[AP], TRUTH[AP]
PLACE = ["x_mm", "y_mm", "z_mm"]  # columns of proposals.csv
DIAGNOSTICS = ["recall_10mm", "oracle_wauc", "leak"]  # of metrics.json
WHOLE_HEAD = {"base_slices": 256, "img_size": 256, "roi_mm": 280.0, "roi_top_mm": 600.0}
REACH_MM, NEAR_MM, ASKEW_MM = 20.0, 8.0, 10.0  # half of a projection; points shown on a slab; a wrong side
MAX_CASES, MAX_ROWS = 6, 200  # bounds that keep the page small
list_series = functools.cache(find_series)

# --- what there is ------------------------------------------------------------------------------------------


def read_cache(cache: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per series: index.csv, its labels (nan where there are none), facts of its volume; and a row per
    annotated point. Raises ValueError or KeyError for a table that is broken."""
    table = pd.read_csv(cache / "index.csv", dtype=TEXT)
    labels = pd.DataFrame(columns=[UID, "Modality", *NAMES])
    if (cache / "train.csv").is_file():
        labels = common.read_label_table(cache / "train.csv")
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
    return table.merge(facts, on=UID, how="left"), points


def read_header(path: Path) -> tuple[dict, list[tuple]]:
    """Facts of a cached volume, and of each point: label, mm to the left and to the back of the middle of the
    box, mm below its top, and that depth as a share of the box. No pixels are read."""
    tensors, meta = common.load_volume(path, ["points", "point_labels"])
    settings, spacing_mm = meta["settings"], meta["spacing_mm"]
    shape = np.array([settings["base_slices"]] + [settings["img_size"]] * 2)
    z, y, x = ((tensors["points"] + 0.5 - shape / 2) * spacing_mm).T
    height_mm = shape[0] * spacing_mm[0]
    depth_mm = height_mm / 2 - z
    places = zip(tensors["point_labels"], x, y, depth_mm, depth_mm / height_mm, strict=True)
    facts = {"settings": json.dumps(settings), "slab_mm": spacing_mm[0]}
    return facts, list(places)


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
    oof = pd.read_csv(folder / "oof.csv", dtype=TEXT)
    if not np.isfinite(oof[NAMES + TRUTH].to_numpy(float)).all():
        raise ValueError("oof.csv: predictions are NaN or infinite")
    proposals = pd.DataFrame(columns=[UID, *PLACE, "score"])
    if (folder / "proposals.csv").is_file():
        proposals = pd.read_csv(folder / "proposals.csv", dtype=TEXT)[list(proposals)]
    return {
        "folder": folder,
        "group": re.sub(r"_seed\d+_fold\d+$", "", folder.name),
        "weight": max(cfg.ensemble_weight, 1e-9),  # 0: a locator that only proposes
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "log": pd.read_csv(folder / "log.csv"),
        "oof": oof[[UID, "patient", "modality", "plane", *NAMES, *TRUTH]],
        "proposals": proposals,
    }


def pool_oof(runs: list[dict]) -> pd.DataFrame:
    """A row per series: labels and the mean out-of-fold probabilities over runs, weighted as in infer.py."""
    rows = pd.concat([run["oof"].assign(weight=run["weight"]) for run in runs])
    rows["patient"] = rows["patient"].fillna(rows[UID])  # else a patient of its own
    rows[NAMES] = rows[NAMES].mul(rows["weight"], axis=0)
    series = rows.groupby(UID)
    means = series[NAMES].sum().div(series["weight"].sum(), axis=0)
    return series.first().assign(**means).reset_index()


def score_oof(rows: pd.DataFrame, draws: int) -> dict:
    """common.score of a pooled table."""
    truth = rows[["patient", "plane"]].assign(Modality=rows["modality"])
    truth[NAMES] = rows[TRUTH]
    return common.score(truth, rows[NAMES].to_numpy(), draws)


# --- section: at a glance -----------------------------------------------------------------------------------


def describe_series(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    return (
        f"{len(table)} series of {plural(table['patient'].nunique(), 'patient')}: {counts.get('ok', 0)} ok, "
        f"{counts.get('doubtful', 0)} doubtful, {counts.get('failed', 0)} failed."
    )


def describe_score(result: dict, num_runs: int) -> str:
    present = result["per_label"][PRESENT]
    return (
        f"wAUC {interval(result, 'wauc')}, AUC of {PRESENT} {interval(present, 'auc')}: predictions "
        f"out of fold, pooled over {plural(num_runs, 'run')}; {result['num_series']} series of "
        f"{plural(result['num_patients'], 'patient')}. In brackets: 95 % interval, over how many draws "
        f"of patients; one that leaves a label without a class does not count."
    )


def find_constant_runs(runs: list[dict]) -> list[str]:
    """A warning per run whose predictions hardly differ from series to series."""
    warnings = []
    for run in runs:
        low, high = run["oof"][PRESENT].quantile([0.05, 0.95])
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
    positives = table.groupby("modality")[NAMES].sum().T
    positives["all"] = positives.sum(axis=1)
    num_labelled = table[PRESENT].count()
    labelled = f"Positive series of {num_labelled} with labels in train.csv."
    figures = [draw_histogram(title, meaning, table, name) for name, (title, meaning) in MEASURES.items()]
    return f"""<section id="data"><h2>The data</h2>
        {show_table(settings, "Settings of the volumes; the box reaches down from the top of the head")}
        {show_table(planes, "Series by plane and modality")}
        {show_table(positives.reset_index(names="label") if num_labelled else positives[:0], labelled)}
        <div class="grid">{"".join(figures)}</div></section>"""


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
    return Scan(
        voxels,
        affine,
        points_lps,
        names,
        box_lps,
        meta["settings"],
    )


def read_whole_head(scan: Scan, uid: str, src: Path) -> Scan:
    """The same series read again from DICOM: a volume over a larger box."""
    folder = src / "series" / uid
    files = sorted(folder.iterdir()) if folder.is_dir() else list_series(src)[0][uid]
    settings = {name: scan.settings[name] for name in common.VOLUME_FIELDS}
    cfg = common.config_from_dict(settings | WHOLE_HEAD)
    volume = make_volume(read_series(files, uid), cfg.volume)
    return replace(scan, voxels=volume.voxels, affine=volume.affine)


def images_section(
    table: pd.DataFrame,
    points: pd.DataFrame,
    cache: Path,
    src: Path,
) -> str:
    """An example per modality and plane, with an annotated point where there is one."""
    cached = table.assign(is_marked=table[UID].isin(points[UID])).dropna(subset="slab_mm")
    cached = cached.sort_values(["modality", "plane", "is_marked", "num_slices"])
    chosen = cached.drop_duplicates(["modality", "plane"], keep="last")
    examples = [show_example(row, read_scan(row[UID], cache), src) for row in chosen.to_dict("records")]
    return f"""<section id="images"><h2>The images</h2>
        <p>A series per modality and plane, with an annotated aneurysm where there is one (ring). R and L are
        the patient's sides, A is the front, P the back. Blue: the box that the model sees. Projections are
        maxima over {2 * REACH_MM:.0f} mm. Arteries are bright in CTA and MRA; T2 shows them dark, best in the
        slices.</p>
        {"".join(examples) or absent("No readable volume in the cache.")}</section>"""


def show_example(row: dict, scan: Scan, src: Path) -> str:
    """A series: where the box lies in the head, and a slice before and after."""
    common.log(f"example: {row['modality']}, {row['plane']}")
    whole, fault, axis = scan, "", {"coronal": 1, "sagittal": 2}.get(row["plane"], 0)
    try:
        whole = read_whole_head(scan, row[UID], src)
    except (ValueError, OSError, KeyError) as error:
        fault = f"The volume alone is shown: {hide_folders(error)}"
    spacing = f"{plural(int(row['num_slices']), 'slice')}, {row['slice_mm']:.2f} mm apart"
    return f"""<h3>{escape(row["modality"])}, {escape(row["plane"])}</h3>
        {absent(f"{row[UID]}: {spacing}. {row['notes']} {fault}")}
        <div class="grid panes">
        {show_plane("Coronal projection", whole, 1, REACH_MM)}
        {show_plane("Sagittal projection", whole, 2, REACH_MM)}
        {show_plane("Before: as acquired", whole, axis)}
        {show_plane("After: in the volume", scan, axis)}</div>"""


# --- section: where the aneurysms are -----------------------------------------------------------------------


def points_section(points: pd.DataFrame) -> str:
    """All annotated points in the frame of the box, from three sides; their depth below its top."""
    points = points.assign(
        artery=[SHORT[label].removeprefix("L ").removeprefix("R ") for label in points["label"]]
    )
    names = {
        "x_mm": "right  ←  mm  →  left",
        "y_mm": "front  ←  mm  →  back",
        "depth_mm": "mm below the top",
    }
    meaning = f"{(points['depth'] < 1 / 3).mean():.0%} of the points lie in the upper third of their box."
    figures = [draw_histogram("Depth below the top of the box (mm)", meaning, points, "depth_mm", "artery")]
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
        <div class="grid">{"".join(figures) if len(points) else absent("No annotated points in the cache.")}
        </div></section>"""


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
    points = points.assign(label=np.array(LABELS)[points["label"].astype(int)])
    pairs = cached.melt(UID, NAMES[:AP], "label", "stated").merge(points, how="left")
    side = pairs["label"].str[0].map({"L": 1, "R": -1})
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
    kinds = notes.str.replace(r"(?<!\w)[-+]?\d[\d.]*(?![\w,]*\))", "n", regex=True)
    return kinds[kinds != ""].value_counts().reset_index(name="series")


def trouble_section(troubles: dict[str, pd.DataFrame]) -> str:
    parts = [f"<h3>{title}: {len(rows)}</h3>{show_table(rows)}" for title, rows in troubles.items()]
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
    return f"""<section id="results"><h2>The results</h2>
        {runs_table(runs, tables)}{points_table(runs, "operating_points")}{points_table(runs, "froc")}
        <div class="grid">{"".join(figures)}</div>{"".join(parts)}</section>"""


def runs_table(runs: list[dict], tables: dict[str, pd.DataFrame]) -> str:
    """A row per group of runs: the score of its pooled predictions, the mean diagnostics of its runs."""
    metrics = pd.DataFrame([run["metrics"] for run in runs]).reindex(columns=DIAGNOSTICS)
    metrics = metrics.map(lambda value: np.ravel(value)[0]).astype(float)  # [value, low, high] or a value
    means = metrics.groupby([run["group"] for run in runs]).mean()
    means.insert(0, "wAUC", [interval(score_oof(tables[group], 500), "wauc") for group in means.index])
    caption = (
        "Runs compared, on patients held back. oracle_wauc: with crops at annotated places, which no new "
        "patient has; leak: what that adds. Both are diagnostics, not results."
    )
    return show_table(means.reset_index(names="runs"), caption)


def points_table(runs: list[dict], key: str) -> str:
    """A list of metrics.json, such as the operating points, of all runs that have it."""
    rows = [{"run": run["folder"].name, **row} for run in runs for row in run["metrics"].get(key, [])]
    caption = f"{key.replace('_', ' ')} with 95 % intervals over `bootstrap` (a setting) draws of patients."
    return show_table(pd.DataFrame(rows), caption)


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
        false_alarms, found, _ = roc_curve(rows[IS_PRESENT], rows[PRESENT])
        axes.plot(false_alarms, found, label=name)
    return show_chart("ROC of Aneurysm Present", "Chance is the diagonal.", axes)


# --- section: the hardest cases -----------------------------------------------------------------------------


def cases_section(runs: list[dict], pooled: pd.DataFrame, cache: Path) -> str:
    """The predictions that are most wrong, of positives and of negatives."""
    proposals = pd.concat([run["proposals"].assign(folder=run["folder"]) for run in runs])
    rows = pooled.assign(error=abs(pooled[IS_PRESENT] - pooled[PRESENT]))
    rows = rows.sort_values("error", ascending=False)
    cases = []
    for row in rows.groupby(IS_PRESENT).head(MAX_CASES).to_dict("records"):
        common.log(f"hard case: {row[UID]}")
        places = proposals[proposals[UID] == row[UID]].sort_values("score")
        try:
            cases.append(show_case(row, places, read_scan(row[UID], cache)))
        except (OSError, ValueError) as error:
            cases.append(absent(f"{row[UID]}: {hide_folders(error)}"))
    return f"""<section id="cases"><h2>The hardest cases</h2>
        <p>Left the slab of a locator's likeliest place, else of the annotated one; right the same with the
        locator's probability of an aneurysm, or a coronal projection where there is no locator.</p>
        <div class="grid wide">{"".join(cases)}</div></section>"""


def show_case(row: dict, places: pd.DataFrame, scan: Scan) -> str:
    """A slab, and its heat map or a coronal projection. places: rows of proposals, the best one last."""
    figure = Figure(figsize=(7, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    place_lps = [scan.place_lps, *places[PLACE].to_numpy(float)][-1]
    z = round(to_voxel(place_lps, scan.affine)[0, 0])
    draw_plane(left, scan, 0, place_lps)
    if len(places):
        draw_plane(right, scan, 0, place_lps)
        draw_heat(right, scan, z, places["folder"].iloc[-1])
    else:
        draw_plane(right, scan, 1, place_lps, REACH_MM)
    truth = ", ".join(scan.names) or f"{row[IS_PRESENT]:.0f}"
    caption = f"Predicted {row[PRESENT]:.2f}, truth: {truth}; slab {z} of 0 to {len(scan.voxels) - 1}."
    return show_picture(f"{row['modality']} …{row[UID][-8:]}", caption, figure)


def draw_heat(axes: Axes, scan: Scan, z: int, folder: Path) -> None:
    """A locator's probability of an aneurysm, the sum of its 13 maps, over slab z, on a scale from 0 to 1.
    Raises ValueError if the locator cannot be asked."""
    run = common.load_run(folder)
    if scan.settings != common.volume_settings(run.cfg):
        raise ValueError(f"{folder.name}: its volumes have other settings than those of the cache")
    with torch.inference_mode():
        maps = run.model(torch.from_numpy(scan.voxels)[None].float() / 255).maps
    heat = maps[0, :, z].sigmoid().sum(0).numpy()
    _, height, width = scan.voxels.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    image = axes.imshow(heat, "inferno", extent=extent, alpha=heat, vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes).ax.tick_params(colors="white")


# --- charts, pictures, tables -------------------------------------------------------------------------------

FORE = "#123457"  # becomes the page's own text colour, light or dark
CHART_STYLE = {
    "font.size": 8,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "image.cmap": "gray",
    "legend.frameon": False,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        ),
        FORE,
    ),
}
LETTERS = {"color": "white", "path_effects": [withStroke(linewidth=2, foreground="black")]}


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


def draw_histogram(
    title: str,
    caption: str,
    table: pd.DataFrame,
    column: str,
    kind: str = "modality",
) -> str:
    """How often a column has which value, stacked by another column."""
    values = table.pivot(columns=kind, values=column).dropna(axis=1, how="all")
    if values.empty:
        return absent(f"{title}: no series states it.")
    axes = new_chart(title, "number")
    low, high = np.nanmin(values), np.nanmax(values)
    edges = np.linspace(low, max(high, low + 1e-3 * max(abs(low), 1.0)), 25)  # equal but for rounding, too
    axes.hist(values.to_numpy(), edges, stacked=True, label=list(values))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return show_chart(title, caption, axes)


def draw_plane(
    axes: Axes,
    scan: Scan,
    axis: int,
    place_lps: np.ndarray,
    reach_mm: float = 0.0,
) -> None:
    """The plane through a place, or the maximum within reach of it, head up: with directions, a bar of 50 mm,
    the points near it, and the box."""
    down, across = (a for a in range(3) if a != axis)
    planes = np.moveaxis(scan.voxels, axis, 0)
    steps = np.linalg.norm(scan.affine[:3, :3], axis=0)
    centre = to_voxel(place_lps, scan.affine)[0, axis].clip(0, len(planes) - 1)
    reach = reach_mm / steps[axis]
    first, last = max(round(centre - reach), 0), round(centre + reach)
    image = planes[first : last + 1].max(0)
    axes.imshow(image, vmin=0, vmax=255, aspect=steps[down] / steps[across])
    axes.set_axis_off()
    if axis:
        axes.invert_yaxis()  # z grows upwards
    for point, name in zip(to_voxel(scan.points_lps, scan.affine), scan.names, strict=True):
        x, y = point[across], point[down]
        if abs(point[axis] - centre) * steps[axis] <= max(reach_mm, NEAR_MM):
            axes.plot(x, y, "o", markersize=10, fillstyle="none", color="yellow")
            axes.text(x, y, f"   {name}", **LETTERS)
    box = to_voxel(scan.box_lps, scan.affine)
    axes.plot(box[[0, 0, 1, 1, 0], across], box[[0, 1, 1, 0, 0], down], color="C0")
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
    return show_figure(title, caption, f'<img alt="{escape(title)}" src="{uri}">')


def show_figure(title: str, caption: str, body: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>{body}</figure>"


def show_table(table: pd.DataFrame, caption: str = "") -> str:
    """The first rows of a table, escaped."""
    if table.empty:
        return absent(f"{caption} None.")
    table = table.rename_axis(columns=None)
    with pd.option_context("display.max_colwidth", None):
        body = table[:MAX_ROWS].to_html(index=False, border=0, na_rep="–", float_format="{:.4g}".format)
    if len(table) > MAX_ROWS:
        caption += f" ({MAX_ROWS} of {len(table)} rows)"
    return f'<figure class="table"><figcaption>{escape(caption)}</figcaption>{body}</figure>'


def absent(text: str) -> str:
    """A line in place of what is absent."""
    return f'<p class="soft">{escape(text)}</p>'


def hide_folders(error: Exception) -> str:
    """The message without the folders of its paths."""
    return re.sub(r"\S*/", "", str(error))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def interval(result: dict, name: str) -> str:
    """`0.712 (0.65 to 0.77, 1990 draws)`; a dash where undefined."""
    if np.isnan(result[name]):
        return "–"
    return f"{result[name]:.3f} ({result['low']:.2f} to {result['high']:.2f}, {result['draws_used']} draws)"


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
.table { display: inline-block; vertical-align: top; overflow: auto; max-width: 100%; max-height: 500px;
  margin: 8px 0 16px; padding-right: 36px; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 2px 7px; min-width: 4em; text-align: left;
  vertical-align: top; }
@media print { nav { display: none; } .table { overflow: visible; max-height: none; } }
"""


def make_page(cache: Path, src: Path, outputs: Path) -> str:
    """What was run, what came out and what to look at first; then the sections."""
    sections, facts = [], []
    runs, warnings = read_runs(outputs)
    try:
        table, points = read_cache(cache)
    except (OSError, ValueError, KeyError) as error:
        warnings.append(f"No data, since index.csv or train.csv cannot be read: {hide_folders(error)}")
    else:
        facts.append(describe_series(table))
        troubles = find_troubles(table, points)
        for title, rows in troubles.items():
            if len(rows):
                warnings.append(f"{title}: {len(rows)}; first {' '.join(map(str, rows.iloc[0]))}")
        sections += [data_section(table), images_section(table, points, cache, src)]
        sections += [points_section(points), trouble_section(troubles)]
    if runs:
        pooled = pool_oof(runs)
        result = score_oof(pooled, 2000)
        facts.append(describe_score(result, len(runs)))
        warnings = find_constant_runs(runs) + warnings
        sections += [results_section(runs, pooled, result), cases_section(runs, pooled, cache)]
    else:
        facts.append("No finished training runs.")
    names = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
        <meta name="viewport" content="width=device-width, initial-scale=1">
        <title>Intracranial aneurysms</title><style>{STYLE}</style></head>
        <body><h1>Intracranial aneurysms</h1>
        <nav>{"".join(f'<a href="#{name}">{title}</a>' for name, title in names)}</nav><main>
        <p>python eda.py --cache {escape(cache.absolute().name)} --src {escape(src.absolute().name)}
        --outputs {escape(outputs.absolute().name)}; {time.strftime("%Y-%m-%d %H:%M %Z")};
        Python {sys.version.split()[0]}, torch {torch.__version__}, pandas {pd.__version__},
        numpy {np.__version__}. Research software, not a medical device.</p>
        {"".join(f"<p><b>{escape(text)}</b></p>" for text in facts)}
        <h3>Look at this first</h3>
        <ul>{"".join(f"<li>{escape(text)}</li>" for text in warnings or ["Nothing stands out."])}</ul>
        {"".join(sections)}</main></body></html>
"""


def main() -> int:
    parser = common.make_parser(__doc__)
    for name, folder in (("cache", "cache"), ("src", "dicoms"), ("outputs", "outputs")):
        parser.add_argument(f"--{name}", type=Path, default=folder, metavar="DIR")
    paths = vars(parser.parse_args())
    if not (paths["cache"] / "index.csv").is_file() and not paths["outputs"].is_dir():
        common.log(f"nothing to report on: no index.csv in {paths['cache']}, no folder {paths['outputs']}")
        return 1
    for path in (paths["cache"] / "index.csv", paths["outputs"]):
        if not path.exists():
            common.log(f"{path}: not there, so the report does without")
    stdout = common.reserve_stdout()
    with matplotlib.rc_context(CHART_STYLE), stdout:
        stdout.write(make_page(**paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
