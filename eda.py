"""Show the data, what went wrong and the results on one page that a radiologist and an engineer both read.

in   --cache DIR        what preprocess.py wrote: index.csv, volumes, and train.csv where there are labels
     --src DIR          the DICOM tree, for overviews of whole scans; vessel masks in its segmentations/
     --outputs DIR      runs of train.py, at any depth
     --submission FILE  what infer.py printed
out  one HTML page on stdout that needs no other file and no network; progress goes to stderr
run  python eda.py > report.html

Numbers come from the tables and one slab of every volume; whole images are read of the shown examples only.
What is absent is said in one line where it would stand. Patients are counted, never named.
exit 0 written, 1 nothing to report on, 2 wrong usage
"""

from __future__ import annotations

import argparse
import base64
import html
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

import common
from common import AP, LABELS, LOCATIONS, MODALITIES, UID

SHORT = (  # of the 14 labels
    *("L ICA infra", "R ICA infra", "L ICA supra", "R ICA supra", "L MCA", "R MCA", "ACom", "L ACA", "R ACA"),
    *("L PCom", "R PCom", "Basilar tip", "Other post.", "Present"),
)
ARTERIES = (  # whose colours are their places; left and right share one
    *("ICA infraclinoid", "ICA supraclinoid", "MCA", "ACom", "ACA", "PCom", "Basilar tip", "Other posterior"),
)
ARTERY = (0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7)  # of each location
SMALL_MM, LARGE_MM = 2.0, 10.0  # width of an aneurysm
MEASURES = {  # columns of the table, with title and unit
    "num_slices": ("Slices", "slices"),
    "slice_mm": ("Distance between slices", "mm"),
    "thickness_mm": ("Slice thickness", "mm"),
    "row_mm": ("Pixel size in plane", "mm"),
    "coverage_mm": ("Coverage along the slices", "mm"),
    "slab_mm": ("Slab of the volume", "mm"),
    "brightness": ("Mean brightness of the middle slab", "0 to 255"),
}
RUN_METRICS = {  # keys of metrics.json, with titles
    "wauc": "wAUC of single runs",
    "oracle_wauc": "oracle wAUC",
    "leak": "leak",
    "gain_of_proposals": "gain of proposals",
    "recall_10mm": "points found within 10 mm",
    "false_per_negative": "false places per negative",
    "seconds": "seconds a run",
    "peak_memory_gb": "peak memory (GB)",
    "precision": "precision",
}
MOST_EXAMPLES, MOST_OUTLIERS, MOST_HARD, MOST_ROWS = 12, 12, 6, 1000  # bounds that keep the page small
NUMBER_OR_TAG = re.compile(r"\([0-9a-f]{4},[0-9a-f]{4}\)|(?<!\w)[-+]?\d[\d.]*(?:e[-+]?\d+)?")
VIEWS = ((1, "Coronal projection"), (2, "Sagittal projection"))  # axis of (z, y, x) along which one looks

# --- what there is ------------------------------------------------------------------------------------------


