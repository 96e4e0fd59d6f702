"""Predict 14 probabilities for every series: the mean of all trained runs, from a cache or from DICOM files.

in   --src DIR           a cache of preprocess.py, or a tree of DICOM files of any depth (default: cache)
     --outputs DIR       a folder of runs of train.py, or a run (default: outputs)
     --series-list FILE  only these series: a UID per line, or a CSV with UIDs (default: all)
     --limit N           only the first N (default: all)
     --labels FILE       print the score against these labels, a table like train.csv: wAUC, half the AUC of
                         `Aneurysm Present` and half the mean AUC of the arteries (default: none)
out  stdout              CSV: SeriesInstanceUID and the 14 labels, a row per series; messages go to stderr
     --out FILE          the same into FILE, unless that holds series that this run leaves out; started again,
                         it goes on with the rows in .FILE.*.rows (not with --explain, --labels); then rm them
     --explain DIR       of each series UID.png and UID.findings.json, of all findings.json: presence, the
                         operating points and whether it passes them, notes, doubts (an artery over 10
                         mm on the other side of the box's middle among them); of likely places artery, score,
                         LPS mm and, from DICOM, where an image lies there, image, frame (from 0), column and
                         row; or why the series failed. Needs a locator
how  --tta [shift]       average with the mirrored view, and with `shift` what a locator answers on its volume
                         half a slab lower, mirrored too; this needs DICOM files (default: off)
     --precision P       fp16 (default on a GPU), bf16 or no (default on a CPU)
     --budget-hours H    answer all series within this time (default: no limit)
     --workers N         processes that read DICOM (default: a core less than there are)
     --series-timeout N  seconds in which a series must be read (default: 300)
     --memory-gb N       GB of memory in which it must be read (default: 4)
     --serve             answer the challenge's gateway (with its kaggle_evaluation on PYTHONPATH)
     --num-series N      how many series the gateway has, for --budget-hours (default: 2500)
run  python infer.py --src TEST_DICOMS > submission.csv
     python infer.py --src FOLDER_OF_ONE_SERIES --explain pictures
     accelerate launch infer.py --src TEST_DICOMS --out submission.csv     several processes share the series

A series that cannot be read, or not in time, gets the prior: how often each label was positive in training.
That is not a finding, though scores rank it. With --budget-hours mirrored and shifted views go first, then
the lightest members.
exit 0 all well, 3 some rows are the prior (named on stderr), 1 nothing done, 2 wrong usage, 130/143 stopped.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import zlib
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from numpy import ndarray
from pandas import DataFrame

import common
import dicom
from common import AP, CHECKPOINT, LABELS, PRESENT, SWAP, UID, Output, Run, log, propose, sigmoid
from dicom import Series, Volume, VolumeSettings, safe_uid, to_voxel

SHARED = Path(os.environ.get("KAGGLE_SHARED", "/kaggle/shared"))  # emptied after each call of --serve
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}  # of autocast; None: float32
log_once = cache(log)
log_any = partial(log, everywhere=True)  # from any process


# --- from a series to its answer ----------------------------------------------------------------------------
@dataclass
class Source:
    """The series by UID: the cached volume or the DICOM files (a list or a folder) of each, or why not."""

    series: dict
    settings: dict | None = None  # of a cache's volumes; None: DICOM files


@dataclass
class Scan:
    """What was read of a series."""

    volumes: dict  # VolumeSettings -> Volume, one for each of the ensemble's settings
    patient: str = ""  # (0010,0020) PatientID, in a cache its hash
    series: Series | None = None  # without pixels and headers; a cache knows none


def find_source(src: Path) -> Source:
    """The series of a cache or of a tree of DICOM files. Raises ValueError where there is none."""
    volumes = {path.stem: path for path in sorted(src.glob("*.safetensors"))}
    for path in volumes.values():
        with suppress(ValueError):  # a damaged volume's row will say so
            settings = common.load_volume(path, [])[1]["settings"]
            break
    else:
        series, strays = dicom.find_series(src) if src.is_dir() else ({}, [])
        if strays:
            log(f"files of no series left out, by reason: {DataFrame(strays)[1].value_counts().to_dict()}")
        if not series:
            kind = "a file" if src.is_file() else "no DICOM image" if src.is_dir() else "no such folder"
            raise ValueError(f"--src {src}: {kind}; expected a folder: a cache, or a tree of DICOM files")
        return Source(series)
    index = common.read_csv(src / "index.csv", [UID, "reason"], dtype=str).set_index(UID)
    reasons = "in preprocessing: " + index["reason"].fillna("its volume is missing")
    return Source(reasons.to_dict() | volumes, settings)


def choose_series(source: Source, path: Path | None) -> list:
    """UIDs of the rows: as listed in path (a UID per line, or a CSV), else all, sorted."""
    if path is None:
        return sorted(source.series)
    lines = path.read_text("utf-8-sig").splitlines()
    rows = [re.split(r'[ "]*[,;\t][ "]*', line.strip(' "')) for line in lines]
    column = next((row.index(UID) for row in rows if UID in row), 0)
    cells = dict.fromkeys(row[column] for row in rows if len(row) > column)
    uids = [uid for uid in cells if uid not in ("", UID)]
    if not uids:
        raise ValueError(f"{path}: lists no series; expected a UID per line, or a CSV with a column {UID}")
    return uids


def read_scans(source: Source, uids: list, settings: set, args: Namespace) -> Iterator:
    """((uid, files), scan, None) or ((uid, files), None, why not) as they are read; None while waiting."""
    items = []
    for uid in uids:
        files = source.series.get(safe_uid(uid), f"not in {args.src}")
        if isinstance(files, str):
            yield (uid, None), None, files
        else:
            items.append((uid, files))
    if items:
        read = partial(read_dicom, settings=settings)
        if source.settings:
            read = partial(read_cached, settings=settings, expected=source.settings)
        limits = args.workers, args.series_timeout, args.memory_gb
        yield from common.run_isolated(read, items, *limits, tick_s=1)


def read_cached(item: tuple, settings: set, expected: dict) -> Scan:
    """The cached volume, without its annotated points. Raises ValueError if its settings are not expected."""
    _, path = item
    tensors, meta = common.load_volume(path, ["volume"])
    if difference := common.describe_difference(meta["settings"], expected):
        raise ValueError(f"{path}: differs from the rest of the cache: {difference}; preprocess again")
    volume = Volume(tensors["volume"], np.array(meta["affine"]), [], meta["doubts"])
    return Scan(dict.fromkeys(settings, volume), meta["patient"])


def read_dicom(item: tuple, settings: set) -> Scan:
    """A volume for each of the settings, from files read and decoded once."""
    uid, files = item
    series = dicom.read_series(files, uid)
    if len(settings) > 1:
        series.forget = lambda *_: None  # decoded slices stay for the next volume
    volumes = {each: dicom.make_volume(series, each) for each in settings}
    frames = [replace(frame, header={}) for frame in series.frames]  # headers are large to send
    return Scan(volumes, series.patient, replace(series, frames=frames, geometry={}))


@dataclass(eq=False)
class Member:
    """A run with a vote, or a locator that only proposes."""

    run: Run
    dtype: torch.dtype | None
    device: torch.device
    locator: Member | None  # whose proposals its crops show; None: decoys


@dataclass
class Ensemble:
    members: list  # the heaviest first: a deadline cuts from the end
    models: list  # the members, and locators that only propose
    prior: ndarray  # (14,) mean share of positives in the members' training folds
    points: list  # operating points, the mean over members, by growing specificity
    deadline: Deadline


def check_run(run: Run, cache_settings: dict | None) -> None:
    """Say what speaks against a run. Raises ValueError if it takes other volumes than those of the cache."""
    settings, metrics = common.volume_settings(run.cfg), run.folder / "metrics.json"
    if difference := common.describe_difference(cache_settings or settings, settings):
        raise ValueError(f"{run.folder}: the cache does not fit: {difference}")
    if metrics.is_file():
        if json.loads(metrics.read_text()).get("is_nearly_constant"):
            log(f"{run.folder}: its predictions are nearly the same for all series")
    elif (run.folder / "last").is_dir():
        log(f"{run.folder}: this run of train.py is not finished, its best epoch so far is used")


def load_ensemble(args: Namespace, devices: list, cache_settings: dict | None = None) -> Ensemble:
    """Every run of --outputs that can be loaded and fits the cache, if any; the others are named."""
    dtype = DTYPES[args.precision or ("fp16" if devices[0].type == "cuda" else "no")]
    turns = itertools.cycle(devices)

    @cache
    def load(folder: Path) -> Member | None:
        try:
            run = common.load_run(folder)
            check_run(run, cache_settings)
        except Exception as error:  # a checkpoint can hold anything
            log(f"left out: {error}")
            return None
        name = run.meta["locator"]  # beside the run's folder
        locator = load((folder.parent / name).resolve()) if name else None
        if name and not locator:
            log(f"{folder.name}: decoys instead of proposals, as its locator {name} is missing")
        device = locator.device if locator else next(turns)  # a classifier lies beside its locator
        run.model.to(device)
        return Member(run, dtype, device, locator)

    folders = filter(Path.is_dir, sorted(args.outputs.glob("*")))
    if (args.outputs / CHECKPOINT).is_file():
        folders = [args.outputs]
    members = [load(folder.resolve()) for folder in folders]
    members = [member for member in members if member and member.run.cfg.ensemble_weight > 0]
    if not members:
        raise ValueError(f"--outputs {args.outputs}: no run of train.py to use; each has a {CHECKPOINT}")
    members.sort(key=lambda member: -member.run.cfg.ensemble_weight)
    models = list(dict.fromkeys(members + [member.locator for member in members if member.locator]))
    prior = np.mean([member.run.meta["prior"] for member in members], axis=0)
    points = [point for member in members for point in member.run.meta.get("operating_points", [])]
    table = DataFrame(points, columns=["specificity", "threshold", "sensitivity", "positives"])
    points = table.groupby("specificity", as_index=False).mean().round(3).to_dict("records")
    num_lower = sum(member.run.cfg.task == "locate" for member in members) * (args.tta == "shift")
    num_views = (len(members) + num_lower) * (1 + bool(args.tta))
    deadline = Deadline(args.started, 3600 * args.budget_hours, len(members), num_views, monotonic())
    return Ensemble(members, models, prior, points, deadline)


def predict_series(ensemble: Ensemble, uid: str, scan: Scan, num_views: int) -> tuple:
    """probs (14,), the weighted mean of members, and all outputs. FloatingPointError if none is finite."""
    members = ensemble.members[:num_views]
    is_mirrored = num_views > len(ensemble.members)
    outputs = {}

    def run_device(device: torch.device) -> None:
        for member in members:
            if member.device == device:
                run_member(member, uid, scan, is_mirrored, outputs)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run_device, {member.device for member in members}))
    probs, weights = [], []
    for member in members:
        logits = outputs[member].logits
        if np.isfinite(logits).all():
            probs.append(sigmoid(logits).mean(axis=0))
            weights.append(member.run.cfg.ensemble_weight)
        else:
            log_any(f"{uid}: left out {member.run.folder}: NaN or infinite; try --precision no")
    if not probs:
        raise FloatingPointError("no member gave finite logits")
    return np.average(probs, axis=0, weights=weights), outputs


def run_member(member: Member, uid: str, scan: Scan, is_mirrored: bool, outputs: dict) -> Output:
    """A member's output, its locator's first. Both join outputs, so that a locator that votes runs once."""
    if member in outputs:
        return outputs[member]
    cfg, proposals = member.run.cfg, None
    volume = scan.volumes[cfg.volume]
    if member.locator:
        maps = run_member(member.locator, uid, scan, is_mirrored, outputs).maps
        locator_cfg = member.locator.run.cfg
        peaks = propose(maps, scan.volumes[locator_cfg.volume].affine, locator_cfg)
        proposals = to_voxel(peaks[:, :3], volume.affine)
    image = volume.voxels
    if cfg.num_crops:
        decoys = np.array(member.run.meta["decoys"])
        crops = common.deployed_crops(image, volume.spacing_mm, uid, decoys, proposals, cfg)
        image = np.concatenate([image, crops])
    output = predict_views(member, image, is_mirrored)
    lower = scan.volumes.get(lower_box(cfg.volume))
    if is_mirrored and lower and cfg.task == "locate":
        more = predict_views(member, lower.voxels, is_mirrored)
        output = output._replace(logits=np.concatenate([output.logits, more.logits]))
    outputs[member] = output
    return output


def lower_box(settings: VolumeSettings) -> VolumeSettings:
    """The box half a slab lower, whose slabs show halves of two others."""
    half_mm = (settings.roi_top_mm - settings.roi_skip_mm) / settings.base_slices / 2
    top_mm, skip_mm = settings.roi_top_mm + half_mm, settings.roi_skip_mm + half_mm
    return replace(settings, roi_top_mm=top_mm, roi_skip_mm=skip_mm)


@torch.inference_mode()
def predict_views(member: Member, image: ndarray, is_mirrored: bool) -> Output:
    """Logits (1 or 2 views, 14) of an image (C, H, W) uint8 and of its mirror image, whose labels are swapped
    back; and the first view's maps (13, Z, h, w) as probabilities."""
    images = torch.from_numpy(image.copy())[None].to(member.device).float() / 255
    if is_mirrored:
        images = torch.cat([images, images.flip(-1)])
    with torch.autocast(images.device.type, member.dtype, enabled=member.dtype is not None):
        logits, maps = member.run.model(images)
    logits = logits.float().cpu().numpy()
    logits[1:] = logits[1:, SWAP]
    if maps is not None:
        maps = torch.sigmoid(maps[0].float()).cpu().numpy()
    return Output(logits, maps)


