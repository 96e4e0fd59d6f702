"""Predict 14 probabilities for every series: the mean of all trained runs, from a cache or from DICOM files.

in   --src PATH      a cache of preprocess.py, or a tree of DICOM files of any depth (default: cache)
     --outputs PATH  a folder of runs of train.py, a run, or a glob of runs (default: outputs)
out  stdout          CSV: SeriesInstanceUID and the 14 labels, a row per series; messages go to stderr
     --out FILE      the same into FILE; finished rows gather in FILE.partial.csv, and a second start goes on
     --explain DIR   a picture of each suspicious series (of all, where --series-list or a single series
                     names them), and findings.json: artery, score, LPS mm and, from DICOM, the image, frame
                     (from 0), column and row of the likeliest places; needs a locator among the runs
run  python infer.py --src TEST_DICOMS > submission.csv
     python infer.py --src TEST_DICOMS --out submission.csv --tta --budget-hours 11.5
     python infer.py --src FOLDER_OF_ONE_SERIES --explain pictures
     accelerate launch infer.py --src TEST_DICOMS --out submission.csv     several processes share the series
     python infer.py --serve --outputs /kaggle/input/outputs               answers Kaggle's gateway

A series that is unreadable, or slower than --series-timeout, gets the prior: how often each label was
positive in training. With --budget-hours the mirrored view goes first, then members from the end of the list
(the heaviest ensemble_weight stands first), at last the remaining series get the prior.
exit 0 all well, 3 some rows are the prior (each with its reason), 1 nothing could be done, 2 wrong usage,
130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

import common
from common import AP, LABELS, SWAP, UID, Output, Run, log, sigmoid
from dicom import (
    Frame,
    Volume,
    VolumeSettings,
    find_series,
    make_volume,
    read_series,
    safe_uid,
    to_lps,
    to_voxel,
)

SHARED = Path(os.environ.get("KAGGLE_SHARED", "/kaggle/shared"))  # emptied after each call of --serve
CHECKPOINT = "best_ema.safetensors"
SUSPICIOUS = 0.5  # --explain shows series with this probability of Aneurysm Present


log_once = functools.cache(log)


# --- the series ---------------------------------------------------------------------------------------------


@dataclass
class Source:
    """The cached volume of each series, or its DICOM files (a list or a folder), and why others have none."""

    is_cache: bool
    series: dict[str, Path | list[Path]]
    failed: dict[str, str]
    settings: dict | None = None  # of the cache's volumes


@dataclass
class Scan:
    """What was read of a series."""

    volumes: dict[VolumeSettings, Volume]  # one for each of the ensemble's settings
    frames: list[Frame]  # where each image lies; a cache knows none


def find_source(src: Path) -> Source:
    """The series of a cache or of a tree of DICOM files. Raises ValueError where there is none."""
    if not src.is_dir():
        raise ValueError(f"--src {src}: no such folder; expected a cache or a tree of DICOM files")
    paths, index, settings = sorted(src.glob("*.safetensors")), read_index(src), None
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged volume's row will say so
            settings = common.load_volume(path, [])[1]["settings"]
            break
    if settings is None and index.empty:
        series, strays = find_series(src)
        strays = [stray for stray in strays if stray[0].suffix != ".csv"]  # tables of labels and points
        if strays:
            log("{} files belong to no series, such as {}: {}".format(len(strays), *strays[0]))
        if not series:
            raise ValueError(f"{src}: no DICOM image; expected a cache or a tree of DICOM files")
        return Source(False, series, {})
    source = Source(True, {path.stem: path for path in paths}, {}, settings)
    for uid, reason in index["reason"].items():
        if uid not in source.series:
            source.failed[uid] = f"in preprocessing: {reason or 'its volume is missing; preprocess again'}"
    return source


def read_index(src: Path) -> pd.DataFrame:
    """The index.csv of preprocess.py by UID; empty where there is none, or another program's."""
    columns = ["reason", "patient"]
    try:
        return pd.read_csv(src / "index.csv", dtype=str, keep_default_na=False).set_index(UID)[columns]
    except (OSError, ValueError, KeyError):
        return pd.DataFrame(columns=columns)


def choose_series(source: Source, path: Path | None) -> list[str]:
    """UIDs of the rows: as listed in path (a UID per line, or a CSV), else all, sorted."""
    if path is None:
        return sorted({*source.series, *source.failed})
    lines = path.read_text("utf-8-sig").splitlines()
    rows = [[cell.strip(' "') for cell in re.split("[,;\t]", line)] for line in lines]
    column = next((row.index(UID) for row in rows if UID in row), None)
    cells = [row if column is None else row[column : column + 1] for row in rows]
    uids = dict.fromkeys(itertools.chain.from_iterable(cells))
    uids = [uid for uid in uids if uid not in ("", UID)]
    if not uids:
        raise ValueError(f"{path}: lists no series; expected a UID per line, or a CSV with a column {UID}")
    return uids