def read_table(cache: Path, src: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per series: index.csv, labels (nan where there are none), what `peek` finds; and a row per point.

    Points have UID, label, inside and their place in the box that the model sees: x_mm to the patient's left
    and y_mm to the back of its centre, depth_mm below its top.
    """
    table = pd.read_csv(cache / "index.csv", dtype=str, keep_default_na=False)
    folder = next((p for p in (cache, src, src.parent) if (p / "train.csv").is_file()), None)
    if folder is not None:
        labels = pd.read_csv(folder / "train.csv", dtype=str, keep_default_na=False)
        table = table.merge(labels.drop_duplicates(UID), on=UID, how="left")
    for own, given in (("modality", "Modality"), ("age", "PatientAge"), ("sex", "PatientSex")):
        if given in table:  # the label table knows CTA from CT
            table[own] = table[given].where(table[given].fillna("") != "", table[own])
        table[own] = table[own].replace("", "unknown")
    rows, points = [], []
    for uid in tqdm(table[UID][table["status"] == "ok"], desc="volumes", unit="series"):
        row, own = peek(cache / f"{common.safe_uid(uid)}.safetensors")
        rows.append({UID: uid, **row})
        points += [(uid, *point) for point in own]
    columns = [UID, "broken", "settings", "slab", "slab_mm", "pixel_mm", "brightness"]
    table = table.merge(pd.DataFrame(rows, columns=columns), on=UID, how="left")
    for name in (*LABELS, *MEASURES, "pixel_mm", "rows", "cols", "num_points", "points_inside"):
        table[name] = pd.to_numeric(table[name], errors="coerce") if name in table else np.nan
    table["age"], table["plane"] = table["age"].map(years), table["plane"].replace("", "unknown")
    return table, pd.DataFrame(points, columns=[UID, "label", "inside", "x_mm", "y_mm", "depth_mm"])


def years(text: str) -> float:
    """86 of `86`, `086Y` or `86.0`; 0.5 of `006M` (PS3.5 6.2, AS); nan of anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([DWMY]?)", text.strip())
    return float(found[1]) / {"D": 365.25, "W": 52.18, "M": 12}.get(found[2], 1) if found else math.nan


def peek(path: Path) -> tuple[dict, list[tuple]]:
    """Of a cached volume, without reading all of it: a row for the table, a row per point."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            meta, volume = file.metadata(), file.get_slice("volume")
            shape = np.array(volume.get_shape())
            slab = volume[int(shape[0]) // 2]
            points, labels = file.get_tensor("points"), file.get_tensor("point_labels")
        step, _, settings = np.array(json.loads(meta["spacing_mm"])), meta["affine"], meta["settings"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}, []
    inside = ((points >= -0.5) & (points <= shape - 0.5)).all(axis=1)
    z, y, x = ((points - (shape - 1) / 2) * step).T  # mm from the centre
    bright = float(slab[slab > 0].mean()) if slab.any() else 0.0
    row = {"slab_mm": step[0], "pixel_mm": step[2], "brightness": bright, "settings": settings}
    row |= {"slab": f"{shape} {zlib.crc32(slab)}" if bright else None}  # to find the same image again
    return row, list(zip(labels.tolist(), inside, x, y, shape[0] / 2 * step[0] - z, strict=True))


def read_runs(outputs: Path) -> tuple[list[dict], list[str]]:
    """Runs below a folder (folder, group: name without seed and fold, settings, metrics, tables); faults."""
    runs, faults, tables = [], [], {"log": [], "oof": [UID, "patient"], "proposals": [UID]}
    names = ("metrics.json", *(f"{table}.csv" for table in tables))
    for folder in sorted({path.parent for name in names for path in outputs.rglob(name)}):
        name = str(folder.relative_to(outputs))
        run = {
            "folder": folder,
            "group": re.sub(r"_seed\d+_fold\d+$", "", name),
            "settings": {},
            "metrics": {},
        }
        try:
            for table, texts in tables.items():
                path = folder / f"{table}.csv"
                run[table] = (
                    pd.read_csv(path, dtype=dict.fromkeys(texts, str)) if path.is_file() else pd.DataFrame()
                )
            pool_oof([run])  # a KeyError names a missing column
            if (folder / "metrics.json").is_file():
                run["metrics"] = json.loads((folder / "metrics.json").read_text())
            if (folder / "config.yaml").is_file():
                run["settings"] = vars(common.load_config(folder / "config.yaml"))
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"{name}: {' '.join(str(error).split())}")
            continue
        runs.append(run)
    return runs, faults


def pool_oof(runs: Sequence[dict]) -> pd.DataFrame:
    """A row per series: its labels and its mean held-out probabilities over runs, weighted like infer.py."""
    weights = [max(run["settings"].get("ensemble_weight", 1.0), 1e-9) for run in runs]  # 0: it only proposes
    parts = [run["oof"].assign(weight=weight) for run, weight in zip(runs, weights, strict=True)]
    rows = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    if not len(rows):
        return rows
    probs = rows[list(LABELS)].mul(rows["weight"], axis=0).groupby(rows[UID]).sum()
    probs = probs.div(rows.groupby(UID)["weight"].sum(), axis=0)
    known = rows[["patient", "modality", "plane"]].fillna("unknown")
    known["patient"] = known["patient"].where(rows["patient"].notna(), rows[UID])  # else a patient of its own
    truth = rows[[f"label {name}" for name in LABELS]]
    return probs.join(pd.concat([rows[UID], known, truth], axis=1).groupby(UID).first()).reset_index()


def score_oof(rows: pd.DataFrame) -> dict:
    """common.score of a pooled table."""
    truth = rows[[f"label {name}" for name in LABELS]].set_axis(list(LABELS), axis=1)
    truth = truth.assign(patient=rows["patient"], plane=rows["plane"], Modality=rows["modality"])
    return common.score(truth, rows[list(LABELS)].to_numpy())


# --- section: the data --------------------------------------------------------------------------------------


def data_section(table: pd.DataFrame, points: pd.DataFrame) -> str:
    ok, kinds = table[table["status"] == "ok"], ordered(table["modality"])
    labelled = ok[ok[LABELS[AP]].notna()]
    patients = table["patient"][table["patient"] != ""].nunique() or "an unknown number of"
    parts = [f"<p>{len(table)} series of {patients} patients, {len(ok)} of them cached.</p>"]
    if len(ok):
        made = [describe(json.loads(text)) for text in ok["settings"].dropna().unique()]
        parts += [f"<p>{esc(text)}</p>" for text in made]
        if len(made) > 1:
            parts.append(
                nothing("These volumes differ in their settings: train.py will refuse them together.")
            )
    figures = label_figures(labelled, points, kinds) if len(labelled) else []
    parts.append(grid(count_figures(table, kinds) + figures))
    no_labels = nothing("No labels: train.csv is neither in the cache nor in or beside the source.")
    parts.append(cooccurrence_table(labelled) if len(labelled) else no_labels)
    if len(ok):
        parts += [grid(shape_figures(ok, kinds)), medians_table(ok, kinds)]
    return section("data", "The data", *parts)


def describe(settings: dict) -> str:
    """The settings of a cached volume in words."""
    cfg = common.volume_config(settings)
    return (
        f"Each becomes {cfg.base_slices} slabs of {cfg.img_size} × {cfg.img_size} pixels, over a box "
        f"{cfg.roi_mm:.0f} mm wide and up to {cfg.roi_top_mm:.0f} mm deep from the top of the head. A slab "
        f"is the {cfg.slab_mode} of its slices; CT shows {cfg.ct_window[0]:.0f} to {cfg.ct_window[1]:.0f} "
        f"HU, MR its percentiles {cfg.mr_percentiles[0]:g} to {cfg.mr_percentiles[1]:g}."
    )


def count_figures(table: pd.DataFrame, kinds: list[str]) -> list[str]:
    """Series by modality, plane, sex and age."""
    kind, ages = table["modality"], table["age"].dropna()
    turned = share(table["plane"].isin(["sagittal", "coronal"])[table["status"] == "ok"])
    by_kind = "One model sees them all with the same weights: of a rare kind it learns little."
    by_plane = (
        f"Volumes are always cut into axial slabs. {turned} of the series were acquired in another plane; "
        "there a slab takes a strip of every original slice."
    )
    by_age = f"Median {ages.median():.0f}; {len(table) - len(ages)} series do not state it. Not an input."
    return [
        bars("Series by modality.", by_kind, counted(kind, kind, kinds), kinds),
        bars("Series by plane.", by_plane, counted(table["plane"], kind), kinds),
        bars("Series by sex.", "Not an input of the model.", counted(table["sex"], kind), kinds),
        histogram("Age.", by_age, table["age"], kind, kinds, "years"),
    ]


def label_figures(labelled: pd.DataFrame, points: pd.DataFrame, kinds: list[str]) -> list[str]:
    """Prevalence of the 14 labels; annotated points per series."""
    kind, total = labelled["modality"], len(labelled)
    having = [kind[labelled[name] == 1] for name in LABELS]
    texts = [f"{len(own)} ({percent(len(own), total)})" for own in having]
    rows = [(SHORT[k], having[k].value_counts(), texts[k]) for k in range(len(LABELS))]
    rarest = min(range(AP), key=lambda k: len(having[k]))
    meaning = (
        f"Of {total} labelled series. The rarest location, {LOCATIONS[rarest]}, has {len(having[rarest])}: "
        "its score will be the least certain of all."
    )
    num = labelled[UID].map(points[UID].value_counts()).fillna(0).astype(int)
    crops = f"{len(points)} places in {(num > 0).sum()} series, for training crops; a new patient has none."
    return [
        bars("Prevalence of the labels.", meaning, rows, kinds),
        bars("Annotated points per series.", crops, counted(num, kind, sorted(num.unique())), kinds),
    ]


def shape_figures(ok: pd.DataFrame, kinds: list[str]) -> list[str]:
    """What the scans measure, each with what it means for a volume of slabs and pixels."""
    slab, pixel, kind = ok["slab_mm"].median(), ok["pixel_mm"].median(), ok["modality"]
    apart, thick = (share(ok[name].dropna() > SMALL_MM) for name in ("slice_mm", "thickness_mm"))
    meanings = {
        "num_slices": f"A slab is as thick as {(ok['slab_mm'] / ok['slice_mm']).median():.1f} slices "
        "(median): so many are averaged in it, or a strip of each where slices are not axial.",
        "slice_mm": f"In {apart} of the series slices lie more than {SMALL_MM:.0f} mm apart: the smallest "
        "aneurysms touch one or two slices before any model sees them.",
        "thickness_mm": f"In {thick} of the series a slice is thicker than {SMALL_MM:.0f} mm, as wide as the "
        "smallest aneurysm.",
        "row_mm": f"A pixel of the volume is {pixel:.2f} mm. {share(ok['row_mm'].dropna() < pixel)} of the "
        "series were acquired finer and lose detail; the others gain none.",
        "coverage_mm": "The volume keeps what lies in the box, from the top of the head (see the images).",
        "slab_mm": f"Median {slab:.1f} mm. An aneurysm of {SMALL_MM:.0f} mm fills {SMALL_MM / slab:.1f} "
        f"slabs and {SMALL_MM / pixel:.0f} pixels, one of {LARGE_MM:.0f} mm {LARGE_MM / slab:.1f} slabs and "
        f"{LARGE_MM / pixel:.0f} pixels. Shaded: that range.",
    }
    figures = []
    for name, meaning in meanings.items():
        (title, unit), band = MEASURES[name], (SMALL_MM, LARGE_MM) if name == "slab_mm" else None
        figures.append(histogram(f"{title}.", meaning, ok[name], kind, kinds, unit, band))
    size = ok["rows"].map("{:.0f}".format) + " × " + ok["cols"].map("{:.0f}".format)
    same = "Rows × columns, resampled to equal millimetres in both directions, never stretched."
    packed = "How files pack pixels. Compressed ones take longer to read but, unless lossy, look the same."
    syntaxes = counted(ok["transfer_syntax"].map(syntax_name), kind)[:10]
    figures.append(bars("Matrix size.", same, counted(size, kind)[:10], kinds))
    return [*figures, bars("Transfer syntax.", packed, syntaxes, kinds)]


def syntax_name(uid: str) -> str:
    """Short name of a (0002,0010) TransferSyntaxUID; the UID itself where it is unknown."""
    from pydicom.uid import UID as DicomUID

    return re.split(r"[(,:]", DicomUID(uid).name)[0].replace("Image Compression", "").strip() or "not stated"


def medians_table(ok: pd.DataFrame, kinds: list[str]) -> str:
    rows = []
    for name, (title, unit) in MEASURES.items():
        row = {"": f"{title} ({unit})"}
        for kind in kinds:
            values = ok[name][ok["modality"] == kind].dropna()
            low, middle, high = np.percentile(values, [5, 50, 95]) if len(values) else [math.nan] * 3
            row[kind] = f"{number(middle)} ({number(low)} to {number(high)})" if len(values) else "–"
        rows.append(row)
    return html_table("How the modalities differ: median (5 % to 95 % of the series)", rows)


def cooccurrence_table(labelled: pd.DataFrame) -> str:
    found = (labelled[list(LOCATIONS)] == 1).to_numpy(int)
    both = found.T @ found  # (13, 13) series
    rows = []
    for i, row in enumerate(both):
        cells = [f'<th scope="row">{SHORT[i]}</th>']
        for j, count in enumerate(row):
            depth = 0 if i == j else round(70 * count / max(1, row[i]))
            kind = "num own" if i == j else "num"
            cells.append(f'<td class="{kind}" style="--depth:{depth}%">{count or "·"}</td>')
        rows.append("".join(cells))
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", *SHORT[:AP]))
    caption = "Locations found together, in series. Framed: all with the location; darker: more of them."
    body = f"<thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(rows)}</tr></tbody>"
    return f'<p class="caption">{caption}</p>' + scrolling(f'<table class="heat">{body}</table>')


# --- section: the images ------------------------------------------------------------------------------------


def images_section(table: pd.DataFrame, points: pd.DataFrame, cache: Path, src: Path) -> str:
    ok = table[table["slab_mm"].notna()]
    if not len(ok):
        return section("images", "The images", nothing("No readable volume in the cache."))
    marked = ok[UID].isin(points[UID][points["inside"].astype(bool)])
    usual = ok.groupby(["modality", "plane"])["num_slices"].transform("median")
    chosen = ok.assign(odd=(ok["num_slices"] - usual).abs(), unmarked=~marked).sort_values(
        ["unmarked", "odd", UID]
    )
    chosen = chosen.drop_duplicates(["modality", "plane"]).sort_values(["modality", "plane"])[:MOST_EXAMPLES]
    intro = (
        "A usual series per modality and plane, with an annotated aneurysm where there is one. The patient's "
        "right is on the left of a picture, as radiologists look at it. Rings: annotated places. Blue: the "
        "box that the model sees."
    )
    find = series_finder(src)
    rows = tqdm(chosen.to_dict("records"), desc="examples", unit="series")
    examples = [example(row, cache, find) for row in rows]
    return section("images", "The images", f"<p>{intro}</p>", *examples, masks_part(ok, cache, src))


def series_finder(src: Path) -> Callable[[str], list[Path]]:
    """A function from UID to files: the folder of that name, else by searching the whole tree, once."""
    known: dict[str, list[Path]] = {}

    def find(uid: str) -> list[Path]:
        for folder in (src / "series" / uid, src / uid):
            if common.safe_uid(uid) == uid and folder.is_dir():
                return [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if not known and src.is_dir():
            known.update(common.find_series(src)[0])
        return known.get(uid, [])

    return find


def read_volume(uid: str, cache: Path) -> tuple:
    """volume (Z, H, W), points (P, 3) in its voxels, their names, mm per voxel (3,), affine, settings."""
    tensors, meta = common.load_volume(cache / f"{common.safe_uid(uid)}.safetensors")
    names = [SHORT[k] for k in tensors["point_labels"]]
    step, affine = (np.array(json.loads(meta[name])) for name in ("spacing_mm", "affine"))
    return tensors["volume"], tensors["points"], names, step, affine, json.loads(meta["settings"])


def example(row: dict, cache: Path, find: Callable[[str], list[Path]]) -> str:
    """One series: where the box lies in the scan, a slice before and after, crops of points, all slabs."""
    volume, points, names, step, affine, settings = read_volume(row[UID], cache)
    cfg, files, panes, why = common.volume_config(settings), find(row[UID]), [], ""
    if files:
        try:
            panes = scan_panes(common.read_series(files, row[UID]), volume, affine, points, names, cfg)
        except (ValueError, OSError) as error:
            why = f"The original could not be read again: {error}"
    else:
        why = "Not found at --src: the projections are of the volume, not of the whole scan."
    for axis, view in VIEWS if why else ():
        panes.append(plane(f"{view} of the volume", volume, step, axis, None, points, names))
    for point, name in list(zip(points, names, strict=True))[: cfg.max_localizer_crops]:
        crop = common.cut_crop(volume, point, step, cfg)
        panes.append(pane(f"Crop at {name}", crop, [cfg.crop_mm / len(crop)] * 2, scale_mm=10))
    facts = (
        f"{row['num_slices']:.0f} slices, {row['slice_mm']:.2f} mm apart, with pixels of "
        f"{row['row_mm']:.2f} mm, become {len(volume)} slabs of {step[0]:.2f} mm with pixels of "
        f"{step[2]:.2f} mm. Notes: {row['notes'] or 'none'}."
    )
    head = f"<h3>{esc(row['modality'])}, {esc(row['plane'])}</h3>"
    head += f'<p class="uid">{esc(row[UID])}</p><p>{esc(facts)}</p>'
    sheet = contact_sheet(volume, step, points, names)
    return f'<article>{head}{nothing(why)}<div class="panes">{"".join(panes)}</div>{sheet}</article>'


def whole_scan(series: common.Series, most: int = 256) -> tuple[np.ndarray, np.ndarray, int]:
    """All of a scan, small: float32 (z, y, x) of at most `most` a side; affine to LPS; axis across slices."""
    places, shape = np.asarray(series.positions_mm), (series.frames[0].rows, series.frames[0].cols)
    gap = max(float(series.spacing_mm[0]), float(np.ptp(places)) / most)
    regular = np.arange(places[0], places[-1] + gap / 2, gap)
    nearest = np.abs(places - regular[:, None]).argmin(axis=1)  # by position: gaps may be uneven
    size = [max(1, round(n * min(1.0, most / max(shape)))) for n in shape]
    images = []
    for i in nearest:
        images.append(cv2.resize(series.values(int(i)), size[::-1], interpolation=cv2.INTER_AREA))
        series.forget()
    axes, origin, larger = series.affine[:3, :3].copy(), series.affine[:3, 3], np.array(shape) / size
    axes[:, 0] *= gap / (axes[:, 0] @ series.normal)
    origin = origin + axes[:, 1:] @ (larger - 1) / 2  # centre of the first, larger pixel
    axes[:, 1:] *= larger

    scan, cosines = np.stack(images), axes[::-1] / np.linalg.norm(axes, axis=0)  # rows of cosines: z, y, x
    orders = [list(order) for order in itertools.permutations(range(3))]
    order = max(orders, key=lambda order: abs(cosines[range(3), order]).sum())
    scan, axes, cosines = scan.transpose(order), axes[:, order], cosines[:, order]
    for a in range(3):
        if cosines[a, a] < 0:
            scan, origin = np.flip(scan, a), origin + axes[:, a] * (scan.shape[a] - 1)
            axes[:, a] *= -1
    return scan, np.vstack([np.column_stack([axes, origin]), [0, 0, 0, 1]]), order.index(0)


def scan_panes(series: common.Series, volume, affine, points, names, cfg: common.Config) -> list[str]:
    """Projections of the original with the box; a slice as acquired, and the same place in the volume."""
    scan, scan_affine, axis = whole_scan(series)
    low, high = cfg.ct_window if series.modality == "CT" else np.percentile(scan, cfg.mr_percentiles)
    scan = np.clip((scan - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    steps, volume_steps = (np.linalg.norm(a[:3, :3], axis=0) for a in (scan_affine, affine))
    corners = np.array([[-0.5] * 3, np.array(volume.shape) - 0.5])
    centre = points[:1] if len(points) else corners.mean(axis=0, keepdims=True)
    box, places, there = (
        common.to_voxel(common.to_lps(v, affine), scan_affine) for v in (corners, points, centre)
    )
    panes = [plane(f"{view} of the scan", scan, steps, a, box, places, names) for a, view in VIEWS]
    before, after = plane_at(scan, axis, there[0]), plane_at(volume, axis, centre[0])
    panes.append(plane("Before: a slice", before, steps, axis, box, places[:1], names[:1]))
    panes.append(plane("After: the same place", after, volume_steps, axis, None, points[:1], names[:1]))
    return panes


def plane_at(volume: np.ndarray, axis: int, voxel: np.ndarray) -> np.ndarray:
    """The plane across `axis` nearest to a voxel, as a volume of one plane."""
    return volume.take([int(np.clip(round(float(voxel[axis])), 0, volume.shape[axis] - 1))], axis)


def project(volume: np.ndarray, axis: int) -> np.ndarray:
    """Mean of (z, y, x[, 3]) along an axis, its brightest place at 255; a single plane stays as it is."""
    flat = volume.mean(axis=axis, dtype=np.float32)
    return (flat * (255 / max(float(flat.max()), 1e-6) if volume.shape[axis] > 1 else 1)).astype(np.uint8)


def plane(title: str, volume: np.ndarray, steps, axis: int, corners=None, points=(), names=()) -> str:
    """A pane of a volume (z, y, x) along an axis, head up; corners (2, 3) of a box and points in voxels."""
    (down, across), image = [a for a in range(3) if a != axis], project(volume, axis)

    def flip(row: float) -> float:
        return len(image) - 1 - row if axis else row  # z grows upwards, rows downwards

    marks = [(flip(point[down]), point[across], name) for point, name in zip(points, names, strict=True)]
    box = None if corners is None else [(flip(corner[down]), corner[across]) for corner in corners]
    return pane(title, image[::-1] if axis else image, [steps[down], steps[across]], marks, box)


def contact_sheet(volume: np.ndarray, step: np.ndarray, points: np.ndarray, names: list[str]) -> str:
    """All slabs, lowest first as in the model's channels; points ringed in the slab that holds them."""
    tile, columns = 120, 8
    size = (columns * tile, math.ceil(len(volume) / columns) * tile)
    sheet, body = np.zeros(size[::-1], np.uint8), []
    for z, slab in enumerate(volume):
        top, left = z // columns * tile, z % columns * tile
        small = cv2.resize(slab, (tile, tile), interpolation=cv2.INTER_AREA)
        sheet[top : top + tile, left : left + tile] = small
        depth = (len(volume) - 0.5 - z) * step[0]
        body.append(words(left + 4, top + tile - 5, f"{z}: {depth:.0f} mm", kind="on"))
    for point, name in zip(points, names, strict=True):
        z, (y, x) = round(float(point[0])), (point[1:] + 0.5) / volume.shape[1:] * tile
        if 0 <= z < len(volume):
            body.append(ring(z % columns * tile + x, z // columns * tile + y, name))
    caption = "Every slab of the volume with its number and its depth below the top of the box."
    drawing = picture(data_uri(sheet), (0, 0), size) + "".join(body)
    return scrolling(figure("All slabs.", caption, drawing, size, "wide"), "sheet")


def masks_part(ok: pd.DataFrame, cache: Path, src: Path) -> str:
    """Vessel masks of segmentations/ over projections of their volumes, for up to four series."""
    folder = next((p for p in (src / "segmentations", src.parent / "segmentations") if p.is_dir()), None)
    if folder is None:
        return nothing("No vessel masks: segmentations/ is neither in nor beside the source.")
    try:
        import nibabel
    except ImportError:
        return nothing("Vessel masks are there but not shown: pip install nibabel reads them.")
    panes = []
    paths = {re.split(r"[^0-9.]|\.nii", path.name)[0]: path for path in sorted(folder.rglob("*.nii*"))}
    for uid in [uid for uid in ok[UID] if uid in paths][:4]:
        volume, _, _, step, affine, _ = read_volume(uid, cache)
        image = nibabel.load(paths[uid])
        mask = mask_voxels(np.asarray(image.dataobj) > 0, image.affine, affine, volume.shape)
        for axis, view in ((0, "Axial projection"), *VIEWS):
            flat = np.repeat(np.expand_dims(project(volume, axis), axis)[..., None], 3, axis=-1)
            flat[mask.any(axis=axis, keepdims=True)] = (0, 159, 230)  # orange, as BGR
            panes.append(plane(f"{view}, vessels of …{uid[-8:]}", flat, step, axis))
    if not panes:
        return nothing("No vessel mask belongs to a cached series.")
    return f'<h3>Vessel masks</h3><div class="panes">{"".join(panes)}</div>'


def mask_voxels(
    mask: np.ndarray, affine_ras: np.ndarray, affine: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """A NIfTI mask (i, j, k; RAS mm) on the grid of a volume (z, y, x; LPS mm): bool, nearest voxels."""
    lps = (np.argwhere(mask) @ affine_ras[:3, :3].T + affine_ras[:3, 3]) * [-1, -1, 1]
    voxels = np.rint(common.to_voxel(lps, affine)).astype(int)
    inside = np.zeros(shape, bool)
    inside[tuple(voxels[((voxels >= 0) & (voxels < shape)).all(axis=1)].T)] = True
    return inside


# --- section: where the aneurysms are -----------------------------------------------------------------------


def points_section(table: pd.DataFrame, points: pd.DataFrame, cache: Path) -> str:
    """All annotated points in one head's frame, three projections over a mean head."""
    title = "Where the aneurysms are"
    if not len(points):
        return section("points", title, nothing("No annotated points in the cache."))
    uids = table[UID][table["slab_mm"].notna()]
    heads = mean_heads(uids.sample(min(20, len(uids)), random_state=0), cache)
    side, deep = (-100, 100), (max(160.0, float(points["depth_mm"].max())), 0)
    across, along = "right  ←  mm from the middle  →  left", "front  ←  mm from the middle  →  back"
    views = (
        ("From below.", "x_mm", across, "y_mm", "back  ←  mm  →  front", (100, -100), 100),
        ("From the front.", "x_mm", across, "depth_mm", "mm below the top", deep, 160),
        ("From the left.", "y_mm", along, "depth_mm", "mm below the top", deep, 160),
    )
    figures = []
    for (name, u, u_name, v, v_name, v_range, head_end), head in zip(views, heads, strict=True):
        size = (360, 46 + 1.5 * abs(v_range[1] - v_range[0]))
        frame, place = axes(side, v_range, u_name, v_name, size)
        body = [picture(head, place(-100, v_range[1]), place(100, head_end)), frame]
        for a, b, k in points[[u, v, "label"]].itertuples(index=False):
            shape = {"L": "square", "R": "triangle"}.get(side_of(k), "circle")
            at = place(np.clip(a, *side), np.clip(b, *sorted(v_range)))
            body.append(marker(*at, ARTERY[k], shape, LOCATIONS[k], 1 if len(points) < 300 else 0.6))
        figures.append(figure(name, "", "".join(body), size))
    keys = [(k, "circle", ARTERIES[k]) for k in sorted({ARTERY[k] for k in points["label"]})]
    keys += [
        ("n", "square", "labelled left"),
        ("n", "triangle", "labelled right"),
        ("n", "circle", "midline"),
    ]
    intro = (
        f"{len(points)} points, coloured by artery, in the frame of the box that the model sees: its centre "
        "is the middle of the head, its top the top of the head (or of a scan that ends lower). The shape "
        "is the side that the label names: a square among triangles is a label on the wrong side, or a "
        "head lying askew. Grey: a mean head."
    )
    return section("points", title, f"<p>{intro}</p>", legend(keys), grid(figures))


def side_of(label: int) -> str:
    """L, R or nothing: the side that a location names."""
    return LOCATIONS[label][0] if LOCATIONS[label].startswith(("Left ", "Right ")) else ""


def mean_heads(uids: Iterable[str], cache: Path) -> list[str]:
    """Mean projections along z, y and x on 200 x 200, 160 x 200, 160 x 200 mm, as transparent pictures."""
    total = [np.zeros((rows, 200), np.float32) for rows in (200, 160, 160)]
    for uid in uids:
        volume, _, _, step, _, _ = read_volume(uid, cache)
        for axis, canvas in enumerate(total):
            flat, (down, across) = project(volume, axis), np.delete(step, axis)
            flat, top = (flat[::-1], -0.5) if axis else (flat, len(flat) / 2 - 0.5 - 100 / down)
            matrix = np.array([[1 / across, 0, flat.shape[1] / 2 - 0.5 - 100 / across], [0, 1 / down, top]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            canvas += cv2.warpAffine(np.ascontiguousarray(flat), matrix, canvas.shape[::-1], flags=flags)
    alphas = [(canvas / max(float(canvas.max()), 1e-6) * 160).astype(np.uint8) for canvas in total]
    return [data_uri(np.dstack([np.full_like(alpha, 128)] * 3 + [alpha])) for alpha in alphas]


# --- section: what went wrong -------------------------------------------------------------------------------


def trouble_section(table: pd.DataFrame, points: pd.DataFrame, cache: Path) -> str:
    ok, failed = table[table["status"] == "ok"], table[table["status"] != "ok"]
    unread = ok[ok["broken"].notna()]
    lost = [*failed[[UID, "reason"]].values.tolist(), *unread[[UID, "broken"]].values.tolist()]
    far, no_labels = find_outliers(ok), "" if ok[LABELS[AP]].notna().any() else "No labels to compare with."
    rule = "Beyond the quartiles of the modality by over three times their distance. Pictured: the farthest."
    same = "No two series have the same middle slab, or files of the same names and sizes."
    lists = (
        ("Series that could not be used", "", [{"series": u, "reason": r} for u, r in lost], "None."),
        ("Repairs and assumptions, by kind", "", count_notes(ok), "None was needed."),
        ("Outliers", rule, far, "None, or fewer than eight series of a modality, too few to tell."),
        ("Suspected duplicates", "", find_duplicates(ok), same),
        ("Points outside the region", "The model cannot see these.", find_outside(ok), "None."),
        ("Labels and points at odds", "", contradictions(ok, points), no_labels or "None."),
    )
    parts = []
    for title, caption, rows, none in lists:
        parts += [f"<h3>{title}: {len(rows)}</h3>", html_table(caption, rows) if rows else nothing(none)]
        if rows is far and far:
            readable = set(ok[UID][ok["slab_mm"].notna()])
            parts.append(f'<div class="panes">{"".join(outlier_panes(far, readable, cache))}</div>')
    return section("trouble", "What went wrong", *parts)


def count_notes(ok: pd.DataFrame) -> list[dict]:
    """Kinds of notes, most frequent first; notes that differ in numbers only are of one kind."""
    seen: dict[str, tuple[set, str]] = {}
    for uid, text in zip(ok[UID], ok["notes"], strict=True):
        for note in filter(None, text.split("; ")):
            kind = NUMBER_OR_TAG.sub(lambda m: m[0] if m[0].startswith("(") else "n", note)
            seen.setdefault(kind, (set(), note))[0].add(uid)
    rows = [{"kind": kind, "series": len(uids), "for example": note} for kind, (uids, note) in seen.items()]
    return sorted(rows, key=lambda row: (-row["series"], row["kind"]))


def find_outliers(ok: pd.DataFrame) -> list[dict]:
    """Series far from the others of their modality in some measure, farthest first."""
    found = []
    for (kind, part), name in itertools.product(ok.groupby("modality"), MEASURES):
        values = part.set_index(UID)[name].dropna()
        if len(values) < 8:
            continue
        first, middle, third = np.percentile(values, [25, 50, 75])
        distance = max(third - first, 0.05 * middle, 1e-6)  # among equal values, 1 % off is not far
        low, high = max(0.0, first - 3 * distance), third + 3 * distance
        for uid, value in values[(values < low) | (values > high)].items():
            row = {"series": uid, "modality": kind, "what": MEASURES[name][0], "value": f"{value:.3g}"}
            row |= {"usual range": f"{low:.3g} to {high:.3g}", "unit": MEASURES[name][1]}
            found.append((max(low - value, value - high) / distance, uid, row))
    return [row for *_, row in sorted(found, key=lambda one: (-one[0], one[1]))]


def outlier_panes(far: list[dict], readable: set[str], cache: Path) -> list[str]:
    """Middle slab and coronal projection of the farthest outliers."""
    panes = []
    for uid in list(dict.fromkeys(row["series"] for row in far if row["series"] in readable))[:MOST_OUTLIERS]:
        what = ", ".join(f"{row['what'].lower()} {row['value']}" for row in far if row["series"] == uid)
        volume, _, _, step, _, _ = read_volume(uid, cache)
        panes.append(pane(f"…{uid[-12:]}: {what}", volume[len(volume) // 2], step[1:]))
        panes.append(plane("the same, coronal projection", volume, step, 1))
    return panes


def find_duplicates(ok: pd.DataFrame) -> list[dict]:
    """Groups of series with the same middle slab or the same fingerprint of their source."""
    found = []
    for column, why in (("slab", "the same image"), ("source", "files of the same names and sizes")):
        rows = ok[ok[column].fillna("") != ""]
        same = [sorted(part[UID]) for _, part in rows.groupby(column) if len(part) > 1]
        found += [{"series": " = ".join(uids), "why": why} for uids in sorted(same)]
    return found


def find_outside(ok: pd.DataFrame) -> list[dict]:
    rows = ok[ok["points_inside"] < ok["num_points"]].to_dict("records")
    return [{"series": r[UID], "outside": int(r["num_points"] - r["points_inside"])} for r in rows]


def contradictions(ok: pd.DataFrame, points: pd.DataFrame, askew_mm: float = 10.0) -> list[dict]:
    """Where labels, points and sides do not fit each other."""
    found, marked = [], points.groupby(UID)["label"].agg(set).to_dict()
    for row in ok[ok[LABELS[AP]].notna()].to_dict("records"):
        own, stated = marked.get(row[UID], set()), {k for k, name in enumerate(LOCATIONS) if row[name] == 1}
        if bool(stated) != (row[LABELS[AP]] == 1):
            said = f"{LABELS[AP]} is {row[LABELS[AP]]:.0f}, but {len(stated)} locations are labelled"
            found.append((row[UID], said))
        found += [(row[UID], f"a point in {LOCATIONS[k]}, whose label is 0") for k in sorted(own - stated)]
        found += [(row[UID], f"{LOCATIONS[k]} is labelled, but has no point") for k in sorted(stated - own)]
    for uid, k, x in points[[UID, "label", "x_mm"]].itertuples(index=False):
        if (side_of(k) == "L" and x < -askew_mm) or (side_of(k) == "R" and x > askew_mm):
            where = f"{abs(x):.0f} mm to the {'right' if x < 0 else 'left'} of the middle"
            found.append((uid, f"a point in {LOCATIONS[k]} lies {where}"))
    return [{"series": uid, "what": what} for uid, what in found]


# --- section: the results -----------------------------------------------------------------------------------


def results_section(outputs: Path, cache: Path, readable: set[str]) -> str:
    runs, faults = read_runs(outputs)
    parts = [nothing(f"Left out: {fault}") for fault in faults]
    if not runs:
        parts.append(nothing(f"No training runs in {outputs}."))
        return section("results", "The results", *parts)
    groups = {run["group"]: [] for run in runs}
    for run in runs:
        groups[run["group"]].append(run)
    pooled = {name: rows for name, members in groups.items() if len(rows := pool_oof(members))}
    scores = {name: score_oof(rows) for name, rows in tqdm(pooled.items(), desc="scores", unit="group")}
    parts += [grid(training_figures(groups)), ablation_table(groups, scores)]
    if scores:
        whole = pool_oof(runs)
        result = score_oof(whole) if len(scores) > 1 else next(iter(scores.values()))
        intro = (
            f"Below: the mean over {len(runs)} run(s), every series predicted only by runs that never "
            f"trained on its patient, without annotated crops. wAUC {interval(result, 'wauc')} on "
            f"{result['num_series']} series of {result['num_patients']} patients. The interval holds 95 % "
            "of 2,000 redraws of the patients."
        )
        parts += [f"<p>{esc(intro)}</p>", grid(score_figures(whole, result, pooled)), by_table(result)]
        parts.append(hard_part(whole, runs, cache, readable))
    return section("results", "The results", *parts)


def interval(result: dict, name: str) -> str:
    """`0.712 (0.65 to 0.77)`; a dash where undefined."""
    value, low, high = (math.nan if result.get(key) is None else result[key] for key in (name, "low", "high"))
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")


def training_figures(groups: dict[str, list[dict]]) -> list[str]:
    """Losses and validation wAUC by epoch; the runs of one group share a colour."""
    captions = {
        "train_loss": ("Training loss.", "Falls while the network fits the training series."),
        "val_loss": (
            "Validation loss.",
            "Patients held out. Rising while the other falls: learning by heart.",
        ),
        "wauc": ("Validation wAUC.", "Patients held out, without annotated crops. Dashed: chance."),
    }
    figures = []
    for column, (title, caption) in captions.items():
        curves = []
        for colour, (name, members) in enumerate(groups.items()):
            for log in (run["log"] for run in members if {column, "epoch"} <= set(run["log"])):
                curves.append((colour, name, log["epoch"].to_numpy(float), log[column].to_numpy(float)))
        if not curves:
            figures.append(nothing(f"{title} No run has a log of it."))
            continue
        last = max(5.0, *(curve[2].max() for curve in curves))
        values = np.concatenate([curve[3][np.isfinite(curve[3])] for curve in curves])
        usual = float(np.percentile(values, 98)) if len(values) else 1.0  # the first steps may be far above
        top, chance = (1.0, ((0, 0.5), (last, 0.5))) if column == "wauc" else (max(1.1 * usual, 1e-6), None)
        figures.append(
            lines(title, caption, curves, (0, last), (0, top), "epoch", title.lower()[:-1], chance)
        )
    return figures


def ablation_table(groups: dict[str, list[dict]], scores: dict[str, dict]) -> str:
    """A row per group of runs: what sets it apart, its score, the diagnostics of its runs."""
    settings = [run["settings"] for members in groups.values() for run in members]
    keys = {key for own in settings for key in own} - {"seed", "fold", "cache", "outputs", "workers"}
    apart = sorted(key for key in keys if len({str(own.get(key)) for own in settings}) > 1)
    rows = []
    for name in sorted(groups, key=lambda name: -scores.get(name, {}).get("wauc", -1)):
        result, own = scores.get(name, {"per_label": {}}), [run["settings"] for run in groups[name]]
        metrics = pd.DataFrame([run["metrics"] for run in groups[name]])
        first = metrics.map(lambda value: value[0] if isinstance(value, list) and value else value)
        mean = {key: spread(first[key]) if key in first else "–" for key in RUN_METRICS}
        differs = [f"{key} {'/'.join(sorted({str(one.get(key)) for one in own}))}" for key in apart]
        places = [one["auc"] for label, one in result["per_label"].items() if label != LABELS[AP]]
        seeds, folds = ({one.get(key) for one in own} for key in ("seed", "fold"))
        row = {"runs": name, "settings that differ": ", ".join(differs) or "–"}
        row |= {"seeds × folds": f"{len(seeds)} × {len(folds)}", "series": result.get("num_series", "–")}
        row |= {"wAUC": interval(result, "wauc")}
        row |= {"Aneurysm Present AUC": interval(result["per_label"].get(LABELS[AP], {}), "auc")}
        row |= {"locations, mean AUC": f"{np.nanmean(places):.3f}" if np.isfinite(places).any() else "–"}
        rows.append(row | {RUN_METRICS[key]: text for key, text in mean.items()})
    caption = (
        "The runs compared, on patients held out. Oracle: with crops at annotated places, which no new "
        "patient has; leak: what that adds. Both are diagnostics, not results. In brackets: 95 % interval, "
        "or lowest to highest run."
    )
    return html_table(caption, rows)


def spread(values: Iterable) -> str:
    """`mean (lowest to highest)` of the numbers that are known; words as they are."""
    values = [value for value in values if value is not None and value == value]  # nan is not equal to itself
    if not values or isinstance(values[0], str):
        return "/".join(sorted(set(values))) or "–"
    low, high = min(values), max(values)
    return number(np.mean(values)) + (f" ({number(low)} to {number(high)})" if low < high else "")


def score_figures(whole: pd.DataFrame, result: dict, pooled: dict[str, pd.DataFrame]) -> list[str]:
    """AUC per label with intervals; ROC, precision and calibration of Aneurysm Present."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

    meaning = "Dot: AUC; line: 95 % interval; n: positive series. A line across 0.5 may be chance."
    if result["undefined"]:
        meaning += f" Only one class, so no AUC: {', '.join(result['undefined'])}."
    rows = [(SHORT[k], result["per_label"][name]) for k, name in enumerate(LABELS)]
    figures = [dots("AUC per label.", meaning, rows)]
    present, guess = f"label {LABELS[AP]}", LABELS[AP]
    tables = {"all runs": whole, **(pooled if len(pooled) > 1 else {})}
    both = [(name, t[present], t[guess]) for name, t in tables.items() if t[present].nunique() == 2]
    if not both:
        return [*figures, nothing("ROC, precision, calibration: Aneurysm Present has only one class here.")]
    base, rocs, recalls = float(whole[present].mean()), [], []
    for colour, (name, truth, probs) in enumerate(both, start=-1):  # -1, the last colour: all runs together
        (out, hit, _), (precision, recall, _) = roc_curve(truth, probs), precision_recall_curve(truth, probs)
        rocs.append((colour, name, out, hit))
        recalls.append((colour, name, recall, precision))
    average = average_precision_score(whole[present], whole[guess])
    alarms = "How many aneurysms are found at how many false alarms. Dashed: chance."
    called = f"Of series called positive, the share that is: on average {average:.3f}. Dashed: prevalence."
    found, false, unit = "found: share of positives", "false alarms: share of negatives", (0, 1)
    roc = lines("ROC of Aneurysm Present.", alarms, rocs, unit, unit, false, found, ((0, 0), (1, 1)))
    chance = ((0, base), (1, base))
    recall = lines("Precision and recall.", called, recalls, unit, unit, found, "precision", chance)
    return [*figures, roc, recall, calibration(whole[present].to_numpy(float), whole[guess].to_numpy(float))]


def calibration(truth: np.ndarray, probs: np.ndarray) -> str:
    """Observed share of positives in up to ten equally filled bins of probability, 95 % Wilson intervals."""
    frame, place = axes((0, 1), (0, 1), "predicted probability, mean of a bin", "observed share of positives")
    body, num_bins = [frame, stroke("chance", place(0, 0), place(1, 1))], int(np.clip(len(probs) // 5, 1, 10))
    for members in np.array_split(np.argsort(probs, kind="stable"), num_bins):
        n, p, u = len(members), float(truth[members].mean()), float(probs[members].mean())
        middle = (p + 1.92 / n) / (1 + 3.84 / n)
        half = 1.96 * math.sqrt(p * (1 - p) / n + 0.96 / n**2) / (1 + 3.84 / n)
        body.append(stroke("s0 line", place(u, middle - half), place(u, middle + half)))
        body.append(marker(*place(u, p), 0, "circle", f"predicted {u:.2f}, observed {p:.2f}, {n} series"))
    brier, base = float(((probs - truth) ** 2).mean()), float(truth.mean())
    caption = (
        f"Dots on the dashed line mean what they say. Brier score {brier:.3f}: 0 is perfect, and always "
        f"saying the prevalence gives {base * (1 - base):.3f}."
    )
    return figure("Calibration of Aneurysm Present.", caption, "".join(body))


def by_table(result: dict) -> str:
    rows = []
    for kind in ("modality", "plane"):
        for value, part in result[f"per_{kind}"].items():
            row = {"by": kind, "": value, "series": part["num_series"], "wAUC": spread([part["wauc"]])}
            row["Aneurysm Present AUC"] = spread([part["auc_present"]])
            rows.append(row | {"labels of one class, left out": len(part["undefined"])})
    return html_table("The same predictions by modality and plane; few series make a wide interval", rows)


def hard_part(whole: pd.DataFrame, runs: list[dict], cache: Path, readable: set[str]) -> str:
    """The highest-scored negatives and lowest-scored positives, and where a locator looks in them."""
    proposals = pd.concat([run["proposals"].assign(folder=run["folder"]) for run in runs])
    rows, loaded = whole.sort_values([LABELS[AP], UID]), {}
    negative = rows[f"label {LABELS[AP]}"] == 0
    hard = {
        "Highest-scored negatives": rows[negative].iloc[::-1][:MOST_HARD],
        "Lowest-scored positives": rows[~negative][:MOST_HARD],
    }
    no_heat = "No locator among the runs, so no heat maps; shown: the slab of the first point, or the middle."
    parts = [] if len(proposals) else [nothing(no_heat)]
    for title, chosen in hard.items():
        panes = []
        for row in tqdm(chosen.to_dict("records"), desc=title.lower(), unit="series"):
            if row[UID] in readable:
                panes += hard_panes(row, proposals, loaded, cache)
            else:
                panes.append(nothing(f"{row['modality']} …{row[UID][-8:]}: not in the cache."))
        parts.append(f'<h3>{title}</h3><div class="panes">{"".join(panes)}</div>')
    return "".join([*parts, *(nothing(fault) for fault in loaded.values() if isinstance(fault, str))])


def hard_panes(row: dict, proposals: pd.DataFrame, loaded: dict, cache: Path) -> list[str]:
    """The hottest place's slab, plain and with the heat map; rings: annotated within 8 mm, cross: hottest."""
    volume, points, names, step, _, _ = read_volume(row[UID], cache)
    place, cross = points[0] if len(points) else (np.array(volume.shape) - 1) / 2, None
    own = proposals[proposals[UID] == row[UID]].sort_values("score") if len(proposals) else proposals
    if len(own):
        place = own[["z", "y", "x"]].to_numpy(float)[-1]
        cross = place[1:]
    z = int(np.clip(round(float(place[0])), 0, len(volume) - 1))
    near = [i for i, point in enumerate(points) if abs(point[0] - z) * step[0] <= 8]
    marks = [(*points[i][1:], names[i]) for i in near]
    likeliest = max(range(AP), key=lambda k: row[LABELS[k]])
    title = f"{row['modality']} …{row[UID][-8:]}: present {row[LABELS[AP]]:.2f}, {SHORT[likeliest]} "
    title += f"{row[LABELS[likeliest]]:.2f}; slab {z}; annotated: {', '.join(names) or 'nothing'}"
    panes = [pane(title, volume[z], step[1:], marks, cross=cross)]
    heat = heat_map(volume, own["folder"].iloc[-1], loaded) if len(own) else None
    if heat is not None:
        relative = (heat[z] - heat.min()) / max(float(np.ptp(heat)), 1e-6)
        warm = cv2.resize(relative**2, volume.shape[:0:-1])[..., None]  # squared: peaks, not their feet
        colour = cv2.applyColorMap((warm * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
        mixed = (volume[z][..., None] * (1 - 0.7 * warm) + colour * 0.7 * warm).astype(np.uint8)
        panes.append(
            pane(f"The same with the heat map; hottest {number(heat.max())}", mixed, step[1:], marks)
        )
    if len(points) and not near:  # it looks elsewhere
        there, (_, y, x) = int(np.clip(round(float(points[0][0])), 0, len(volume) - 1)), points[0]
        panes.append(pane(f"The annotated place, slab {there}", volume[there], step[1:], [(y, x, names[0])]))
    return panes


def heat_map(volume: np.ndarray, folder: Path, loaded: dict) -> np.ndarray | None:
    """(Z, h, w) probability of an aneurysm: the sum of the locator's 13 maps; None if it cannot be loaded.

    loaded remembers models by folder, or why there is none.
    """
    import torch

    if folder not in loaded:
        try:
            loaded[folder] = common.load_run(folder).model
        except ValueError as error:
            loaded[folder] = f"No heat maps: {error}"
    if isinstance(loaded[folder], str):
        return None
    with torch.inference_mode():
        _, maps = loaded[folder](torch.from_numpy(volume)[None].float() / 255)
    return maps[0].sigmoid().sum(0).numpy()


# --- section: the submission --------------------------------------------------------------------------------


def submission_section(path: Path, table: pd.DataFrame | None) -> str:
    title = "The submission"
    if not path.is_file():
        return section("submission", title, nothing("None: python infer.py > submission.csv makes one."))
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    absent = [name for name in (UID, *LABELS) if name not in rows]
    if absent:
        return section("submission", title, nothing(f"{path.name} lacks the columns {', '.join(absent)}."))
    probs = rows[list(LABELS)].apply(pd.to_numeric, errors="coerce")
    known = {} if table is None else dict(zip(table[UID], table["modality"], strict=True))
    kind, wrong = rows[UID].map(known).fillna("unknown"), ~((probs >= 0) & (probs <= 1)).all(axis=1)
    text = (
        f"{len(rows)} series, {rows[UID].duplicated().sum()} of them again; {wrong.sum()} with a value "
        f"outside 0 to 1; {probs.duplicated(keep=False).sum()} with the same 14 values as another "
        "(unreadable ones get the prevalence)."
    )
    stats = []
    for name in LABELS:
        low, middle, high = probs[name].quantile([0.05, 0.5, 0.95])
        row = {"label": name, "5 % of series below": f"{low:.3f}", "median": f"{middle:.3f}"}
        stats.append(row | {"95 % below": f"{high:.3f}", "mean": f"{probs[name].mean():.3f}"})
    present = probs[LABELS[AP]]
    shown = histogram("Aneurysm Present.", "As handed in.", present, kind, ordered(kind), "probability")
    stats = html_table("Predicted probabilities", stats)
    return section("submission", title, f"<p>{esc(text)}</p>", grid([shown]), stats)


# --- small charts: inline SVG, coloured by the page's style -------------------------------------------------


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def ordered(values: pd.Series) -> list[str]:
    """The modalities that occur, known ones in their usual order, then others; the place is the colour."""
    return [m for m in MODALITIES if m in set(values)] + sorted(set(values) - set(MODALITIES))


def number(value: float) -> str:
    """Three digits, all of them from 1000 on."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(part: int, whole: int) -> str:
    """One digit below ten: `1.1 %`, `43 %`."""
    value = 100 * part / max(1, whole)
    return f"{value:.1f} %" if 0 < value < 10 else f"{value:.0f} %"


def share(claim: pd.Series) -> str:
    return percent(int(claim.sum()), len(claim))


def counted(values: pd.Series, kinds: pd.Series, order: Sequence | None = None) -> list[tuple]:
    """Rows for `bars`, most frequent first: (value, {modality: count}, count as text)."""
    counts = values.value_counts()
    names = counts.index if order is None else order
    return [(str(name), kinds[values == name].value_counts(), str(counts[name])) for name in names]


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers within low..high: 1, 2 or 5 times a power of ten apart."""
    low, high = sorted((low, high))
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = power * next(m for m in (1, 2, 5, 10) if power * m * 5 >= (high - low) * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(i * step, 10) for i in range(first, last + 1)]


def axes(
    x, y, x_name: str, y_name: str, size=(360, 230), rows: Sequence[str] = (), right: float = 14
) -> tuple:
    """Grid and labels over the ranges x and y, and the function from data to the chart's units.

    rows: names for y = 0.5, 1.5 ... instead of numbers.
    """
    (width, height), top, bottom = size, 8, 38
    left = 14 + 6.3 * max(map(len, rows)) if rows else 52
    middle, floor = (left + width - right) / 2, height - bottom

    def place(u: float, v: float) -> tuple[float, float]:
        across, up = (u - x[0]) / (x[1] - x[0]), (v - y[0]) / (y[1] - y[0])
        return left + across * (width - left - right), floor - up * (floor - top)

    parts = []
    for u in ticks(*x):
        at, _ = place(u, y[0])
        parts += [stroke("grid", (at, top), (at, floor)), words(at, floor + 14, f"{u:g}", "middle")]
    for v in [] if rows else ticks(*y):
        _, at = place(x[0], v)
        parts += [stroke("grid", (left, at), (width - right, at)), words(left - 5, at + 4, f"{v:g}", "end")]
    parts += [words(left - 6, place(0, i + 0.5)[1] + 4, name, "end") for i, name in enumerate(rows)]
    parts.append(words(middle, height - 6, x_name, "middle"))
    parts.append(f'<g transform="translate(11 {(top + floor) / 2}) rotate(-90)">')
    parts.append(f"{words(0, 0, y_name, 'middle')}</g>")
    return "".join(parts), place


def words(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    """Text; of kind `on` it stands on a picture, white with a dark edge."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{esc(text)}</text>'


def stroke(kind: str, start: tuple, end: tuple) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def corners_of(one: tuple, other: tuple) -> str:
    """Attributes of the rectangle between two corners."""
    (x0, x1), (y0, y1) = sorted((one[0], other[0])), sorted((one[1], other[1]))
    return f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'


def area(kind: str, one: tuple, other: tuple, tip: str) -> str:
    return f'<rect class="{kind}" {corners_of(one, other)}><title>{esc(tip)}</title></rect>'


def picture(uri: str, one: tuple, other: tuple) -> str:
    return f'<image href="{uri}" {corners_of(one, other)} preserveAspectRatio="none"/>'


def marker(x: float, y: float, colour: int | str, shape: str, tip: str = "", scale: float = 1) -> str:
    """A circle, square or triangle with a tooltip."""
    sides, reach = {"circle": (24, 4.0), "square": (4, 5.0), "triangle": (3, 5.4)}[shape]
    turn = math.pi / 4 if sides == 4 else -math.pi / 2
    angles = [turn + 2 * math.pi * i / sides for i in range(sides)]
    reach *= scale
    outline = " ".join(f"{x + reach * math.cos(a):.1f},{y + reach * math.sin(a):.1f}" for a in angles)
    return f'<polygon class="s{colour} mark" points="{outline}"><title>{esc(tip)}</title></polygon>'


def legend(keys: Sequence[tuple[int | str, str, str]]) -> str:
    """Markers with names: (colour, shape, name); a single one is not worth a legend."""
    drawn = [
        f'<svg viewBox="0 0 12 12" class="key">{marker(6, 6, c, s)}</svg>{esc(name)}' for c, s, name in keys
    ]
    return f'<p class="legend"><span>{"</span><span>".join(drawn)}</span></p>' if len(keys) > 1 else ""


def figure(
    title: str, caption: str, body: str, size: tuple = (360, 230), kind: str = "", keys: Sequence = ()
) -> str:
    head = f"<figcaption><b>{esc(title)}</b> {esc(caption)}</figcaption>{legend(keys)}"
    said, box = f"<title>{esc(title)}</title><desc>{esc(caption)}</desc>", f"0 0 {size[0]:.0f} {size[1]:.0f}"
    return f'<figure class="{kind}">{head}<svg viewBox="{box}" role="img">{said}{body}</svg></figure>'


def squares(names: Iterable[str]) -> list[tuple[int, str, str]]:
    return [(colour % 8, "square", name) for colour, name in enumerate(names)]


def bars(title: str, caption: str, rows: Sequence[tuple], kinds: list[str]) -> str:
    """Horizontal bars of (name, {modality: count}, words at the end), stacked by modality."""
    if not rows:
        return nothing(f"{title} No series.")
    names = [name if len(name) < 26 else f"{name[:24]}…" for name, *_ in rows]
    most = max([int(parts.sum()) for _, parts, _ in rows] + [1])
    most *= 1 + 0.035 * max(len(text) for *_, text in rows)  # room for the words
    size = (360, 46 + 19 * len(rows))
    frame, place = axes((0, most), (len(rows), 0), "series", "", size, names)
    body = [frame]
    for i, (name, parts, text) in enumerate(rows):
        end = 0
        for colour, kind in enumerate(kinds):
            start, end = end, end + int(parts.get(kind, 0))
            if end > start:
                tip = f"{name}, {kind}: {end - start}"
                body.append(area(f"s{colour % 8}", place(start, i + 0.15), place(end, i + 0.85), tip))
        x, y = place(end, i + 0.5)
        body.append(words(x + 5, y + 4, text))
    return figure(title, caption, "".join(body), size, keys=squares(kinds))


def histogram(
    title: str, caption: str, values: pd.Series, groups: pd.Series, kinds: list[str], unit: str, band=None
):
    """Stacked by modality; of 200 values or more, the outer 0.5 % stand in the outer bars. band: shaded."""
    values = values.astype(float)
    groups, values = groups[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return nothing(f"{title} No series states it.")
    low, high = np.percentile(values, [0.5, 99.5] if len(values) >= 200 else [0, 100])
    low, high = (min(low, band[0] - 1), max(high, band[1] + 1)) if band else (low, high)
    if high - low < 1e-3 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 25)
    counts = np.array([np.histogram(values[groups == kind].clip(low, high), edges)[0] for kind in kinds])
    tops = counts.cumsum(axis=0)  # (kinds, bars)
    most = max(5.0, tops.max() * 1.05)
    frame, place = axes((low, high), (0, most), unit, "series")
    body = [area("band", place(band[0], 0), place(band[1], most), f"{band[0]} to {band[1]}")] if band else []
    body.append(frame)
    for k, i in np.argwhere(counts):
        count, top = counts[k, i], tops[k, i]
        tip = f"{kinds[k]}: {count} from {edges[i]:.3g} to {edges[i + 1]:.3g}"
        body.append(area(f"s{k % 8} bar", place(edges[i], top - count), place(edges[i + 1], top), tip))
    return figure(title, caption, "".join(body), keys=squares(kinds))


def lines(
    title: str, caption: str, curves: Sequence, x: tuple, y: tuple, x_name: str, y_name: str, chance=None
) -> str:
    """Curves of (colour, name, xs, ys), thinned to 300 points; chance: the two ends of a dashed line."""
    frame, place = axes(x, y, x_name, y_name)
    body = [frame, stroke("chance", place(*chance[0]), place(*chance[1])) if chance else ""]
    for colour, name, xs, ys in curves:
        known = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
        known = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), 300)).astype(int))]
        path = [place(xs[i], np.clip(ys[i], *y)) for i in known]
        points, tip = " ".join(f"{a:.1f},{b:.1f}" for a, b in path), f"<title>{esc(name)}</title>"
        body.append(f'<polyline class="s{colour % 8} line" points="{points}">{tip}</polyline>')
        body += [marker(*at, colour % 8, "circle", name) for at in path[-1:] if len(path) == 1]
    keys = dict.fromkeys((colour % 8, "square", name) for colour, name, *_ in curves)
    return figure(title, caption, "".join(body), keys=list(keys))


def dots(title: str, caption: str, rows: Sequence[tuple[str, dict]]) -> str:
    """(name, {auc, low, high, positives}) as dots with intervals, a dashed line at 0.5."""
    size = (360, 46 + 19 * len(rows))
    frame, place = axes((0, 1), (len(rows), 0), "AUC", "", size, [name for name, _ in rows], 58)
    body = [frame, stroke("chance", place(0.5, 0), place(0.5, len(rows)))]
    for i, (name, one) in enumerate(rows):
        x, y = place(1.04, i + 0.5)
        body.append(words(x, y + 4, f"n = {one['positives']}"))
        if not math.isnan(one["low"] + one["high"]):
            body.append(stroke("s0 line", place(one["low"], i + 0.5), place(one["high"], i + 0.5)))
        if not math.isnan(one["auc"]):
            body.append(marker(*place(one["auc"], i + 0.5), 0, "circle", f"{name}: {interval(one, 'auc')}"))
    return figure(title, caption, "".join(body), size)


# --- pictures and the page ----------------------------------------------------------------------------------


def data_uri(image: np.ndarray) -> str:
    """JPEG of a grey or BGR picture, PNG of one with transparency, as a data URI."""
    kind = "png" if image.ndim == 3 and image.shape[2] == 4 else "jpeg"
    options = [cv2.IMWRITE_JPEG_QUALITY, 82] if kind == "jpeg" else []
    done, data = cv2.imencode(f".{kind}", np.ascontiguousarray(image), options)
    assert done, image.shape
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def ring(x: float, y: float, name: str) -> str:
    return f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7"/>{words(x + 9, y + 4, name, kind="on")}'


def pane(
    title: str, image: np.ndarray, steps: Sequence[float], marks=(), box=None, scale_mm=50, cross=None
) -> str:
    """A picture (rows, columns[, 3]) in true proportions; steps: mm per (row, column); a bar of scale_mm.

    marks: rings at (row, column, name); box: two corners (row, column); cross: (row, column); all in pixels.
    """
    unit = min(240 / (image.shape[1] * steps[1]), 720 / (image.shape[0] * steps[0]))  # of the drawing, per mm
    height, width = image.shape[0] * steps[0] * unit, image.shape[1] * steps[1] * unit
    pixels = (max(1, round(width * 1.4)), max(1, round(height * 1.4)))
    small = cv2.resize(np.ascontiguousarray(image), pixels, interpolation=cv2.INTER_AREA)

    def place(row: float, column: float) -> tuple[float, float]:
        return (column + 0.5) * steps[1] * unit, (row + 0.5) * steps[0] * unit

    body = [picture(data_uri(small), (0, 0), (width, height))]
    if box is not None:
        body.append(area("box", place(*box[0]), place(*box[1]), "the box that the model sees"))
    body += [ring(*place(row, column), name) for row, column, name in marks]
    if cross is not None:
        x, y = place(*cross)
        body += [stroke("ring", (x - 8, y), (x + 8, y)), stroke("ring", (x, y - 8), (x, y + 8))]
    body.append(stroke("scale", (6, height - 6), (6 + scale_mm * unit, height - 6)))
    body.append(words(6, height - 11, f"{scale_mm} mm", kind="on"))
    return figure(title, "", "".join(body), (width, height), "pane")


def grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def nothing(text: str) -> str:
    """A line in place of what is absent."""
    return f'<p class="nothing">{esc(text)}</p>' if text else ""


def scrolling(inner: str, kind: str = "") -> str:
    return f'<div class="scroll {kind}" tabindex="0">{inner}</div>'


def html_table(caption: str, rows: Sequence[dict]) -> str:
    """A table that scrolls in a box of its own; the keys of the rows are its head."""
    head, body = "".join(f'<th scope="col">{esc(name)}</th>' for name in rows[0]), []
    for row in rows[:MOST_ROWS]:
        kinds = ["num" if isinstance(cell, int) else "" for cell in row.values()]
        cells = [f'<td class="{k}">{esc(cell)}</td>' for k, cell in zip(kinds, row.values(), strict=True)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    title = f'<p class="caption">{esc(caption)}</p>' if caption else ""
    more = nothing(f"and {len(rows) - MOST_ROWS} more") if len(rows) > MOST_ROWS else ""
    return title + scrolling(table) + more


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{"".join(parts)}</section>'


# Colours are Okabe and Ito's, told apart with any colour vision, those that stand out on white first.
STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1c1e21; --soft: #5c6166; --line: #dcdee1;
  --panel: #f5f6f7; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
  --c6: #f0e442; --c7: #000; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #15171a; --fore: #e6e8ea; --soft: #a3a9af;
  --line: #363b41; --panel: #1e2125; --c0: #1f84cc; --c5: #9ad6f7; --c7: #e6e8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 0 16px 48px; background: var(--back); color: var(--fore);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; print-color-adjust: exact; }
nav { position: sticky; top: 0; z-index: 1; padding: 8px 0; background: var(--back);
  border-bottom: 1px solid var(--line); overflow-x: auto; white-space: nowrap; }
nav a { margin-right: 14px; color: var(--fore); }
section { scroll-margin-top: 56px; } h2 { margin: 44px 0 8px; } h3 { margin: 28px 0 6px; }
p { max-width: 80ch; }
.nothing, .uid { color: var(--soft); } .uid { font-size: 12px; margin: 0; }
.grid { display: grid; gap: 30px 26px; margin: 20px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.panes { display: flex; flex-wrap: wrap; gap: 16px 14px; align-items: flex-end; margin: 10px 0; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; display: block; }
figcaption, .legend, .caption, table { font-size: 13px; } figcaption { line-height: 1.4; margin-bottom: 6px; }
.pane { flex: 0 1 214px; min-width: 165px; } .pane svg { max-height: 330px; } .wide { min-width: 760px; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
.sn { --c: transparent; }
svg text { font: 11px system-ui, sans-serif; fill: var(--fore); }
rect, .mark { fill: var(--c); } .mark { stroke: var(--fore); stroke-width: 0.7; }
.bar { stroke: var(--back); stroke-width: 0.7; } .line { stroke: var(--c); stroke-width: 2; fill: none; }
line.grid { stroke: var(--line); } .chance { stroke: var(--soft); stroke-dasharray: 4 4; }
rect.band { fill: var(--line); } rect.box { fill: none; stroke: #56b4e9; stroke-width: 2; }
.ring { fill: none; stroke: #f0e442; stroke-width: 1.6; } .scale { stroke: #fff; stroke-width: 3; }
svg .on { fill: #fff; stroke: #000; stroke-width: 2.5; paint-order: stroke; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 4px; }
.legend .key { width: 12px; display: inline-block; margin-right: 5px; }
.caption { margin: 20px 0 -6px; } .scroll { overflow: auto; max-height: 560px; margin: 12px 0; }
.sheet { max-height: none; } table { border-collapse: collapse; overflow-wrap: normal; }
th, td { border: 1px solid var(--line); padding: 3px 8px; min-width: 6em;
  text-align: left; vertical-align: top; }
thead th { background: var(--panel); }
td.num { text-align: right; min-width: 0; font-variant-numeric: tabular-nums; }
.heat td { background: color-mix(in srgb, var(--c4) var(--depth), transparent); } .heat th { min-width: 3em; }
.heat .own { outline: 2px solid var(--soft); outline-offset: -2px; }
@media print { nav { display: none; } body { font-size: 11px; max-width: none; padding: 0; }
  .scroll { overflow: visible; max-height: none; } .wide { min-width: 0; } table { font-size: 8px; }
  th, td, .heat th { padding: 1px 3px; min-width: 0; } h2, h3 { break-after: avoid; }
  .grid { grid-template-columns: repeat(3, 1fr); gap: 14px; } .pane { flex-basis: 130px; min-width: 0; }
  figcaption, .legend, .caption { font-size: 9px; } tr, article { break-inside: avoid; } }
"""


def page(sections: Sequence[str]) -> str:
    names = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in names)
    title = "Intracranial aneurysms: data and results"
    wide = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{wide}<title>{title}</title><style>{STYLE}</style>'
    top = f"<header><h1>{title}</h1><p>Research software, not a medical device.</p></header>"
    body = f"{top}<nav>{links}</nav>\n<main>{''.join(sections)}</main>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"cache": "cache", "src": "dicoms", "outputs": "outputs", "submission": "submission.csv"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"default: {default}, if it exists")
    given = vars(parser.parse_args(argv))
    for name, path in given.items():
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: does not exist")
    cache, src, outputs, submission = (given[name] or Path(default) for name, default in defaults.items())
    has_cache = (cache / "index.csv").is_file()
    absent = f"{cache / 'index.csv'} does not exist; preprocess.py writes it"
    if not has_cache and not outputs.is_dir() and not submission.is_file():
        print(f"nothing to report on: {absent}", file=sys.stderr)
        return 1
    stdout = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr: stdout carries the page alone
    table, readable, sections = None, set(), [section("data", "The data", nothing(f"No cache: {absent}."))]
    if has_cache:
        table, points = read_table(cache, src)
        readable = set(table[UID][table["slab_mm"].notna()])
        sections = [data_section(table, points), images_section(table, points, cache, src)]
        sections += [points_section(table, points, cache), trouble_section(table, points, cache)]
    sections += [results_section(outputs, cache, readable), submission_section(submission, table)]
    with open(stdout, "w", encoding="utf-8") as file:
        file.write(page(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