@dataclass
class Deadline:
    """Plans each series so that the last is answered within `seconds` of the start. Reads no clock. A series
    costs what the models take, in proportion to views, and the time beside them. Nothing is cut in the first
    twentieth of the time; the slowest series' time stays in reserve, and a fiftieth of all for the table."""

    started: float  # in seconds of the clock, like `now`
    seconds: float
    num_members: int
    full_views: int  # of all members, their mirror images and shifted volumes
    last: float  # when the latest series was answered; at first when the first one begins
    totals: tuple = (0, 0, 0, 0)  # series, their seconds, the models' seconds, views
    slowest_s: float = 0.0

    def observe(self, now: float, forward_s: float, num_views: int) -> None:
        """A series was answered now."""
        series_s, self.last = now - self.last, now
        self.slowest_s = max(self.slowest_s, series_s)
        self.totals = np.add(self.totals, (1, series_s, forward_s, num_views))

    def plan_views(self, now: float, num_left: int) -> int:
        """How many views all remaining series can have: full_views, or one of each of the first members."""
        left_s = self.started + 0.98 * self.seconds - now - self.slowest_s
        if left_s <= 0:
            return 0
        num_series, total_s, forward_s, num_views = self.totals
        if num_series == 0 or now < self.started + self.seconds / 20:
            return self.full_views
        beside_s = (total_s - forward_s) / num_series
        affordable = (left_s / num_left - beside_s) * num_views / forward_s
        if affordable >= self.full_views:
            return self.full_views
        return int(np.clip(affordable, 1, self.num_members))


