"""Predict 14 probabilities for every series: the mean of all folds and seeds, from a cache or from DICOM.

in   --src DIR       a cache of preprocess.py, or any tree of DICOM files (found out by looking)
     --outputs GLOB  run folders of train.py; each member is rebuilt from its own checkpoint
out  stdout          CSV: SeriesInstanceUID and the 14 labels, a row per series; messages go to stderr
     --out FILE      the same into FILE at once; FILE.partial keeps what is done, running again goes on there
     --explain DIR   a picture per suspicious series, and hottest.csv with the place where each is hottest
run  python infer.py > submission.csv
     python infer.py --src dicoms/series --out submission.csv --tta --budget-hours 11.5
     python infer.py --oof > oof.csv             by members that never saw the patient, with their score
     accelerate launch infer.py --out submission.csv                    several processes share the series
     python infer.py --serve --outputs "/kaggle/input/*/outputs/*_seed*_fold*"    answers Kaggle's gateway

A series that is unreadable, or slower than --series-timeout, gets the prior: how often each label was
positive in training. With --budget-hours the mirrored view goes first, then members from the end of the list
(locators stand first, then the heaviest), at last the remaining series get the prior; each decision is said.
exit 0 all well, 3 some rows are the prior (each with its reason), 1 nothing could be done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import importlib.util
import io
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import common
from common import AP, LABELS, SWAP, UID, Config, Run, Volume, safe_uid, volume_settings

SHARED = Path(os.environ.get("KAGGLE_SHARED", "/kaggle/shared"))  # emptied after each call of --serve
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}  # of autocast
REACH_MM = 10.0  # a heat map hits where its hottest place lies this near to an annotated point
NUM_PANELS = 6  # slabs in a picture, at most


def say(text: str, everywhere: bool = False) -> None:
    """A line for people from the main process (everywhere: from any), without breaking the progress bar."""
    if everywhere or int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"infer.py: {text}", file=sys.stderr)


# --- the series ---------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Each series' cached volume, or its DICOM files (a list or a folder); failed: why there is none."""

    is_cache: bool
    series: dict[str, Path | list[Path]]
    failed: dict[str, str]


def find_source(src: Path) -> Source:
    """Look at src and list its series. Raises ValueError where there is none."""
    if not src.is_dir():
        raise ValueError(f"--src {src}: no such folder; expected a cache or a tree of DICOM files")
    cached = {path.stem: path for path in sorted(src.glob("*.safetensors"))}
    if not cached and not (src / "index.csv").is_file():
        series, strays = common.find_series(src)
        for uid, files in list(series.items()):  # vessel masks lie in folders of the same names
            series[uid] = [path for path in files if "segmentations" not in path.relative_to(src).parts]
        series = {uid: files for uid, files in series.items() if files}
        parents = {files[0].parent.parent for files in series.values() if files[0].parent != src}
        siblings = [path for parent in parents for path in parent.iterdir()]
        empty = {path.name for path in siblings if path.is_dir() and not any(path.iterdir())}
        failed = {name: "an empty folder" for name in empty if "." in name and safe_uid(name) == name}
        if not series:
            found = f"{len(strays)} files that are no DICOM images" if strays else "no files"
            raise ValueError(f"{src}: {found}; expected DICOM files at any depth, or a cache")
        strays = [stray for stray in strays if stray[0].suffix != ".csv"]  # tables of labels and points
        if strays:
            (path, reason), more = strays[0], f", and {len(strays) - 1} more files" if strays[1:] else ""
            say(f"{path} belongs to no series ({reason}){more}")
        return Source(False, series, failed)
    failed = {}
    if (src / "index.csv").is_file():
        index = pd.read_csv(src / "index.csv", dtype=str, keep_default_na=False)
        for uid, status, reason in index[[UID, "status", "reason"]].itertuples(index=False):
            if status == "ok" and uid not in cached:
                failed[uid] = f"{src / 'index.csv'} has it, but its volume is gone; preprocess again"
            elif status != "ok":
                failed[uid] = f"failed in preprocessing: {reason}"
    if not cached and not failed:
        raise ValueError(f"{src}: an empty cache; run preprocess.py --dst {src} first")
    return Source(True, cached, failed)


def choose_series(source: Source, path: Path | None) -> list[str]:
    """UIDs of the rows: as listed in path (text, or a CSV such as a sample submission), else all, sorted."""
    if path is None:
        return sorted({*source.series, *source.failed})
    lines = path.read_text().split("\n")
    if UID in lines[0]:
        uids = pd.read_csv(path, dtype=str)[UID].tolist()
    else:
        uids = [line.strip() for line in lines if line.strip()]
    if not uids:
        raise ValueError(f"{path}: lists no series; expected a UID per line, or a CSV with a column {UID}")
    unique = list(dict.fromkeys(uids))
    if len(unique) < len(uids):
        say(f"{path}: {len(uids) - len(unique)} repeated series; each gets one row")
    return unique


def read_dicom(item: tuple, configs: list[Config]) -> tuple[list[Volume], float, float]:
    """A volume per config from files read and decoded once; seconds for the headers and for the volumes."""
    started = time.perf_counter()
    uid, files = item
    series = common.read_series(files, uid)
    read = time.perf_counter()
    if len(configs) > 1:
        series.forget = lambda *_: None  # decoded slices stay for the next volume
    volumes = [common.make_volume(series, cfg) for cfg in configs]
    return volumes, read - started, time.perf_counter() - read