def read_scans(
    source: Source, uids: list[str], settings: list[VolumeSettings], args: argparse.Namespace
) -> Iterator[tuple[str, Scan | None, str] | None]:
    """(uid, scan, "") or (uid, None, why not); each series fails alone. DICOM files come in any order, read
    ahead while the models work; None comes after each second of waiting for them."""
    paths = {uid: source.series[safe_uid(uid)] for uid in uids if safe_uid(uid) in source.series}
    for uid in uids:
        if uid not in paths:
            yield uid, None, source.failed.get(safe_uid(uid), f"not in {args.src}")
        elif source.is_cache:
            try:
                yield uid, read_cached(paths[uid], source.settings, settings), ""
            except (OSError, ValueError, KeyError) as error:
                yield uid, None, f"{type(error).__name__}: {error}"
    if source.is_cache:
        return
    function = functools.partial(read_dicom, settings=settings)
    limits = {"timeout_s": args.series_timeout, "memory_gb": args.memory_gb}
    work = common.run_isolated(function, paths.items(), workers=args.workers, tick_s=1.0, **limits)
    with contextlib.closing(work):
        for answer in work:
            if answer is None:
                yield None
            else:
                (uid, _), scan, reason = answer
                yield uid, scan, reason or ""


def read_cached(path: Path, expected: dict, settings: list[VolumeSettings]) -> Scan:
    """The cached volume, without its annotated points. Raises ValueError if its settings are not expected."""
    tensors, meta = common.load_volume(path, ["volume"])
    difference = common.describe_difference(meta["settings"], expected)
    if difference:
        raise ValueError(f"{path}: differs from the rest of the cache: {difference}; preprocess again")
    volume = Volume(tensors["volume"], np.array(meta["affine"]), [], meta["doubts"])
    return Scan(dict.fromkeys(settings, volume), [])


def read_dicom(item: tuple, settings: list[VolumeSettings]) -> Scan:
    """A volume for each of the settings, from files read and decoded once."""
    uid, files = item
    series = read_series(files, uid)
    if len(settings) > 1:
        series.forget = lambda *_: None  # decoded slices stay for the next volume
    volumes = {each: make_volume(series, each) for each in settings}
    frames = [replace(frame, header={}) for frame in series.frames]  # headers are large to send
    return Scan(volumes, frames)


# --- the ensemble -------------------------------------------------------------------------------------------


@dataclass
class Member:
    """A run with a vote, or a locator that only proposes."""

    run: Run
    dtype: torch.dtype | None  # of autocast; None: float32
    device: torch.device | None = None
    locator: Member | None = None  # whose proposals its crops show; None: decoys

    @property
    def name(self) -> str:
        return str(self.run.folder)


@dataclass
class Ensemble:
    members: list[Member]  # the heaviest first: a deadline cuts from the end
    models: list[Member]  # the members, and locators that only propose
    settings: list[VolumeSettings]  # of their volumes, each once
    prior: np.ndarray  # (14,) mean share of positives in the members' training folds
    devices: list[torch.device]
    threads: ThreadPoolExecutor  # one per device


def find_runs(outputs: str) -> list[Path]:
    """Folders with a checkpoint: outputs itself or those in it; where it is no folder, what it matches as a
    glob."""
    folder = Path(outputs)
    paths = folder.iterdir() if folder.is_dir() else map(Path, glob.glob(outputs))
    folders = [path for path in sorted(paths) if path.is_dir()]
    runs = [path for path in (folder, *folders) if (path / CHECKPOINT).is_file()]
    if not folders and not runs:
        raise ValueError(f"--outputs {outputs}: no such folder, or an empty one; expected runs of train.py")
    if not runs:
        raise ValueError(f"--outputs {outputs}: none of {len(folders)} folders is a run of train.py")
    empty = [path.name for path in folders if path not in runs]
    if empty and folder not in runs:
        log(f"passed over, without {CHECKPOINT}: {', '.join(empty)}")
    return runs