@dataclass
class Answer:
    uid: str
    probs: ndarray  # (14,)
    reason: str = ""  # why it is the prior
    patient: str = ""


def answer_all(ensemble: Ensemble, source: Source, uids: list, args: Namespace, save=None, later=0) -> list:
    """An answer for each of uids, saved as soon as it is known; later series come in other calls."""
    deadline, answers = ensemble.deadline, []
    settings = {model.run.cfg.volume for model in ensemble.models}
    if args.tta == "shift":
        configs = [model.run.cfg for model in ensemble.models]
        settings |= {lower_box(cfg.volume) for cfg in configs if cfg.task == "locate"}
    bar = common.progress(len(uids), "series", show=args.is_main)
    with bar, closing(read_scans(source, uids, settings, args)) as scans:
        for item in scans:
            num_views = deadline.plan_views(monotonic(), len(uids) - len(answers) + later)
            if num_views < deadline.full_views:
                log_once(f"deadline: {num_views} of {deadline.full_views} views")
            if num_views == 0:
                break
            if item:
                answers.append(answer_series(ensemble, item, num_views, args))
                if save:
                    save(answers[-1])
                bar.update()
    left = sorted(set(uids) - {answer.uid for answer in answers})
    if left:
        log_any(f"the time is over: {len(left)} series get the prior")
    return answers + [Answer(uid, ensemble.prior, "no time left") for uid in left]