def read_cached(path: Path, settings: dict) -> tuple[list[Volume], float, float]:
    """The cached volume, without its annotated points. Raises ValueError if its settings are others."""
    started = time.perf_counter()
    tensors, meta = common.load_volume(path, ["volume"])
    if json.loads(meta["settings"]) != settings:
        raise ValueError(f"{path}: made with other settings than the rest of the cache; preprocess again")
    volume = Volume(tensors["volume"], np.array(json.loads(meta["affine"])), [])
    return [volume], time.perf_counter() - started, 0.0


def read_all(source: Source, uids: list[str], configs: list[Config], args: argparse.Namespace) -> Iterator:
    """(uid, (volumes, seconds, seconds) or None, None or why not), in any order; each fails alone."""
    if source.is_cache:
        settings = volume_settings(configs[0])
        for uid in uids:
            try:
                yield uid, read_cached(source.series[safe_uid(uid)], settings), None
            except Exception as error:  # whatever a damaged file raises: its row says it
                yield uid, None, f"{type(error).__name__}: {error}"
        return
    work = common.run_isolated(
        functools.partial(read_dicom, configs=configs),
        [(uid, source.series[safe_uid(uid)]) for uid in uids],
        workers=max(1, min(args.workers, len(uids))),
        timeout_s=args.series_timeout,
        memory_gb=args.memory_gb,
    )
    with contextlib.closing(work):
        for (uid, _), result, reason in work:
            yield uid, result, reason


def read_ahead(items: Iterator, depth: int) -> queue.Queue:
    """A queue that a thread fills, up to depth items ahead; what goes wrong is put there too."""
    ready: queue.Queue = queue.Queue(maxsize=depth)

    def fetch() -> None:
        try:
            for item in items:
                ready.put(item)
        except Exception as error:  # raised again where the queue is read
            ready.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    return ready


# --- the ensemble -------------------------------------------------------------------------------------------


@dataclass
class Member:
    run: Run
    held_out: frozenset[str]  # series whose patients it never saw
    locator: Member | None = None  # whose highest peaks its crops show; None: decoys
    volume: int = 0  # which of Ensemble.configs its volume is made with

    @property
    def name(self) -> str:
        return str(self.run.folder)


@dataclass
class Ensemble:
    members: list[Member]  # most useful first: a deadline cuts from the end
    configs: list[Config]  # one per distinct volume
    prior: np.ndarray  # (14,) mean prevalence of the labels in the members' training folds
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: float32
    mean: str  # probs | logits

    def voters(self, uid: str, oof: bool) -> list[Member]:
        return [m for m in self.members if uid in m.held_out] if oof else self.members


def load_ensemble(args: argparse.Namespace, device: torch.device, cached: dict | None) -> Ensemble:
    """Every run that --outputs matches and the cache, if any, fits; the others are named and left out."""
    loaded: dict[Path, Member | None] = {}

    def load(folder: Path) -> Member | None:
        if folder.resolve() not in loaded:
            loaded[folder.resolve()] = None
            try:
                run = common.load_run(folder, device)
                own = volume_settings(run.cfg)
                if cached not in (None, own):
                    changed = [key for key in own if own[key] != cached.get(key)]
                    differ = [f"{key} {own[key]} (cache: {cached.get(key)})" for key in changed]
                    raise ValueError(f"{folder}: needs other volumes: {', '.join(differ)}")
                run.model = torch.compile(run.model) if args.compile else run.model
                if (folder / "last").is_dir() and not (folder / "metrics.json").exists():
                    say(f"{folder}: still training; its best epoch so far is used ({run.meta.get('epoch')})")
                loaded[folder.resolve()] = Member(run, frozenset(run.meta["val_uids"]))
            except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
                say(f"left out: {error}")
        return loaded[folder.resolve()]

    folders = [path for path in map(Path, sorted(glob.glob(args.outputs, recursive=True))) if path.is_dir()]
    members = [member for member in map(load, folders) if member and member.run.cfg.ensemble_weight > 0]
    if not members:
        raise ValueError(
            f"--outputs {args.outputs}: none of {len(folders)} folders is a usable run of train.py; "
            "expected <model>_seed<S>_fold<F>/best_ema.safetensors"
        )
    for member in members:
        if member.run.cfg.task == "classify" and member.run.cfg.proposals:
            member.locator = find_locator(member, load, args.oof)
    without = [m for m in members if not m.locator and m.run.cfg.task == "classify" and m.run.cfg.proposals]
    blind = [member.name for member in without if member.run.cfg.has_scores]
    if blind:
        say(f"left out: {', '.join(blind)}: their fold's locator, whose scores they take, is missing")
        members = [member for member in members if member.name not in blind]
    if decoyed := [member.name for member in without if member.name not in blind]:
        say(f"decoys instead of proposals, as their fold's locator is missing: {', '.join(decoyed)}")
    if not members:
        raise ValueError(f"--outputs {args.outputs}: no member is left; put their locators beside them")
    members.sort(key=lambda m: (m.run.cfg.task != "locate", -m.run.cfg.ensemble_weight, m.name))
    distinct: dict[str, Config] = {}
    for member in filter(None, [*members, *(m.locator for m in members)]):
        key = json.dumps(volume_settings(member.run.cfg))
        distinct.setdefault(key, member.run.cfg)
        member.volume = list(distinct).index(key)
    prior = np.mean([member.run.meta["prior"] for member in members], axis=0)
    return Ensemble(members, list(distinct.values()), prior, device, PRECISIONS[args.precision], args.mean)