def load_ensemble(
    args: argparse.Namespace, devices: list[torch.device], cache_settings: dict | None = None
) -> Ensemble:
    """Every run of --outputs that can be loaded and fits the cache, if any; the others are named."""
    precision = args.precision or ("fp16" if devices[0].type == "cuda" else "no")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}[precision]

    @functools.cache
    def load(folder: Path) -> Member | None:
        try:
            run = common.load_run(folder)
            settings = common.volume_settings(run.cfg)
            difference = common.describe_difference(cache_settings or settings, settings)
            if difference:
                raise ValueError(f"{folder}: the cache does not fit: {difference}")
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            log(f"left out: {error}")
            return None
        if not (folder / "metrics.json").is_file():
            log(f"{folder.name}: not finished; its best epoch so far ({run.meta.get('epoch')}) is used")
        return Member(run, dtype)

    members = [load(folder.resolve()) for folder in find_runs(args.outputs)]
    members = [member for member in members if member and member.run.cfg.ensemble_weight > 0]
    if not members:
        raise ValueError(f"--outputs {args.outputs}: none of its runs can be used; see the lines above")
    members.sort(key=lambda member: (-member.run.cfg.ensemble_weight, member.name))
    by_name = {member.name: member for member in members}
    for member in members:
        member.locator = find_locator(member.run, load)
        if member.locator:
            by_name[member.locator.name] = member.locator
    models = list(by_name.values())
    assign_devices(models, devices)
    settings = list(dict.fromkeys(model.run.cfg.volume for model in models))
    prior = np.mean([member.run.meta["prior"] for member in members], axis=0)
    threads = ThreadPoolExecutor(len(devices))
    return Ensemble(members, models, settings, prior, devices, threads)


def find_locator(run: Run, load: Callable[[Path], Member | None]) -> Member | None:
    """The locator that a classifier was trained with (the checkpoint holds its folder's name): beside the
    run's folder, else where its config says."""
    name = run.meta["locator"]
    for parent in (run.folder.parent, Path(run.cfg.proposals).parent) if name else ():
        if (parent / name).is_dir() and (locator := load((parent / name).resolve())):
            return locator
    if name:
        log(f"{run.folder.name}: decoys instead of proposals, as its locator {name} is missing")
    return None


def assign_devices(models: list[Member], devices: list[torch.device]) -> None:
    """Move the models to the devices in turn, each classifier beside its locator."""
    places = {}
    for model in models:
        name = (model.locator or model).name
        model.device = places.setdefault(name, devices[len(places) % len(devices)])
        model.run.model.to(model.device)


# --- one series ---------------------------------------------------------------------------------------------


def predict_series(
    ensemble: Ensemble, uid: str, scan: Scan, plan: Plan, late_at: float = math.inf
) -> tuple[np.ndarray, dict[str, Output]]:
    """probs (14,) and every model's output by name. Once the clock shows late_at no further member starts.

    Raises FloatingPointError where no member gives finite logits.
    """
    members = ensemble.members[: plan.num_members]
    outputs: dict[str, Output] = {}

    def run_device(device: torch.device) -> None:
        for member in members:
            if member.device == device and (not outputs or time.monotonic() < late_at):
                run_member(member, uid, scan, plan.is_mirrored, outputs)

    list(ensemble.threads.map(run_device, ensemble.devices))
    logits, weights = [], []
    for member in members:
        if member.name in outputs and np.isfinite(outputs[member.name].logits).all():
            logits.append(outputs[member.name].logits)
            weights.append(member.run.cfg.ensemble_weight)
        elif member.name in outputs:
            log(f"{uid}: left out {member.name}: NaN or infinite; try --precision no", everywhere=True)
    if not logits:
        raise FloatingPointError("no member gave finite logits")
    return average_members(logits, weights), outputs


def run_member(member: Member, uid: str, scan: Scan, is_mirrored: bool, outputs: dict[str, Output]) -> Output:
    """A member's output, its locator's first. It joins outputs, where a locator that votes and proposes is
    found again instead of running twice."""
    if member.name in outputs:
        return outputs[member.name]
    cfg = member.run.cfg
    volume, proposals = scan.volumes[cfg.volume], None
    if member.locator:
        locator_cfg = member.locator.run.cfg
        locator_volume = scan.volumes[locator_cfg.volume]
        maps = run_member(member.locator, uid, scan, is_mirrored, outputs).maps
        peaks = common.propose(maps, locator_volume.spacing_mm, locator_cfg)
        proposals_mm = to_lps(peaks[:, :3], locator_volume.affine)
        proposals = to_voxel(proposals_mm, volume.affine)
    image = volume.voxels
    if cfg.num_crops:
        decoys = np.array(member.run.meta["decoys"]).reshape(-1, 3)
        crops = common.deployed_crops(image, volume.spacing_mm, uid, decoys, proposals, cfg)
        image = np.concatenate([image, crops])
    outputs[member.name] = predict_views(member, image, is_mirrored)
    return outputs[member.name]