def answer_series(ensemble: Ensemble, item: tuple, num_views: int, args: Namespace) -> Answer:
    """The answer to an item of read_scans. Raises OSError only if the GPU has failed for good."""
    (uid, _), scan, reason = item
    if reason:
        return answer_prior(ensemble, uid, reason)
    for doubt in scan.volumes[ensemble.models[0].run.cfg.volume].doubts:
        log_any(f"{uid}: doubtful, but used: {doubt}")
    skipped = scan.series.skipped if scan.series else []
    if skipped:
        log_any(f"{uid}: {len(skipped)} files left out, the first {skipped[0][0].name}: {skipped[0][1]}")
    started = monotonic()
    try:
        probs, outputs = predict_series(ensemble, uid, scan, num_views)
    except Exception as error:  # out of memory, logits that are not finite: this row alone
        text = f"{error!r:.200}"
        if "CUDA error" in text and "out of memory" not in text:  # every later call would fail as well
            raise OSError(5, f"{text}; run again (with --out it goes on where it stopped)", uid) from error
        return answer_prior(ensemble, uid, text)
    now = monotonic()
    ensemble.deadline.observe(now, now - started, num_views)
    answer = Answer(uid, probs, patient=scan.patient)
    if args.explain:
        explain_series(answer, ensemble, scan, outputs, args.explain)
    return answer