def find_locator(member: Member, load: Callable[[Path], Member | None], oof: bool) -> Member | None:
    """The locator that the classifier was trained with (the checkpoint holds its folder's name): beside the
    run's folder, else where its config says. None where it is missing, or does not fit."""
    cfg, name = member.run.cfg, member.run.meta.get("locator", "")
    for folder in (member.run.folder.parent / name, *map(Path, sorted(glob.glob(cfg.proposals)))):
        found = load(folder) if folder.name == name and folder.is_dir() else None
        if found and found.run.cfg.task == "locate" and found.run.cfg.fold == cfg.fold:
            fits = volume_settings(found.run.cfg) == volume_settings(cfg)
            return found if fits and (not oof or member.held_out <= found.held_out) else None
    return None


def make_image(member: Member, uid: str, volume: Volume, maps: np.ndarray | None) -> np.ndarray:
    """(C, H, W) uint8: the slabs, then a classifier's crops, made as training's validation makes them; maps
    (13, Z, h, w) are its locator's, as probabilities."""
    cfg, spacing_mm, proposals = member.run.cfg, np.array(volume.spacing_mm), None
    if cfg.task == "locate" or not cfg.max_localizer_crops:
        return volume.voxels
    if maps is not None:
        proposals = common.propose(maps, spacing_mm, member.locator.run.cfg)[:, :3]
    decoys = np.array(member.run.meta["decoys"]).reshape(-1, 3)
    crops = common.deployed_crops(volume.voxels, spacing_mm, uid, decoys, proposals, cfg)
    return np.concatenate([volume.voxels, crops])