@torch.inference_mode()
def predict_views(member: Member, image: np.ndarray, is_mirrored: bool) -> Output:
    """Logits (1 or 2 views, 14) of an image (C, H, W) uint8 and of its mirror image, whose labels are swapped
    back; and the first view's maps (13, Z, h, w) as probabilities."""
    images = torch.from_numpy(np.ascontiguousarray(image))[None].to(member.device).float() / 255
    if is_mirrored:
        images = torch.cat([images, common.mirror(images)])
    if member.run.cfg.channels_last:
        images = images.to(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, member.dtype, enabled=member.dtype is not None):
        logits, maps = member.run.model(images)
    logits = logits.float().cpu().numpy()
    logits[1:] = logits[1:, SWAP]
    if maps is not None:
        maps = torch.sigmoid(maps[0].float()).cpu().numpy()
    return Output(logits, maps)


def average_members(logits: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """(14,) probs: the mean of each member's views (1 or 2, 14), then the weighted mean of the members."""
    probs = [sigmoid(views).mean(axis=0) for views in logits]
    return np.average(probs, axis=0, weights=weights)


# --- the deadline -------------------------------------------------------------------------------------------


class Plan(typing.NamedTuple):
    """How much of the ensemble a series gets."""

    is_mirrored: bool
    num_members: int  # the first ones; 0: the prior

    @property
    def num_views(self) -> int:
        return self.num_members * (1 + self.is_mirrored)


@dataclass
class Deadline:
    """Plans each series so that the last is answered within `seconds` of the start. Knows no clock.

    A series costs what the models take, in proportion to their views, and what was measured beside them, such
    as waiting for files. Nothing is cut in the first twentieth of the time, as the first few series tell
    little of the others. The slowest series' time stays in reserve, and a fiftieth of all for the table.
    """

    seconds: float
    full: Plan
    last_s: float  # when the latest series was answered; at first when the first one begins
    num_series: int = 0
    num_views: int = 0
    forward_s: float = 0.0  # sums over the series so far
    beside_s: float = 0.0
    slowest_s: float = 0.0

    def observe(self, elapsed_s: float, forward_s: float, plan: Plan) -> None:
        """A series was answered elapsed_s after the start."""
        wall_s, self.last_s = elapsed_s - self.last_s, elapsed_s
        self.num_series += 1
        self.num_views += plan.num_views
        self.forward_s += forward_s
        self.beside_s += wall_s - forward_s
        self.slowest_s = max(self.slowest_s, wall_s)

    def next_plan(self, elapsed_s: float, num_left: int) -> Plan:
        """The fullest plan that all remaining series can have."""
        left_s = 0.98 * self.seconds - elapsed_s - self.slowest_s
        if left_s <= 0:
            return Plan(False, 0)
        if self.num_series == 0 or elapsed_s < self.seconds / 20:
            return self.full
        views_s = left_s / num_left - self.beside_s / self.num_series  # for a series' views
        num_views = views_s * self.num_views / self.forward_s
        plans = [self.full, *(Plan(False, num) for num in range(self.full.num_members, 0, -1))]
        return next((plan for plan in plans if plan.num_views <= num_views), plans[-1])


def begin_deadline(ensemble: Ensemble, args: argparse.Namespace) -> Deadline:
    """The deadline of a process whose first series begins now; without --budget-hours it cuts nothing."""
    full = Plan(args.tta, len(ensemble.members))
    return Deadline(3600 * args.budget_hours, full, time.monotonic() - args.started)


def choose_plan(deadline: Deadline, num_left: int, args: argparse.Namespace) -> Plan:
    """The deadline's next plan; each kind of plan is announced once."""
    plan = deadline.next_plan(time.monotonic() - args.started, num_left)
    if plan != deadline.full:
        view = "with" if plan.is_mirrored else "without"
        log_once(f"deadline: {plan.num_members} of {deadline.full.num_members} members {view} mirrored view")
    return plan


# --- all series ---------------------------------------------------------------------------------------------


@dataclass
class Answer:
    uid: str
    probs: np.ndarray  # (14,)
    reason: str = ""  # why it is the prior
    findings: list[dict] = field(default_factory=list)  # with --explain


def answer_all(
    ensemble: Ensemble, source: Source, uids: list[str], args: argparse.Namespace, save: Callable
) -> list[Answer]:
    """An answer for each of uids, saved as soon as it is known."""
    deadline, answers, left = begin_deadline(ensemble, args), [], set(uids)
    scans = read_scans(source, uids, ensemble.settings, args)
    bar = common.progress(len(uids), "series", show=args.is_main)
    with bar, contextlib.closing(scans):
        for item in scans:
            plan = choose_plan(deadline, len(left), args)
            if plan.num_members == 0:
                break
            if item is None:
                continue
            answers.append(answer_series(ensemble, item, plan, deadline, args))
            save(answers[-1])
            left.remove(answers[-1].uid)
            bar.update()
    if left:
        log(f"the time is over: {len(left)} series get the prior", everywhere=True)
    return answers + [Answer(uid, ensemble.prior, "no time left") for uid in sorted(left)]


def answer_series(
    ensemble: Ensemble, item: tuple, plan: Plan, deadline: Deadline, args: argparse.Namespace
) -> Answer:
    """The answer to an item of read_scans. Raises OSError only if the GPU has failed for good."""
    uid, scan, reason = item
    if scan is None:
        return answer_prior(ensemble, uid, reason)
    for doubt in next(iter(scan.volumes.values())).doubts:
        log(f"{uid}: doubtful, but used: {doubt}", everywhere=True)
    started = time.monotonic()
    try:
        probs, outputs = predict_series(ensemble, uid, scan, plan, args.late_at)
    except Exception as error:  # out of memory, logits that are not finite: this row alone
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if "CUDA error" in text and "out of memory" not in text:  # every later call would fail as well
            raise OSError(f"{uid}: {text}; run again (with --out it goes on where it stopped)") from error
        return answer_prior(ensemble, uid, text)
    now = time.monotonic()
    deadline.observe(now - args.started, now - started, plan)
    answer = Answer(uid, probs)
    if args.explain and probs[AP] >= args.explain_from:
        explain_series(answer, ensemble, scan, outputs, args.explain)
    return answer


def answer_prior(ensemble: Ensemble, uid: str, reason: str) -> Answer:
    log(f"{uid}: answered by the prior: {reason}", everywhere=True)
    return Answer(uid, ensemble.prior, reason)


# --- finished rows of a run that was stopped ----------------------------------------------------------------


def partial_path(out: Path, rank: int) -> Path:
    """Where a process gathers its finished rows."""
    return out.with_name(f"{out.name}.partial{rank or ''}.csv")


def describe_run(ensemble: Ensemble, args: argparse.Namespace, num_processes: int) -> str:
    """What rows depend on, as a comment line: rows of another run are not mixed with this one's."""
    facts = [str(args.src.resolve()), args.tta, args.precision, num_processes]
    for model in ensemble.models:
        facts += [model.name, (model.run.folder / CHECKPOINT).stat().st_mtime_ns]
    return f"# {facts}\n"


@contextlib.contextmanager
def name_errors(place: Path | str) -> Iterator[None]:
    """An OSError says where it happened, as that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


def open_partial(path: Path, identity: str) -> tuple[dict[str, Answer], Callable[[Answer], None]]:
    """Answers that a stopped run left, and a function that adds one and syncs, so that a kill costs only the
    series at work. The prior is not saved, so that a second start tries those series again.

    Raises ValueError if they were made by other members or settings.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # a kill tears the last one
    if lines and lines[0] != identity:
        raise ValueError(
            f"{path}: from other members or settings; run with those, or delete it to start anew"
        )
    lines = lines or [identity, ",".join([UID, *LABELS]) + "\n"]
    common.write_atomic(path, "".join(lines).encode())
    file = open(path, "a")  # noqa: SIM115  open until the process ends

    def save(answer: Answer) -> None:
        if answer.reason:
            return
        with name_errors(path):
            file.write(",".join([answer.uid, *map(str, answer.probs.tolist())]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    rows = [line.strip().split(",") for line in lines[2:]]
    return {uid: Answer(uid, np.array(probs, dtype=float)) for uid, *probs in rows}, save


# --- explanations -------------------------------------------------------------------------------------------


def explain_series(answer: Answer, ensemble: Ensemble, scan: Scan, outputs: dict, folder: Path) -> None:
    """Find places in the mean of the locators' maps, draw <uid>.png, say the answer in words."""
    groups = {}  # maps of locators that see the same volume at the same stride
    for model in ensemble.models:
        cfg = model.run.cfg
        maps = outputs[model.name].maps if model.name in outputs else None
        if maps is not None:
            _, group = groups.setdefault((cfg.volume, cfg.locator_stride), (cfg, []))
            group.append(maps)
    if not groups:
        log_once("--explain: no locator among the members that ran, so no picture and no findings")
        return
    cfg, group = next(iter(groups.values()))
    volume, maps = scan.volumes[cfg.volume], np.mean(group, axis=0)
    for peak in common.propose(maps, volume.spacing_mm, cfg):
        score, label = float(peak[3]), int(peak[4])
        finding = {UID: answer.uid, "artery": LABELS[label], "score": round(score, 4)}
        answer.findings.append(finding | describe_place(peak[:3], volume, scan.frames))
    size = volume.voxels.shape[:0:-1]  # cv2 wants (W, H)
    heat = np.stack([cv2.resize(slab, size) for slab in maps.sum(0)])
    picture = draw_findings(volume, heat, answer)
    common.write_atomic(folder / f"{safe_uid(answer.uid)}.png", picture)
    log(describe_answer(answer, ensemble.members), everywhere=True)


def describe_place(voxel: np.ndarray, volume: Volume, frames: list[Frame]) -> dict:
    """A place (z, y, x) of the volume in LPS mm and, where frames are known, in the nearest DICOM image:
    column and row count pixel centres from 0, as in train_localizers.csv."""
    point_mm = to_lps(voxel, volume.affine)[0]
    place = {"voxel": np.round(voxel, 1).tolist(), "lps_mm": point_mm.round(2).tolist()}
    if not frames:
        return place

    def distance_mm(frame: Frame) -> float:
        normal = np.cross(frame.row_dir, frame.col_dir)
        return abs(normal @ (point_mm - frame.position))

    frame = min(frames, key=distance_mm)
    offset_mm = point_mm - frame.position
    row_mm, col_mm = frame.spacing_mm
    place |= {"SOPInstanceUID": frame.sop_uid, "frame": frame.index}
    place["distance_mm"] = round(float(distance_mm(frame)), 2)  # from the image's plane
    place["column"] = round(float(offset_mm @ frame.row_dir) / col_mm, 2)
    place["row"] = round(float(offset_mm @ frame.col_dir) / row_mm, 2)
    return place


def describe_answer(answer: Answer, members: list[Member]) -> str:
    """The answer to a series for people: presence, which operating points it passes, arteries, places."""
    present = answer.probs[AP]
    lines = [f"{answer.uid}: {LABELS[AP]} {present:.2f}"]
    for points in zip(*(member.run.meta.get("operating_points", []) for member in members)):  # noqa: B905
        mean = {name: np.mean([point[name] for point in points]) for name in points[0]}
        side = "above" if present >= mean["threshold"] else "below"
        text = (
            "{threshold:.2f}, the threshold of specificity {specificity:.2f}, sensitivity {sensitivity:.2f}"
        )
        lines.append(f"  {side} {text.format(**mean)}")
    for k in np.argsort(-answer.probs[:AP])[:3]:
        lines.append(f"  {LABELS[k]} {answer.probs[k]:.2f}")
    for row in answer.findings:
        text = "  place {score:.2f}: {artery}, LPS {lps_mm} mm"
        if "row" in row:
            text += ", image {SOPInstanceUID}, frame {frame}, column {column:.0f}, row {row:.0f}"
        lines.append(text.format(**row))
    return "\n".join(lines)


def draw_findings(volume: Volume, heat: np.ndarray, answer: Answer) -> bytes:
    """A PNG with a row per finding: its slab plain, and under the heat with a cross at the finding. The heat
    (Z, H, W) is absolute: at 0.02 nothing glows."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    window = PowerNorm(0.6, 0, 255)  # lifts the lower half, where CT has its contrast-filled arteries
    num = len(answer.findings)
    figure = Figure(figsize=(9, 1 + 4 * num), layout="constrained")
    panels = figure.subplots(num, 2, squeeze=False)
    for (plain, overlay), finding in zip(panels, answer.findings, strict=True):
        z, y, x = finding["voxel"]
        slab = round(z)
        for axes in (plain, overlay):
            axes.imshow(volume.voxels[slab], cmap="gray", norm=window)
            axes.set_title("R", loc="left")  # of the patient
            axes.set_title("L", loc="right")
            axes.set_axis_off()
        alpha = np.clip(heat[slab], 0, 0.6)
        image = overlay.imshow(heat[slab], cmap="inferno", vmin=0, vmax=1, alpha=alpha)
        overlay.plot(x, y, "+", color="cyan", markersize=14)
        overlay.set_title("{artery} {score:.2f}".format(**finding), fontsize=8)
        left, bottom = 0.05 * heat.shape[2], 0.95 * heat.shape[1]
        plain.plot([left, left + 20 / volume.spacing_mm[2]], [bottom, bottom], color="white")
        plain.text(left, bottom, "20 mm", color="white", va="bottom")
        plain.set_title(f"slab {slab} (0 to {len(heat) - 1})", fontsize=8)
    figure.colorbar(image, ax=panels, shrink=0.5, label="probability of an aneurysm at this place")
    figure.suptitle(f"{answer.uid}\n{LABELS[AP]} {answer.probs[AP]:.3f}. Not for diagnosis.")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return png.getvalue()


def write_findings(answers: list[Answer], source: Source, folder: Path) -> None:
    findings = [row for answer in answers for row in answer.findings]
    common.write_atomic(folder / "findings.json", json.dumps(findings, indent=1).encode())
    num_pictures = sum(bool(answer.findings) for answer in answers)
    log(f"{folder}: {num_pictures} pictures, and findings.json with {len(findings)} places")
    if num_pictures < len(answers):
        log(f"no picture of unreadable series, nor of those below {SUSPICIOUS}: --series-list names others")
    if source.is_cache:
        log("a cache has no image, column and row of them; --src DICOM_FILES has")


# --- score --------------------------------------------------------------------------------------------------


def describe_score(
    answers: list[Answer], labels: pd.DataFrame, members: list[Member], index: pd.DataFrame
) -> str:
    """The score for people; patients come from a cache's index.csv. Warns of series that may have trained a
    member."""
    probs = {safe_uid(answer.uid): answer.probs for answer in answers}
    table = labels[labels[UID].isin(probs)].assign(plane="", Modality="")
    if table.empty:
        raise ValueError(f"--labels: none of the {len(answers)} predicted series is among them")
    patients = table[UID].map(index["patient"]).astype(object)
    table["patient"] = patients.where(patients.notna() & (patients != ""), table[UID])
    result = common.score(table, np.stack([probs[uid] for uid in table[UID]]))
    lines = [
        pd.DataFrame.from_dict(result["per_label"], "index").to_string(float_format="%.3f"),
        "wAUC {wauc:.4f} (95 % interval {low:.4f} to {high:.4f}, {draws_used} draws), ".format(**result)
        + "{num_series} series of {num_patients} patients".format(**result),
    ]
    held_out = set.intersection(*(set(member.run.meta["val_uids"]) for member in members))
    num_trained = len(set(table[UID]) - held_out)
    if num_trained:
        lines.append(
            f"{num_trained} of {len(table)} scored series were not held out by all members: the score is too "
            f"high, unless these are new patients"
        )
    return "\n".join(lines)


# --- Kaggle's server ----------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
    """Load the members, then answer the gateway: the hidden one, or outside of a submission the local one."""
    try:
        from kaggle_evaluation.rsna_inference_server import RSNAInferenceServer
    except ImportError as error:
        raise ValueError(
            f"--serve: {error}; it lies in the challenge's data: add that to PYTHONPATH"
        ) from None
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    ensemble, answers = load_ensemble(args, devices), []
    with common.progress(args.num_series, "series") as bar:
        server = RSNAInferenceServer(make_predict(ensemble, args, answers, bar))
        if os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
            server.serve()
        else:
            server.run_local_gateway()
    return summarise(answers, args)


def make_predict(
    ensemble: Ensemble, args: argparse.Namespace, answers: list[Answer], bar: tqdm
) -> Callable[[str], pd.DataFrame]:
    """The function that the gateway calls, once per series; its answers join `answers`."""
    deadline = begin_deadline(ensemble, args)

    def predict(series_path: str) -> pd.DataFrame:
        """One row of 14 probabilities; the prior if anything goes wrong: an exception would end the run."""
        uid = Path(str(series_path)).name
        item = (uid, None, "no time left")
        try:
            plan = choose_plan(deadline, max(1, args.num_series - len(answers)), args)
            if plan.num_members:
                source = Source(False, {safe_uid(uid): Path(series_path)}, {})
                scans = read_scans(source, [uid], ensemble.settings, args)
                item = next(filter(None, scans))
            answers.append(answer_series(ensemble, item, plan, deadline, args))
        except Exception as error:
            answers.append(answer_prior(ensemble, uid, f"{type(error).__name__}: {error}"))
        bar.update()
        shutil.rmtree(SHARED, ignore_errors=True)  # what stays in it fills the disk
        with contextlib.suppress(OSError):
            SHARED.mkdir(parents=True, exist_ok=True)
        return pd.DataFrame([answers[-1].probs.tolist()], columns=list(LABELS))

    return predict


# --- the command --------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    readers = max(1, common.usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--src", type=Path, help="cache or tree of DICOM files (default: cache)")
    add("--outputs", default="outputs", help="runs of train.py (default: outputs)")
    add("--out", type=Path, help="write the CSV here instead of to stdout; can be resumed")
    add("--series-list", type=Path, help="only these: a UID per line, or a CSV with UIDs")
    add("--limit", type=int, default=10**9, help="only the first N series")
    add("--tta", action="store_true", help="average with the mirrored view")
    add("--precision", choices=("fp16", "bf16", "no"), help="default: fp16 on a GPU, else no (float32)")
    add("--workers", type=int, default=readers, help="processes that read DICOM (default: %(default)s)")
    add("--series-timeout", type=float, default=300, help="seconds to read one (default: 300)")
    add("--memory-gb", type=float, default=4, help="to read one (default: 4)")
    add("--budget-hours", type=float, default=math.inf, help="answer the last series within this time")
    add("--labels", type=Path, help="print the score against these labels to stderr")
    add("--explain", type=Path, help="pictures and findings.json")
    add("--serve", action="store_true", help="answer the challenge's gateway; --src is not used")
    add("--num-series", type=int, default=2500, help="with --serve: how many (default: 2500)")
    args = parser.parse_args(arguments)
    if min(args.limit, args.workers, args.series_timeout, args.memory_gb, args.budget_hours) <= 0:
        parser.error(
            "--limit, --workers, --series-timeout, --memory-gb, --budget-hours: expected more than 0"
        )
    args.started = time.monotonic()
    args.explain_from = 0.0 if args.series_list else SUSPICIOUS
    args.late_at = args.started + 0.99 * 3600 * args.budget_hours
    return args


def predict_table(args: argparse.Namespace, stdout: typing.TextIO) -> int:
    """Everything from --src to the table and the exit code; several processes share the series."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    args.is_main = state.is_main_process
    if args.src is None:
        args.src = Path("cache")
        log("no --src: predicting the training cache `cache`; for other scans add --src TEST_DICOMS")
    source = find_source(args.src)
    labels = common.read_label_table(args.labels) if args.labels else None
    uids = choose_series(source, args.series_list)[: args.limit]
    ensemble = load_ensemble(args, [state.device], source.settings)
    log(f"{len(uids)} series, {len(ensemble.members)} members, {state.num_processes} processes")
    done, save = {}, lambda answer: None
    if args.out:
        identity = describe_run(ensemble, args, state.num_processes)
        done, save = open_partial(partial_path(args.out, state.process_index), identity)
    if args.explain:  # what is to be explained is answered again, as findings are not saved
        args.explain.mkdir(parents=True, exist_ok=True)
        args.explain_from = 0.0 if len(uids) == 1 else args.explain_from
        done = {uid: answer for uid, answer in done.items() if answer.probs[AP] < args.explain_from}
    share = uids[state.process_index :: state.num_processes]
    answers = [done[uid] for uid in share if uid in done]
    if answers:
        log(f"{len(answers)} series were answered before", everywhere=True)
    answers += answer_all(ensemble, source, [uid for uid in share if uid not in done], args, save)
    by_uid = {answer.uid: answer for answer in gather_object(answers)}
    if not state.is_main_process:
        return 0
    answers = [by_uid[uid] for uid in uids]
    write_table(answers, args.out, stdout)
    for rank in range(state.num_processes) if args.out else ():
        partial_path(args.out, rank).unlink()
    if args.explain:
        write_findings(answers, source, args.explain)
    if labels is not None:
        log(describe_score(answers, labels, ensemble.members, read_index(args.src)))
    return summarise(answers, args)


def write_table(answers: list[Answer], out: Path | None, stdout: typing.TextIO) -> None:
    table = pd.DataFrame({answer.uid: answer.probs for answer in answers}, index=LABELS).T
    text = table.to_csv(index_label=UID, float_format="%.8g")
    if out:
        common.write_atomic(out, text.encode())
        return
    try:
        with name_errors("stdout"):
            stdout.write(text)
            stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # Python flushes once more at its end
        raise


def summarise(answers: list[Answer], args: argparse.Namespace) -> int:
    """The closing line, and the exit code."""
    num_prior = sum(bool(answer.reason) for answer in answers)
    seconds = time.monotonic() - args.started
    log(f"{len(answers)} rows, {num_prior} of them the prior; {seconds:.1f} s")
    return 3 if num_prior else 0


def interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        stdout = common.reserve_stdout()
        return serve(args) if args.serve else predict_table(args, stdout)
    except KeyboardInterrupt as stop:
        log(f"stopped by {signal.Signals(stop.args[0]).name}")
        return 128 + stop.args[0]
    except (ValueError, OSError) as error:
        log(str(error), everywhere=True)
        return 1


if __name__ == "__main__":
    common.exit_rank(main())