def answer_prior(ensemble: Ensemble, uid: str, reason: str) -> Answer:
    log_any(f"{uid}: answered by the prior, which is not a finding: {reason}")
    return Answer(uid, ensemble.prior, reason)


def explain_series(answer: Answer, ensemble: Ensemble, scan: Scan, outputs: dict, folder: Path) -> None:
    """Write and draw places in the mean map of the first kind of locator, and say the answer in words."""
    locators = [model for model in outputs if model.run.cfg.task == "locate"]
    if not locators:
        log_once("--explain: no locator among the members that ran, so no picture and no findings")
        return
    cfg = locators[0].run.cfg  # only maps of the same volume at the same stride have a mean
    alike = [model for model in locators if model.run.cfg.volume == cfg.volume]
    maps = [outputs[model].maps for model in alike if model.run.cfg.locator_stride == cfg.locator_stride]
    volume, maps = scan.volumes[cfg.volume], np.mean(maps, axis=0)
    present = float(answer.probs[AP])
    lines = [f"{answer.uid}: {PRESENT} {present:.4f}{'' if ensemble.points else ', no operating points'}"]
    points = [point | {"is_passed": present >= point["threshold"]} for point in ensemble.points]
    facts = {UID: answer.uid, PRESENT: round(present, 4), "operating_points": points}
    facts |= {"doubts": volume.doubts, "notes": volume.notes}
    for point in points:
        side = f"{'above' if point['is_passed'] else 'below'} {point['threshold']:.3f}, threshold of"
        rates = f"specificity {point['specificity']:.2f}, sensitivity {point['sensitivity']:.2f}"
        lines.append(f"  {side} {rates} of {point['positives']:.0f} positives")
    best = [f"{LABELS[k]} {answer.probs[k]:.3f}" for k in np.argsort(-answer.probs[:AP])[:3]]
    lines.append(f"  likeliest arteries, with the probability of an aneurysm there: {', '.join(best)}")
    path, findings = folder / f"{safe_uid(answer.uid)}.findings.json", []
    for *point_mm, score, label in propose(maps, volume.affine, cfg).tolist():
        (voxel,) = to_voxel(point_mm, volume.affine).round(1).tolist()
        place = {"artery": LABELS[int(label)], "score": round(score, 4), "voxel": voxel}
        place["lps_mm"] = np.round(point_mm, 2).tolist()
        image = find_image(point_mm, scan.series) if scan.series else {}
        findings.append(facts | place | image)
        if doubt := common.doubt_side(voxel, int(label), volume):
            findings[-1]["doubts"] = [*volume.doubts, doubt]
            lines.append(f"  doubtful: place {len(findings)}, {doubt}")
    common.write_json(path, findings)
    picture = folder / f"{safe_uid(answer.uid)}.png"
    common.write_atomic(picture, draw_findings(volume, maps.sum(0), findings))
    num_beside = sum("row" not in finding for finding in findings) if scan.series else 0
    lines.append(f"  {path}: {len(findings)} likeliest places, {num_beside} of them where no image lies")
    log_any("\n".join(lines))