@torch.inference_mode()
def look(
    ensemble: Ensemble, member: Member, image: np.ndarray, tta: bool, scores: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (1 or 2 views, 14) of an image (C, H, W) uint8; of a locator also the first view's heat maps
    (13, Z, h, w) as probabilities, else none (0,). scores (14,) are the logits of the member's locator."""
    images = torch.from_numpy(image)[None].to(ensemble.device).float() / 255
    if tta:
        images = torch.cat([images, common.mirror(images)])
    if member.run.cfg.channels_last:
        images = images.to(memory_format=torch.channels_last)
    inputs = [images]
    if member.run.cfg.has_scores:
        views = np.stack([scores, scores[SWAP]])[: len(images)]
        inputs.append(torch.from_numpy(views).to(ensemble.device))
    with torch.autocast(ensemble.device.type, ensemble.dtype, enabled=ensemble.dtype is not None):
        output = member.run.model(*inputs)
    logits, maps = output if member.run.cfg.task == "locate" else (output, images.new_zeros(1, 0))
    return logits.float().cpu().numpy(), torch.sigmoid(maps[0].float()).cpu().numpy()


def combine(logits: list[np.ndarray], weights: list[float], mean: str) -> np.ndarray:
    """(14,) probs of the members' logits (1 or 2 views, 14): mean of the views, the mirrored one's labels
    swapped back, then weighted mean of the members; of probabilities or (mean "logits") of logits."""
    views = [np.stack([own[0], own[1][SWAP]]) if len(own) == 2 else own for own in logits]
    if mean == "logits":
        return common.sigmoid(np.average([view.mean(0) for view in views], axis=0, weights=weights))
    return np.average([common.sigmoid(view).mean(0) for view in views], axis=0, weights=weights)


def predict_series(
    ensemble: Ensemble,
    voters: list[Member],
    uid: str,
    volumes: list[Volume],
    tta: bool,
    late: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, list[float], dict]:
    """probs (14,), each voter's seconds, and {name: (image, logits, maps)} of voters and of their locators. A
    locator that votes and proposes runs once. Once it is late no further member starts."""
    seen, counted, seconds = {}, [], []

    def ask(member: Member) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if member.name not in seen:
            scores = maps = None
            if member.locator:
                _, (scores, *_), maps = ask(member.locator)
            image = make_image(member, uid, volumes[member.volume], maps)
            seen[member.name] = image, *look(ensemble, member, image, tta, scores)
        return seen[member.name]

    for member in voters:
        started = time.perf_counter()
        logits = ask(member)[1]
        if np.isfinite(logits).all():
            counted.append((logits, member.run.cfg.ensemble_weight))
        else:
            say(f"{uid}: left out {member.name}: logits not finite; try --precision no", everywhere=True)
        seconds.append(time.perf_counter() - started)
        if late():
            break
    if not counted:
        raise FloatingPointError("no member gave finite logits")
    return combine(*zip(*counted, strict=True), ensemble.mean), seconds, seen


# --- the deadline -------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """How much of the ensemble the next series gets, so that the last is answered in time. Knows no clock.

    A series costs the longer of reading (it happens in the background) and forward, plus what was measured
    beside them. Nothing is cut in the first 5 % of the time: the first few series say little of the others.
    What was cut comes back only if it fits with 10 % to spare. The slowest series' time stays in reserve.
    """

    seconds: float  # from the start of the script to the last answer
    tta: bool
    num_members: int
    spent: dict = field(default_factory=dict)  # (tta, member) -> (seconds, series)
    num_series: int = 0
    read_s: float = 0.0  # sum over series, like the next
    beside_s: float = 0.0
    slowest_s: float = 0.0

    def __post_init__(self) -> None:
        self.current = (self.tta, self.num_members)

    def observe(self, wall_s: float, read_s: float, members_s: list[float], tta: bool) -> None:
        """A series was answered wall_s after the one before; read_s is its share of the readers' time."""
        for i, seconds in enumerate(members_s):
            total_s, count = self.spent.get((tta, i), (0.0, 0))
            self.spent[tta, i] = (total_s + seconds, count + 1)
        self.num_series += 1
        self.read_s += read_s
        self.beside_s += wall_s - max(read_s, sum(members_s))
        self.slowest_s = max(self.slowest_s, wall_s)

    def cost_s(self, tta: bool, num_members: int) -> float:
        """Expected seconds per series. Two views count 1.7 times one where only one of both was measured."""
        forward_s, known = 0.0, max(self.num_series, 1)
        for i in range(num_members):
            other = 1.7 if tta else 1 / 1.7
            factor = 1.0 if (tta, i) in self.spent else other
            total_s, count = self.spent.get((tta, i)) or self.spent.get((not tta, i)) or (0.0, 1)
            forward_s += factor * total_s / count
        return max(self.read_s / known, forward_s) + max(self.beside_s / known, 0.0)

    def plan(self, elapsed_s: float, left: int) -> tuple[bool, int]:
        """(mirrored view?, number of members) for the next of `left` series; 0 members: priors from here."""
        available_s = 0.98 * self.seconds - elapsed_s - self.slowest_s
        if available_s <= 0:
            return False, 0
        if self.num_series == 0 or elapsed_s < 0.05 * self.seconds:
            return self.current
        plans = [(True, self.num_members)] * self.tta + [(False, n) for n in range(self.num_members, 0, -1)]
        fits = (p for p in plans if left * self.cost_s(*p) * (1.1 if p > self.current else 1) <= available_s)
        self.current = next(fits, plans[-1])
        return self.current


# --- the answers --------------------------------------------------------------------------------------------


@dataclass
class Answer:
    uid: str
    probs: list[float]
    reason: str = ""  # why it is the prior
    hottest: dict | None = None  # place of its heat map, with --explain


def answer_all(
    ensemble: Ensemble, source: Source, uids: list[str], args: argparse.Namespace, keep: Callable
) -> list[Answer]:
    """An Answer for each of uids, kept as soon as it is there; reading goes on while the models work."""
    known = [uid for uid in uids if safe_uid(uid) in source.series]
    answers, left = [], set(known)
    for uid in uids:
        if uid not in left:
            reason = source.failed.get(safe_uid(uid), f"not found in {args.src}")
            answers.append(prior_answer(ensemble, uid, reason))
            keep(answers[-1])
    budget = make_budget(ensemble, args)
    ready = read_ahead(read_all(source, known, ensemble.configs, args), depth=2)
    plan, last = (args.tta, len(ensemble.members)), time.monotonic()
    bar = common.progress(len(known), desc="series", show=sys.stderr.isatty())
    with bar, contextlib.suppress(queue.Empty):  # nothing came before the deadline
        while left:
            plan = decide(budget, plan, len(left), args)
            if plan[1] == 0:
                break
            item = ready.get(timeout=max(0.0, seconds_left(args)) if budget else None)
            if isinstance(item, Exception):
                raise item
            answer, members_s = answer_one(ensemble, item, plan, args)
            answers.append(answer)
            keep(answer)
            left.remove(answer.uid)
            if budget:
                read_s = sum(item[1][1:]) / (1 if source.is_cache else args.workers) if item[1] else 0.0
                budget.observe(time.monotonic() - last, read_s, members_s, plan[0])
            last = time.monotonic()
            bar.update()
    if left:
        say(f"the time is over: {len(left)} series get the prior", everywhere=True)
    return answers + [Answer(uid, ensemble.prior.tolist(), "no time left") for uid in sorted(left)]


def make_budget(ensemble: Ensemble, args: argparse.Namespace) -> Budget | None:
    hours = args.budget_hours
    return Budget(3600 * hours, args.tta, len(ensemble.members)) if hours else None


def decide(
    budget: Budget | None, before: tuple[bool, int], left: int, args: argparse.Namespace
) -> tuple[bool, int]:
    """The plan for the next series: the budget's, if there is one; a change is said."""
    plan = budget.plan(time.monotonic() - args.started, left) if budget else before
    if plan != before and plan[1]:
        say(
            f"deadline: {left} series left, {seconds_left(args):.0f} s: now {plan[1]} of {budget.num_members}"
            f" members, mirrored view {'on' if plan[0] else 'off'}, {budget.cost_s(*plan):.2f} s a series",
            everywhere=True,
        )
    return plan


def seconds_left(args: argparse.Namespace) -> float:
    """Until the last moment at which a model may start; without a budget infinite."""
    return args.started + 0.99 * 3600 * (args.budget_hours or float("inf")) - time.monotonic()


def answer_one(
    ensemble: Ensemble, item: tuple, plan: tuple[bool, int], args: argparse.Namespace
) -> tuple[Answer, list[float]]:
    """The Answer to an item of read_all under a plan, and each member's seconds. OSError only if the GPU is
    gone for good."""
    (uid, result, reason), (tta, num_members) = item, plan
    if reason is not None:
        return prior_answer(ensemble, uid, reason), []
    volumes, voters = result[0], ensemble.voters(uid, args.oof)[:num_members]
    try:
        probs, members_s, seen = predict_series(
            ensemble, voters, uid, volumes, tta, lambda: seconds_left(args) < 0
        )
    except Exception as error:  # out of memory, logits that are not finite: this row alone
        text = " ".join(str(error).split())[:200]
        if "CUDA error" in text and "out of memory" not in text:  # every later call would fail as well
            raise OSError(f"{uid}: {text}; run again (with --out it goes on where it stopped)") from error
        return prior_answer(ensemble, uid, f"{type(error).__name__}: {text}"), []
    answer = Answer(uid, probs.tolist())
    if args.explain and (args.series_list or probs[AP] >= args.explain_threshold):
        try:
            answer.hottest = explain(ensemble, voters, answer, volumes, seen, args.explain)
        except Exception as error:  # a picture is no reason to lose the row
            say(f"{uid}: no picture: {type(error).__name__}: {error}", everywhere=True)
    return answer, members_s


def prior_answer(ensemble: Ensemble, uid: str, reason: str) -> Answer:
    say(f"{uid}: answered by the prior: {reason}", everywhere=True)
    return Answer(uid, ensemble.prior.tolist(), reason)


def open_partial(path: Path, settings: dict) -> tuple[dict[str, Answer], Callable[[Answer], None]]:
    """Answers that a killed run left in path (path.1 ... for its other processes; the prior does not count),
    and a function that adds one and syncs, so that a kill costs only the series at work.

    Raises ValueError if they were made with other members or settings.
    """
    answers = {}
    rank = int(os.environ.get("RANK", 0))
    own, is_begun = path.with_name(f"{path.name}.{rank}") if rank else path, False
    for part in sorted(path.parent.glob(f"{path.name}*")):
        rows = []
        for line in part.read_text().split("\n"):
            with contextlib.suppress(json.JSONDecodeError):  # a kill tears the last line
                rows.append(json.loads(line))
        if rows and rows[0] != settings:
            differ = ", ".join(key for key in settings if rows[0].get(key) != settings[key])
            raise ValueError(f"{part}: begun with other {differ}; run as then, or delete it to start anew")
        answers |= {row["uid"]: Answer(**row) for row in rows[1:] if not row["reason"]}
        is_begun |= bool(rows) and part == own
    file = open(own, "a" if is_begun else "w")  # noqa: SIM115  open until the process ends

    def write(row: dict) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())

    if is_begun:
        file.write("\n")  # ends a torn line
    else:
        write(settings)
    return answers, lambda answer: write(asdict(answer))