def find_image(point_mm: ndarray, series: Series) -> dict:
    """The nearest image to a point (LPS mm), its column and row there; {} where it is over 0.55 gaps away."""
    away_mm = np.abs(series.normal @ point_mm - series.positions_mm)
    if away_mm.min() > 0.55 * series.spacing_mm[0]:
        return {}
    frame = series.frames[away_mm.argmin()]
    offset_mm = point_mm - frame.position
    row_mm, col_mm = frame.spacing_mm
    return {
        "SOPInstanceUID": frame.sop_uid,
        "frame": frame.index,
        "column": round(offset_mm @ frame.row_dir / col_mm, 2),
        "row": round(offset_mm @ frame.col_dir / row_mm, 2),
    }


def draw_findings(volume: Volume, heat: ndarray, findings: list) -> bytes:
    """A PNG with a row per finding: its slab plain, and under the heat (Z, h, w; absolute) with a cross."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    num = len(findings)
    figure = Figure((9, 1 + 4 * num), layout="constrained")
    panels = figure.subplots(num, 2, squeeze=False)
    for (plain, overlay), finding in zip(panels, findings, strict=True):
        z, y, x = finding["voxel"]
        slab = round(z)
        for axes in (plain, overlay):
            # the lower half is lifted, where CT has its contrast-filled arteries
            grey = axes.imshow(volume.voxels[slab], "gray", PowerNorm(0.6, 0, 255))
            axes.set_title("R", loc="left")  # of the patient
            axes.set_title("L", loc="right")
            axes.set_axis_off()
        options = {"extent": grey.get_extent(), "interpolation": "bilinear", "vmin": 0, "vmax": 1}
        image = overlay.imshow(heat[slab], "inferno", alpha=0.7 * heat[slab] ** 0.5, **options)
        overlay.plot(x, y, "c+", markersize=14)
        title = f"{finding['artery']} {finding['score']:.4f}{' doubtful' * bool(finding['doubts'])}"
        overlay.set_title(title, fontsize=8)
        plain.set_title(f"slab {slab} (0 to {len(heat) - 1})")
        bottom = len(volume.voxels[slab]) - 3
        plain.hlines(bottom, 3, 3 + 20 / volume.spacing_mm[2], color="c")
        plain.text(3, bottom, "20 mm", color="c", va="bottom")
    figure.colorbar(image, ax=panels, shrink=0.5, label="probability of an aneurysm at this place")
    title = f"{finding[UID]}\n{PRESENT} {finding[PRESENT]:.4f}. Not for diagnosis."
    figure.suptitle("\n".join([title, *volume.doubts]), wrap=True)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return png.getvalue()


def describe_score(answers: list, labels: DataFrame, members: list) -> str:
    """The score for people. Warns of series that may have trained a member."""
    by_uid = {safe_uid(answer.uid): answer for answer in answers}
    table = labels[labels[UID].isin(by_uid)].assign(plane="")
    if table.empty:
        raise ValueError(f"--labels: none of the {len(answers)} predicted series is among them")
    table["patient"] = [by_uid[uid].patient or uid for uid in table[UID]]
    result = common.score(table, np.stack([by_uid[uid].probs for uid in table[UID]]))
    text = "\n".join(
        DataFrame.from_dict(result[part], "index").to_string(float_format="%.3f", na_rep="–")
        for part in ("per_label", "per_modality")
    )
    num_prior = sum(bool(by_uid[uid].reason) for uid in table[UID])
    text += (
        f"\n{common.UNDEFINED}\nwAUC {common.describe_wauc(result)}, {len(table)} series of "
        f"{result['num_patients']} patients, {num_prior} by the prior, a patient each; left out: "
        f"{len(by_uid) - len(table)} without labels, {len(labels) - len(table)} without a prediction"
    )
    in_all = set.intersection(*(set(member.run.meta["val_uids"]) for member in members))
    if num_trained := len(set(table[UID]) - in_all):
        text += (
            f"\n{num_trained} of {len(table)} scored series were not held out by all members: if one of them "
            f"was trained on such a series, the score is too high"
        )
    return text


def serve(args: Namespace) -> list:
    """Answer the gateway: the hidden one, or outside of a submission the local one."""
    try:
        from kaggle_evaluation.rsna_inference_server import RSNAInferenceServer
    except ImportError as error:
        raise ValueError(f"--serve: {error}; put the competition's data folder on PYTHONPATH") from error

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    ensemble, answers = load_ensemble(args, devices or [torch.device("cpu")]), []
    args.is_main, args.explain = False, None  # one bar for all series instead of one for each
    bar = common.progress(args.num_series, "series")

    def predict(series_path: str) -> DataFrame:
        """A row of 14 probabilities; the prior if anything goes wrong: an exception would end the run."""
        folder = Path(series_path)
        source = Source({safe_uid(folder.name): folder})
        num_later = max(0, args.num_series - len(answers) - 1)
        try:
            (answer,) = answer_all(ensemble, source, [folder.name], args, later=num_later)
        except Exception as error:
            answer = answer_prior(ensemble, folder.name, repr(error))
        answers.append(answer)
        bar.update()
        shutil.rmtree(SHARED, ignore_errors=True)  # what stays in it fills the disk
        with suppress(OSError):
            os.makedirs(SHARED, exist_ok=True)
        return DataFrame([answer.probs], columns=LABELS)

    server = RSNAInferenceServer(predict)
    (server.serve if os.environ.get("KAGGLE_IS_COMPETITION_RERUN") else server.run_local_gateway)()
    return answers


# --- the command --------------------------------------------------------------------------------------------
def parse_arguments(arguments: list | None = None) -> Namespace:
    readers = max(1, common.usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    parser = common.make_parser(__doc__)
    parser.usage = "infer.py [options]"
    add = partial(parser.add_argument, help=SUPPRESS)  # the manual lists them
    for name in ("--src", "--out", "--explain", "--series-list", "--labels"):
        add(name, type=Path)
    counts = {"limit": None, "workers": readers, "series-timeout": 300, "memory-gb": 4, "num-series": 2500}
    for name, default in counts.items():
        add(f"--{name}", type=common.positive_int, default=default)
    add("--outputs", type=Path, default="outputs")
    add("--precision", choices=DTYPES)
    add("--budget-hours", type=float, default="inf")
    add("--tta", nargs="?", const="mirror", choices=["mirror", "shift"])
    add("--serve", action="store_true")
    args = parser.parse_args(arguments)
    if not args.budget_hours > 0:
        parser.error("--budget-hours: expected more than 0")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out}: expected a file in a folder that exists")
    args.started = monotonic()
    return args


def predict_table(args: Namespace, stdout: io.TextIOBase) -> list:
    """Write the table of --src; several processes share the series. The main one's answers are all."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    args.is_main = state.is_main_process
    if args.src is None:
        args.src = Path("cache")
        log("no --src: predicting the training cache `cache`; for other scans add --src TEST_DICOMS")
    source = find_source(args.src)
    if source.settings and args.tta == "shift":
        raise ValueError(f"--tta shift: {args.src} is a cache; expected DICOM files, or --tta alone")
    labels = common.read_label_table(args.labels) if args.labels else None
    uids = choose_series(source, args.series_list)[: args.limit]
    if args.explain:
        args.explain.mkdir(parents=True, exist_ok=True)
    ensemble = load_ensemble(args, [state.device], source.settings)
    names = ", ".join(member.run.folder.name for member in ensemble.members)
    log(f"{len(uids)} series, {state.num_processes} processes, {len(ensemble.members)} members: {names}")
    answers = gather_object(answer_share(ensemble, source, uids, args, state))
    if not state.is_main_process:
        return []
    table = DataFrame({answer.uid: answer.probs for answer in answers}, index=LABELS)
    text = table[uids].T.to_csv(index_label=UID, float_format="%.8g")
    if args.out:
        common.write_atomic(args.out, text.encode())
    else:
        with stdout:  # a closed file is not flushed again as Python ends
            stdout.write(text)
    if args.labels:
        log(describe_score(answers, labels, ensemble.members))
    if args.explain:
        parts = [json.loads(path.read_text()) for path in sorted(args.explain.glob("*.findings.json"))]
        parts.append([{UID: answer.uid, "failed": answer.reason} for answer in answers if answer.reason])
        common.write_json(args.explain / "findings.json", list(itertools.chain(*parts)))
    return answers