def run_settings(ensemble: Ensemble, args: argparse.Namespace) -> dict:
    """What rows depend on: a killed run is only continued by one that would give the same."""
    members = {}
    for member in ensemble.members:
        state = (member.run.folder / "best_ema.safetensors").stat()
        members[member.name] = [state.st_size, state.st_mtime_ns, member.locator and member.locator.name]
    values = {name: getattr(args, name) for name in ("tta", "mean", "precision", "oof")}
    return {"members": members, "src": str(args.src.resolve()), **values, "explain": str(args.explain)}


# --- explanations -------------------------------------------------------------------------------------------


def explain(
    ensemble: Ensemble, voters: list[Member], answer: Answer, volumes: list[Volume], seen: dict, folder: Path
) -> dict:
    """Write <uid>.png with the slabs that matter; the hottest place as voxels (z, y, x) and LPS mm."""
    asked = [voter if voter.run.cfg.task == "locate" else voter.locator for voter in voters]
    locators = list({m.name: m for m in asked if m and m.name in seen}.values())
    if locators:
        method, volume = "locator", volumes[locators[0].volume]
        alike = [m for m in locators if seen[m.name][2].shape == seen[locators[0].name][2].shape]
        maps = np.mean([seen[m.name][2] for m in alike], axis=0)
        size = volume.voxels.shape[:0:-1]  # cv2 wants (W, H)
        heat = np.stack([cv2.resize(slab, size, interpolation=cv2.INTER_LINEAR) for slab in maps.sum(0)])
        stride = locators[0].run.cfg.locator_stride
        peak = common.find_peaks(maps, np.array(volume.spacing_mm), 1, 1.0, stride)[0]
        place, value = peak[:3], peak[3]
    else:
        method, volume = "gradient", volumes[voters[0].volume]
        heat = gradient_map(voters[0].run, seen[voters[0].name][0], volume, ensemble.device)
        place, value = np.array(np.unravel_index(heat.argmax(), heat.shape)), heat.max()
    png = draw_slabs(volume, heat, place, answer, method)
    common.write_atomic(folder / f"{safe_uid(answer.uid)}.png", png)
    names = ("z", "y", "x", "x_mm", "y_mm", "z_mm", "heat")
    numbers = [*place, *common.to_lps(place, volume.affine)[0], value]
    row = {name: round(float(number), 3) for name, number in zip(names, numbers, strict=True)}
    return row | {"method": method, "spacing_mm": volume.spacing_mm}