def answer_share(
    ensemble: Ensemble, source: Source, uids: list, args: Namespace, state: PartialState
) -> list:
    """This process's answers. With --out alone a file keeps them, but for the prior, for a second start; it
    is named by all that rows depend on, so that rows of other members or settings are never mixed in."""
    if args.out and args.out.is_file():
        header, *rows = args.out.read_text(errors="replace").splitlines() or [""]
        others = {row.split(",")[0] for row in rows}.difference(uids)
        if others or header != ",".join([UID, *LABELS]):
            raise ValueError(f"--out {args.out}: no submission, or {len(others)} other series; name another")
    uids = uids[state.process_index :: state.num_processes]
    if args.explain or args.labels or not args.out:
        return answer_all(ensemble, source, uids, args)
    facts = [args.src.resolve(), args.tta, args.precision, state.process_index, state.num_processes]
    for model in ensemble.models:
        facts += [model.run.folder, (model.run.folder / CHECKPOINT).stat().st_mtime_ns]
    path = args.out.with_name(f".{args.out.name}.{zlib.crc32(str(facts).encode()):08x}.rows")
    path.touch()
    text = path.read_text()
    text = text[: text.rfind("\n") + 1]  # a kill tears the last line
    common.write_atomic(path, text.encode())
    rows = [line.split(",") for line in text.splitlines()]
    done = {uid: Answer(uid, np.array(probs, dtype=float)) for uid, *probs in rows}
    left = [uid for uid in uids if uid not in done]
    if done:
        log_any(f"{args.out}: {len(uids) - len(left)} of {len(uids)} rows are complete; to repeat, rm {path}")

    def save(answer: Answer) -> None:
        if not answer.reason:
            print(answer.uid, *answer.probs.tolist(), sep=",", file=file)

    with open(path, "a", buffering=1) as file:
        return [*done.values(), *answer_all(ensemble, source, left, args, save)]


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        stdout = common.reserve_stdout()
        answers = serve(args) if args.serve else predict_table(args, stdout)
        num_prior = sum(bool(answer.reason) for answer in answers)
        log(f"{len(answers)} rows, {num_prior} of them the prior; {monotonic() - args.started:.1f} s")
        return 3 if num_prior else 0
    except SystemExit as stop:
        log(f"infer.py: stopped by {signal.Signals(stop.code - 128).name}; with --out a second start goes on")
        return stop.code
    except ValueError as error:
        log_any(f"infer.py: {error}")
    except OSError as error:  # a write to a full disk does not say where
        log_any(f"infer.py: {error.filename or args.out or 'stdout'}: {error.strerror or error}")
    return 1


if __name__ == "__main__":
    common.exit_rank(main())