def gradient_map(run: Run, image: np.ndarray, volume: Volume, device: torch.device) -> np.ndarray:
    """(Z, H, W) in 0..1: |gradient x input| of the logit of AP, over the slabs, smoothed over 3 mm."""
    images = (torch.from_numpy(image)[None].to(device).float() / 255).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(run.model(images)[0, AP], images)
    heat = (gradient * images).abs()[0, : len(volume.voxels)].detach().cpu().numpy()
    across, *within = (3.0 / length for length in volume.spacing_mm)
    heat = np.stack([cv2.GaussianBlur(slab, (0, 0), within[1], sigmaY=within[0]) for slab in heat])
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(2 * across)) + 1, across)
    heat = cv2.filter2D(heat.reshape(len(heat), -1), -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return (heat / max(float(heat.max()), 1e-12)).reshape(volume.voxels.shape)


def draw_slabs(volume: Volume, heat: np.ndarray, place: np.ndarray, answer: Answer, method: str) -> bytes:
    """A PNG: the hottest slabs from the feet up, coloured where above the median, a cross at the peak."""
    from matplotlib.figure import Figure

    base = float(np.median(heat))
    share = np.clip((heat - base) / max(float(heat.max()) - base, 1e-12), 0, 1)
    peaks = share.max(axis=(1, 2))
    ranked = [z for z in np.argsort(-peaks, kind="stable")[:NUM_PANELS] if peaks[z] > 0.1]
    num_rows = -(-len(ranked) // 3)
    figure = Figure(figsize=(10, 1.1 + 3.4 * num_rows), layout="constrained")
    for number, z in enumerate(sorted(ranked)):
        axes = figure.add_subplot(num_rows, 3, number + 1)
        axes.imshow(volume.voxels[z], cmap="gray", vmin=0, vmax=255)
        axes.imshow(share[z], cmap="inferno", vmin=0, vmax=1, alpha=0.6 * share[z])
        if z == round(float(place[0])):
            axes.plot(place[2], place[1], "+", color="cyan", markersize=16)
        height_mm = common.to_lps([z, 0, 0], volume.affine)[0, 2]
        axes.set_title(f"slab {z + 1} of {len(heat)}, z {height_mm:.0f} mm", fontsize=9)
        for side, x in (("R", 0.02), ("L", 0.94)):  # of the patient
            axes.text(x, 0.5, side, color="white", transform=axes.transAxes)
        axes.set_axis_off()
    top = sorted(range(AP), key=lambda k: -answer.probs[k])[:4]
    text = [f"{LABELS[k]} {answer.probs[k]:.2f}" for k in (AP, *top)]
    figure.suptitle("\n".join([answer.uid, "   ".join(text[:3]), "   ".join(text[3:])]), fontsize=10)
    figure.supxlabel(f"heat: {method}, cross at its highest. Research software, no diagnosis.", fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return png.getvalue()


def write_hottest(answers: list[Answer], source: Source, folder: Path) -> None:
    """hottest.csv; on stderr the share of maps hottest near an annotated point, where a cache has any."""
    rows = []
    for answer in (a for a in answers if a.hottest):
        row = {UID: answer.uid, **answer.hottest, "distance_mm": None}
        spacing_mm = np.array(row.pop("spacing_mm"))
        if source.is_cache:  # the only look at annotated points, for this figure alone
            points = common.load_volume(source.series[safe_uid(answer.uid)], ["points"])[0]["points"]
            if len(points):
                away_mm = (points - np.array([row["z"], row["y"], row["x"]])) * spacing_mm
                row["distance_mm"] = round(float(np.linalg.norm(away_mm, axis=1).min()), 2)
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(rows[0]) if rows else [UID])
    common.write_atomic(folder / "hottest.csv", table.to_csv(index=False).encode())
    say(f"{folder}: {len(rows)} pictures and hottest.csv")
    near = [row["distance_mm"] <= REACH_MM for row in rows if row["distance_mm"] is not None]
    if near:
        low, high = wilson(sum(near), len(near))
        say(
            f"hottest place within {REACH_MM:g} mm of an annotated point: {sum(near)} of {len(near)} series, "
            f"{sum(near) / len(near):.2f} (95 % interval {low:.2f} to {high:.2f})"
        )


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    centre, reach = hits + z**2 / 2, z * np.sqrt(hits * (total - hits) / total + z**2 / 4)
    return float((centre - reach) / (total + z**2)), float((centre + reach) / (total + z**2))


# --- scores -------------------------------------------------------------------------------------------------


def read_truth(path: Path) -> pd.DataFrame:
    """A table of labels. Raises ValueError or OSError if it is none."""
    table = pd.read_csv(path, dtype={UID: str})
    missing = [name for name in (UID, *LABELS) if name not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; expected {UID} and the 14 labels")
    return table


def score_answers(answers: list[Answer], labels: Path, src: Path) -> str:
    """The score against a label table, for people; patient and plane come from a cache's index.csv."""
    table = read_truth(labels).drop_duplicates(UID).set_index(UID)
    index = pd.DataFrame({"patient": [], "plane": []})
    if (src / "index.csv").is_file():
        index = pd.read_csv(src / "index.csv", dtype=str, keep_default_na=False).set_index(UID)
    scored = [answer for answer in answers if answer.uid in table.index]
    if not scored:
        raise ValueError(f"{labels}: labels none of the {len(answers)} predicted series")
    uids = [answer.uid for answer in scored]
    table = table.loc[uids]
    table["patient"] = [index["patient"].get(uid) or uid for uid in uids]
    table["plane"] = [index["plane"].get(uid) or "unknown" for uid in uids]
    table["Modality"] = table.get("Modality", "unknown")
    result = common.score(table, np.array([answer.probs for answer in scored]))
    patients = f"{result['num_patients']} patients" if len(index) else "unknown patients (each counts as one)"
    lines = [
        f"wAUC {result['wauc']:.4f} (95 % interval {result['low']:.4f} to {result['high']:.4f}, "
        f"{result['draws_used']} draws); {len(scored)} series of {patients}, "
        f"{sum(bool(answer.reason) for answer in scored)} answered by the prior, "
        f"{len(answers) - len(scored)} without labels left out",
        f"{'label':<45}{'AUC':>7}{'low':>8}{'high':>8}{'positives':>11}",
    ]
    for name, row in result["per_label"].items():
        lines.append(
            f"{name:<45}{row['auc']:>7.3f}{row['low']:>8.3f}{row['high']:>8.3f}{row['positives']:>11}"
        )
    if result["undefined"]:
        lines.append(f"without AUC, as all series agree: {', '.join(result['undefined'])}")
    for group in ("modality", "plane"):
        for value, row in result[f"per_{group}"].items():
            lines.append(f"{f'{group} {value}':<45}{row['wauc']:>7.3f} wAUC, {row['num_series']} series")
    return "\n".join(lines)


# --- Kaggle's server ----------------------------------------------------------------------------------------


def make_predict(ensemble: Ensemble, args: argparse.Namespace) -> Callable[[str], pd.DataFrame]:
    """The function that the gateway calls, once per series."""
    budget, plan, last = make_budget(ensemble, args), (args.tta, len(ensemble.members)), time.monotonic()

    def predict(series_path: str) -> pd.DataFrame:
        """One row of 14 probabilities; the prior if anything goes wrong: an exception would end the run."""
        nonlocal plan, last
        probs = ensemble.prior.tolist()
        try:
            folder = Path(series_path)
            plan = decide(budget, plan, max(1, args.num_series - budget.num_series) if budget else 1, args)
            if plan[1] == 0:
                raise TimeoutError("no time left")
            here = Source(False, {safe_uid(folder.name): folder}, {})
            item = next(read_all(here, [folder.name], ensemble.configs, args))
            answer, members_s = answer_one(ensemble, item, plan, args)
            probs = answer.probs
            if budget:
                budget.observe(time.monotonic() - last, 0.0, members_s, plan[0])  # reading overlaps nothing
        except Exception as error:
            say(f"{series_path}: answered by the prior: {type(error).__name__}: {error}")
        try:
            shutil.rmtree(SHARED, ignore_errors=True)  # what stays there fills the disk
            SHARED.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            say(f"could not empty {SHARED}: {error}")
        last = time.monotonic()
        return pd.DataFrame([probs], columns=list(LABELS))

    return predict


def serve(args: argparse.Namespace) -> int:
    """Load the members, then answer the gateway: the hidden one, or outside of a submission the local one."""
    if importlib.util.find_spec("kaggle_evaluation") is None:
        say("--serve: no package kaggle_evaluation; it lies in the challenge's data: add that to PYTHONPATH")
        return 1
    from kaggle_evaluation.rsna_inference_server import RSNAInferenceServer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("fp16" if device.type == "cuda" else "no")
    ensemble = load_ensemble(args, device, None)
    server = RSNAInferenceServer(make_predict(ensemble, args))
    say(f"{len(ensemble.members)} members ready after {time.monotonic() - args.started:.0f} s")
    if os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        server.serve()
    else:
        server.run_local_gateway()
    return 0


# --- the command --------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    readers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    listed = "only these series, in this order: a UID per line, or a CSV such as a sample submission"
    add("--src", type=Path, default=Path("cache"), help="cache or tree of DICOM files (default: cache)")
    add("--outputs", default="outputs/*_seed*_fold*", metavar="GLOB", help="runs (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the CSV here instead of to stdout; can be resumed")
    add("--series-list", "--sample-submission", type=Path, metavar="FILE", help=listed)
    add("--tta", action="store_true", help="average with the mirrored view")
    add("--mean", choices=("probs", "logits"), default="probs", help="what members average (default: probs)")
    add("--precision", choices=sorted(PRECISIONS), help="default: fp16 on a GPU, no (float32) on a CPU")
    add("--compile", action="store_true", help="torch.compile the members: slow start, then faster")
    add("--workers", type=int, default=readers, help="processes that read DICOM (default: %(default)s)")
    add(
        "--series-timeout",
        "--timeout",
        type=float,
        default=300,
        metavar="S",
        help="to read one (default: 300)",
    )
    add("--memory-gb", type=float, default=4, metavar="GB", help="to read one series (default: 4)")
    add("--budget-hours", type=float, metavar="H", help="answer the last series before this time is over")
    add("--labels", type=Path, metavar="CSV", help="print the score against these labels to stderr")
    add("--oof", action="store_true", help="out-of-fold predictions and their score, from a cache")
    add("--explain", type=Path, metavar="DIR", help="pictures of suspicious series, or all of --series-list")
    add(
        "--explain-threshold", type=float, default=0.5, metavar="P", help="of Aneurysm Present (default: 0.5)"
    )
    add("--serve", action="store_true", help="answer the challenge's gateway; --src is not used")
    add("--num-series", type=int, default=2500, help="with --serve and --budget-hours (default: 2500)")
    args = parser.parse_args(arguments)
    if args.workers < 1 or args.series_timeout <= 0 or args.memory_gb <= 0:
        parser.error("--workers, --series-timeout and --memory-gb: expected more than 0")
    if args.budget_hours is not None and args.budget_hours <= 0:
        parser.error(f"--budget-hours {args.budget_hours}: expected more than 0")
    if args.precision == "fp16" and not torch.cuda.is_available():
        parser.error("--precision fp16 needs a GPU; leave it out, or use bf16 or no")
    if args.serve and args.series_timeout > 1500:
        parser.error("--series-timeout: the gateway waits 30 minutes for an answer; expected at most 1500")
    for path in (args.series_list, args.labels):
        if path is not None and not path.is_file():
            parser.error(f"{path}: no such file")
    args.started = time.monotonic()
    return args


def predict_folder(args: argparse.Namespace, state: PartialState) -> tuple[list[Answer], Source]:
    """Everything from --src to an Answer per row, gathered from all processes, in the order of the rows."""
    source = find_source(args.src)
    if args.oof and not source.is_cache:
        raise ValueError(f"--oof needs a cache; {args.src} holds DICOM files")
    if args.labels or args.oof:  # a fault in them is to be told before the work, not after it
        read_truth(args.labels or args.src / "train.csv")
    args.precision = args.precision or ("fp16" if state.device.type == "cuda" else "no")
    ensemble = load_ensemble(args, state.device, cache_settings(source))
    uids = choose_series(source, args.series_list)
    if args.oof:
        covered = [uid for uid in uids if ensemble.voters(uid, True)]
        if len(covered) < len(uids):
            say(f"{len(uids) - len(covered)} of {len(uids)} series left out: no member held them out")
        if not covered:
            raise ValueError(f"--oof: no member of {args.outputs} held out a series of {args.src}")
        uids = covered
    elif args.labels:
        trained = sum(0 < len(ensemble.voters(uid, True)) < len(ensemble.members) for uid in uids)
        if trained:
            say(
                f"the score is too high: {trained} series trained some of the members; --oof leaves those out"
            )
    say(
        f"{len(uids)} series, {len(ensemble.members)} members, {len(ensemble.configs)} kinds of volume, "
        f"{state.num_processes} processes on {state.device.type}, precision {args.precision}"
    )
    done, keep = {}, lambda answer: None
    if args.out:
        partial = args.out.with_name(f"{args.out.name}.partial")
        done, keep = open_partial(partial, run_settings(ensemble, args))
    if args.explain:
        args.explain.mkdir(parents=True, exist_ok=True)
    own = uids[state.process_index :: state.num_processes]
    answers = [done[uid] for uid in own if uid in done]
    if answers:
        say(f"{len(answers)} series were answered before", everywhere=True)
    answers += answer_all(ensemble, source, [uid for uid in own if uid not in done], args, keep)
    by_uid = {answer.uid: answer for answer in gather_object(answers)}
    return [by_uid[uid] for uid in uids], source


def cache_settings(source: Source) -> dict | None:
    """Of a cache's volumes, from its first readable one; None for DICOM files, which fit any member."""
    for path in source.series.values() if source.is_cache else ():
        with contextlib.suppress(Exception):  # a damaged volume is told when its turn comes
            return json.loads(common.load_volume(path, [])[1]["settings"])
    return None


def to_csv(answers: list[Answer]) -> str:
    table = pd.DataFrame([answer.probs for answer in answers], columns=list(LABELS))
    table.insert(0, UID, [answer.uid for answer in answers])
    return table.to_csv(index=False, float_format="%.8g")


def main() -> int:
    args = parse_arguments()
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w")  # for the table alone: whatever a library prints goes to stderr
    os.dup2(2, 1)
    try:
        if args.serve:
            return serve(args)
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=timedelta(days=1))
        answers, source = predict_folder(args, state)
        if not state.is_main_process:
            return 0
        if args.out:
            common.write_atomic(args.out, to_csv(answers).encode())
            for part in args.out.parent.glob(f"{args.out.name}.partial*"):
                part.unlink()
        else:
            stdout.write(to_csv(answers))
            stdout.flush()
        if args.explain:
            write_hottest(answers, source, args.explain)
        labels = args.labels or (args.src / "train.csv" if args.oof else None)
        if labels:
            tqdm.write(score_answers(answers, labels, args.src), file=sys.stderr)
        num_prior = sum(bool(answer.reason) for answer in answers)
        say(f"{len(answers)} rows, {num_prior} the prior; {time.monotonic() - args.started:.1f} s")
        return 3 if num_prior else 0
    except (ValueError, OSError) as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    common.leave(main())
