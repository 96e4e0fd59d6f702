"""Turn DICOM series into fixed-size cached volumes.

in   --src DIR    any tree of DICOM files; train.csv and train_localizers.csv in it or beside it, if any
out  --dst DIR    <SeriesInstanceUID>.safetensors: volume uint8 (Z, H, W), annotated points and their labels;
                  its metadata has under left_out the names of the series' files that are not in it;
                  index.csv: a row per series: ok, doubtful (a volume that looks wrong) or failed, and why;
                  its age and sex are train.csv's where the files have none;
                  faults.csv: labels and points that contradict each other or are missing; stray files;
                  train.csv and its sum: the labels; <uid>.failed.txt: reasons, for the index; .patient_key:
                  with which the index hides each PatientID
run  python preprocess.py --src dicoms --dst cache
     python preprocess.py --src dicoms --dst cache thin --config configs/fold0.yaml configs/locator.yaml

Several folders, each with its config, are filled in one pass that reads each series once. Run it again at
any time: finished series are kept, failed and changed ones are done, the index is rebuilt from the folder. A
series counts as changed by names, sizes and 12 kB of samples of its files, not by place or date. Several
machines share one destination: torchrun, accelerate launch and Slurm arrays from 0 are recognised, --shard
0/4 ... 3/4 works everywhere. A series that crashes a decoder, hangs (--timeout, in seconds) or needs too much
memory (--memory-gb) costs only itself. --workers N processes share the work; --limit N takes only the first N
series. --verify compares volumes, index and labels; running again heals what it finds.

exit 0 all well, 1 nothing could be done or the disk is full, 2 wrong usage, 3 some series failed: named on
stderr and in index.csv (0 under torchrun and accelerate, which would stop the other processes).
"""

import ast
import functools
import hmac
import os
import secrets
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports needs no traceback

from pandas import DataFrame, isna

import common
import dicom
from common import LABELS, LOCATIONS, UID, Config, load_volume, log, progress, volume_path, write_atomic
from dicom import Series, Volume, VolumeSettings, safe_uid

LABEL_TABLE = "train.csv"
LABEL_SUM = "train.csv.sha256"
POINT_TABLE = "train_localizers.csv"
INDEX = "index.csv"
INDEX_COLUMNS = (
    "status reason modality plane patient age sex num_slices rows cols slice_mm row_mm col_mm "
    "thickness_mm coverage_mm transfer_syntax num_points points_inside notes source"
)
LEFT_OUT = "point left out"  # begins a note
log_shard = functools.partial(log, everywhere=True)  # what concerns one shard alone


# --- labels and points --------------------------------------------------------------------------------------
def find_table(src: Path, name: str) -> Path | None:
    """The CSV in src or in the folder above it (src may be the `series` folder itself); logs its absence."""
    for path in (src / name, src.absolute().parent / name):
        if path.is_file():
            return path
    log(f"no {name} in {src} or above it: the cache gets none")
    return None


def read_points(path: Path) -> dict:
    """train_localizers.csv as uid -> [[SOPInstanceUID, x, y (pixels), frame from 0 or None, label], ...]."""
    columns = [UID, "SOPInstanceUID", "coordinates", "location"]
    rows = common.read_csv(path, columns, dtype=str)[columns].itertuples(index=False)
    points, faults = defaultdict(list), []
    for line, (uid, sop_uid, coordinates, location) in enumerate(rows, start=2):
        try:
            place = ast.literal_eval(coordinates if len(coordinates) <= 200 else "")
            x, y, frame = float(place["x"]), float(place["y"]), place.get("f")
            frame = None if frame is None else int(frame)
            points[safe_uid(str(uid))].append([sop_uid, x, y, frame, LOCATIONS.index(location)])
        except Exception:  # literal_eval raises many kinds
            faults.append(f"line {line} has {location!r:.60}, {coordinates!r:.60}")
    if faults:
        raise ValueError(
            f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}; expected one of the {len(LOCATIONS)} "
            f"locations, and coordinates in pixels such as {{'x': 258.4, 'y': 261.4}}"
        )
    return points


def find_faults(labels: dict, points: dict, series: dict, strays: list) -> DataFrame:
    """A row per series that a table lacks, or whose row contradicts itself or its points; and per stray."""
    faults = [(f"Series not in {LABEL_TABLE}", uid) for uid in series.keys() - labels.keys() if labels]
    for name, table in ((LABEL_TABLE, labels), (POINT_TABLE, points)):
        faults += [(f"Series of {name} not in --src", uid) for uid in table.keys() - series.keys()]
    for uid, row in labels.items():
        if any(row[name] for name in LOCATIONS) != row[common.PRESENT]:
            faults.append((f"{common.PRESENT} and arteries disagree in {LABEL_TABLE}", uid))
        if not all(row[LABELS[label]] for *_, label in points.get(uid, ())):
            faults.append((f"A point whose label is 0 in {LABEL_TABLE}", uid))
    places = {path.parent: uid for uid, files in series.items() for path in files}
    faults += [
        (f"Files left out: {reason}", f"{path.name} beside {places.get(path.parent, 'no series')}")
        for path, reason in strays
    ]
    return DataFrame(sorted(faults), columns=["fault", "case"]).set_index("fault")


# --- one series ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """A series, and the folders that are to hold its volume, each with the config of its volumes."""

    uid: str
    files: list
    points: list  # the annotated ones, as read_points gives them
    labels: dict  # its row of the label table
    caches: dict


def sample_files(job: Job) -> bytes:
    """What a volume is made from: the points, and each file's name, size, start, middle and end."""
    samples = [str(job.points).encode()]
    for path in sorted(job.files):
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            samples.append(f"{path.name} {size} ".encode(errors="surrogateescape"))
            for start in (0, size // 2, max(0, size - 4096)):
                file.seek(start)
                samples.append(file.read(4096))
    return b"".join(samples)


def cache_series(job: Job) -> list | OSError:
    """Read a series once, in a worker -> "cached" or "kept" for each cache, or the error of the disk."""
    samples = sample_files(job)
    series = None
    outcomes = []
    for dst, cfg in job.caches.items():
        path = volume_path(dst, job.uid)
        key = read_patient_key(dst)
        source = hmac.digest(key, samples, "sha256").hex()[:16]
        made_from = {"source": source, "settings": common.volume_settings(cfg)}
        with suppress(FileNotFoundError, ValueError):
            _, meta = load_volume(path)
            if meta == meta | made_from:
                outcomes.append("kept")
                continue
        series = series or dicom.read_series(job.files, job.uid)
        if len(job.caches) > 1:
            series.forget = lambda *_: None  # decoded slices stay for the next volume
        volume = dicom.make_volume(series, cfg.volume)
        notes = [*series.notes, *volume.notes]
        for file, reason in series.skipped[:1]:
            notes.append(f"{len(series.skipped)} of {len(job.files)} files left out: {file.name}: {reason}")
        used = {frame.path for frame in series.frames}
        points, point_labels, problems = place_points(series, volume, job.points)
        meta = describe_series(series, job, key) | {
            **made_from,
            "affine": volume.affine.tolist(),
            "spacing_mm": volume.spacing_mm,
            "points_inside": int(common.is_inside(points, volume.voxels.shape).sum()),
            "notes": [hide_folders(note, job.files) for note in notes + problems],
            "doubts": volume.doubts,
            "left_out": [path.name for path in job.files if path not in used],
        }
        sop_uids = {sop_uid for sop_uid, _ in series.geometry}
        try:
            common.save_volume(path, volume.voxels, points, point_labels, meta, sop_uids)
        except OSError as error:
            return error
        outcomes.append("cached")
    return outcomes


def hide_folders(text: str, files: list) -> str:
    """The text with the names of files, but not with where these lie: that may name a patient."""
    for folder in {path.parent for path in files}:
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def place_points(series: Series, volume: Volume, points: list) -> tuple:
    """Annotated points as voxels (P, 3), their labels (P,), a note for each in no image or off its side."""
    places, labels, problems = [], [], []
    for sop_uid, x, y, frame, label in points:
        try:
            place = series.point(sop_uid, x, y, frame)
            image = series.geometry[sop_uid, frame or 0]
            if not (0 <= x <= image.cols and 0 <= y <= image.rows):
                raise ValueError(f"({x:g}, {y:g}) lies outside of image {sop_uid}")
            places.append(place)
            labels.append(label)
        except ValueError as error:
            problems.append(f"{LEFT_OUT}: {error}")
    places = dicom.to_voxel(places, volume.affine)
    sides = [common.doubt_side(*point, volume) for point in zip(places, labels, strict=True)]
    return places, labels, problems + [f"a point of {side}" for side in sides if side]


def describe_series(series: Series, job: Job, key: bytes) -> dict:
    """What a volume says of its series; age and sex are the label table's where the files have none."""
    frame = series.frames[0]
    header = frame.header
    low, high = dicom.canonical_grid(series).extents_mm[0]
    slice_mm, row_mm, col_mm = (round(length, 4) for length in series.spacing_mm)
    years = common.parse_age(header.get("PatientAge") or job.labels.get("PatientAge"))
    sex = header.get("PatientSex") or str(job.labels.get("PatientSex"))[:1]
    patient = series.patient.encode(errors="surrogatepass")
    return {
        "uid": job.uid,
        "num_points": len(job.points),
        "modality": series.modality,
        "plane": series.plane,
        "patient": hmac.digest(key, patient, "sha256").hex()[:12] if patient else "",
        "age": "" if isna(years) else int(years),
        "sex": sex if sex in ("F", "M") else "",
        "num_slices": len(series.frames),
        "rows": frame.rows,
        "cols": frame.cols,
        "slice_mm": slice_mm,
        "row_mm": row_mm,
        "col_mm": col_mm,
        "thickness_mm": round(header.get("SliceThickness", 0), 4) or "",
        "coverage_mm": round(high - low, 2),  # along z
        "transfer_syntax": header["TransferSyntaxUID"],
    }


# --- the cache's folder -------------------------------------------------------------------------------------
def read_patient_key(dst: Path) -> bytes:
    """The random key of a cache, the same for all its shards: made by the first that comes."""
    path = dst / ".patient_key"
    with suppress(FileExistsError), open(path, "xb") as file:
        file.write(secrets.token_bytes(32))
    for _ in range(50):  # the process that made it may not have written it yet
        if len(key := path.read_bytes()) == 32:
            return key
        time.sleep(0.1)
    raise ValueError(f"{path}: found {len(key)} bytes, expected 32; delete it and run again")


def read_cache(dst: Path, names: tuple | None = ()) -> tuple:
    """(uid -> metadata of the volumes in dst, the faults of others). Checks tensors where names is None."""
    cached, faults = {}, []
    paths = sorted(dst.glob("*.safetensors"))
    with progress(len(paths), desc="verify", show=names is None) as bar:
        for path in paths:
            try:
                _, meta = load_volume(path, names)
                if meta["uid"] != path.stem:
                    raise ValueError(f"{path}: holds series {meta['uid']}; run preprocess.py again")
                cached[path.stem] = meta
            except (FileNotFoundError, ValueError) as error:
                faults.append(str(error))
            bar.update()
    return cached, faults


def record_outcome(job: Job, dst: Path, reason: str | None) -> None:
    """Write down why a series failed, and remove its volume; or remove the record of an earlier failure."""
    record = dst / f"{job.uid}.failed.txt"
    if reason:
        reason = hide_folders(reason, job.files)
        log_shard(f"{job.uid}: failed: {reason}")
        write_atomic(record, reason.encode(errors="backslashreplace"))
        volume_path(dst, job.uid).unlink(missing_ok=True)
    else:
        record.unlink(missing_ok=True)


def build_index(dst: Path, cached: dict) -> tuple:
    """The index, from the folder's failures and volumes alone, and its CSV, with escapes such as \\udce4."""
    rows = {}
    for path in dst.glob("*.failed.txt"):
        with suppress(FileNotFoundError):  # another process succeeded meanwhile
            reason = path.read_text(errors="replace")
            rows[path.name.removesuffix(".failed.txt")] = {"status": "failed", "reason": reason}
    for uid, meta in cached.items():
        reason, notes = "; ".join(meta["doubts"]), "; ".join(meta["notes"])
        status = "doubtful" if reason else "ok"
        rows[uid] = meta | {"status": status, "reason": reason, "notes": notes}
    index = DataFrame.from_dict(rows, orient="index", dtype=object).sort_index()
    index = index.reindex(columns=INDEX_COLUMNS.split()).rename_axis(UID)
    return index, index.to_csv(lineterminator="\n").encode(errors="backslashreplace")


def write_index(dst: Path) -> DataFrame:
    """Rebuild index.csv from the folder."""
    cached, faults = read_cache(dst)
    for fault in faults:
        log_shard(f"counts as missing: {fault}")
    index, text = build_index(dst, cached)
    write_atomic(dst / INDEX, text)
    return index


def verify(dst: Path) -> int:
    """Compare every volume, the index and the label table with what they should be; exit code."""
    if not dst.is_dir():
        raise ValueError(f"{dst}: no such folder; expected a cache that preprocess.py has filled")
    cached, faults = read_cache(dst, names=None)
    _, text = build_index(dst, cached)
    sums = {dst / INDEX: sha256(text).hexdigest()}
    if (dst / LABEL_SUM).is_file():
        sums[dst / LABEL_TABLE] = (dst / LABEL_SUM).read_text(errors="replace")
    for path, expected in sums.items():
        if not path.is_file() or sha256(path.read_bytes()).hexdigest() != expected:
            faults.append(f"{path}: missing, or differs from the folder; run preprocess.py again")
    for fault in faults:
        log(fault)
    log(f"{dst}: {len(cached)} volumes agree with their sums; {len(faults)} faults")
    return 3 if faults else 0


# --- the command --------------------------------------------------------------------------------------------
def parse_arguments() -> Namespace:
    parser = common.make_parser(f"{__doc__}\nlabels of train.csv: {', '.join(LABELS)}", VolumeSettings)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--src", type=Path, metavar="DIR")
    task.add_argument("--verify", action="store_true")
    parser.add_argument("--dst", type=Path, metavar="DIR", nargs="+", required=True)
    parser.add_argument("--config", metavar="YAML", nargs="+", default=[None], help="settings of each --dst")
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", default=shard_of(os.environ))
    counts = {"workers": common.usable_cores(), "timeout": 600, "memory-gb": 4, "limit": None}
    form = {"type": common.positive_int, "metavar": "N", "help": "default: %(default)s"}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", default=default, **form)
    args = parser.parse_args()
    if not args.src and not args.verify:
        parser.error("--src DIR (or --verify) is missing")
    if args.src and len({*args.dst}) != len(args.config):
        parser.error(f"{len(args.config)} --config for {len(args.dst)} --dst: expected one for each folder")
    return args


def parse_shard(text: str) -> tuple:
    with suppress(ValueError):
        index, count = map(int, text.split("/"))
        if 0 <= index < count:
            return index, count
    raise ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N-1, for example 0/4")


def shard_of(environment: dict) -> str:
    """I/N of this process among those that torchrun, accelerate launch or a Slurm array from 0 started."""
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
        with suppress(KeyError):
            return f"{environment[index]}/{environment[count]}"
    return "0/1"


def list_series(src: Path, folders: list) -> tuple:
    """uid -> files below src; (other file, reason), but for tables and what lies in the caches' folders."""
    folders = [folder.resolve() for folder in folders]
    for folder in filter(Path.is_file, folders):
        raise ValueError(f"--dst {folder}: a file; expected a folder")
    if src.resolve() in folders:
        raise ValueError(f"--dst {src}: it is --src; expected a folder of its own for the volumes")
    if not src.is_dir():
        raise ValueError(f"--src {src}: no such folder; expected one with DICOM files")
    series, strays = dicom.find_series(src)
    if not series:
        raise ValueError(f"{src}: found no DICOM series; expected a folder with DICOM files at any depth")
    return series, [(path, reason) for path, reason in strays if path.parent.resolve() not in folders]


def check_cache(dst: Path, cfg: Config, uids: list, points: dict) -> None:
    """Raises ValueError where this run would spoil what an earlier one made."""
    cached, _ = read_cache(dst)
    settings = common.volume_settings(cfg)
    others = [meta["settings"] for meta in cached.values() if meta["settings"] != settings]
    if others:
        raise ValueError(
            f"{dst}: {len(others)} volumes have other settings: "
            f"{common.describe_difference(others[0], settings)}. Give the --config that they were made with, "
            f"another --dst, or delete these volumes to make them again"
        )
    if not points and any(cached[uid]["num_points"] for uid in uids if uid in cached):
        raise ValueError(
            f"{dst}: has annotated points, but there is no {POINT_TABLE} in or above --src, which loses them"
        )


def preprocess(args: Namespace) -> int:
    """The run from tables to summary; exit code. ValueError (wrong input) and OSError (disk) are main's."""
    configs = [common.load_config(path, args.set) for path in args.config]
    caches = dict(zip(args.dst, configs, strict=False))
    series, strays = list_series(args.src, args.dst)
    labels_path, points_path = (find_table(args.src, name) for name in (LABEL_TABLE, POINT_TABLE))
    labels = common.read_label_table(labels_path).set_index(UID).to_dict("index") if labels_path else {}
    points = read_points(points_path) if points_path else {}
    shard, num_shards = args.shard
    uids = sorted(series)[: args.limit][shard::num_shards]
    faults = find_faults(labels, points, series, strays)
    for fault, cases in faults.groupby("fault")["case"]:
        log_shard(f"{fault}: {len(cases)}; first {cases.iloc[0]}")
    for dst, cfg in caches.items():
        check_cache(dst, cfg, uids, points)
    for dst in caches:
        dst.mkdir(parents=True, exist_ok=True)
        read_patient_key(dst)
        write_atomic(dst / "faults.csv", faults.to_csv().encode(errors="backslashreplace"))
        if labels_path:
            data = labels_path.read_bytes()
            write_atomic(dst / LABEL_TABLE, data)
            write_atomic(dst / LABEL_SUM, sha256(data).hexdigest().encode())
    jobs = [Job(uid, series[uid], points.get(uid, []), labels.get(uid, {}), caches) for uid in uids]
    try:
        outcomes = run_jobs(jobs, args)
    finally:
        indexes = {dst: write_index(dst) for dst in caches}
    for dst, index in indexes.items():
        summarise(index[index.index.isin(uids)])
        counts = ", ".join(f"{outcomes[dst, kind]} {kind}" for kind in ("cached", "kept", "failed"))
        log_shard(f"{dst}: shard {shard} of {num_shards}: {len(uids)} series, {counts}")
    num_failed = sum(outcomes[dst, "failed"] for dst in caches)
    if not num_failed or "RANK" in os.environ:
        return 0
    return 3 if num_failed < outcomes.total() else 1


def run_jobs(jobs: list, args: Namespace) -> Counter:
    """How many ended as (folder, outcome). A series that fails is tried again for each folder alone."""
    counts = Counter()
    while jobs:
        results = common.run_isolated(cache_series, jobs, args.workers, args.timeout, args.memory_gb)
        bar = progress(len(jobs), desc="preprocess")
        jobs = []
        with bar, closing(results):
            for job, outcomes, reason in results:
                bar.update()
                if isinstance(outcomes, OSError):
                    raise outcomes
                if reason and len(job.caches) > 1:
                    jobs += [replace(job, caches={dst: cfg}) for dst, cfg in job.caches.items()]
                    continue
                for dst, outcome in zip(job.caches, outcomes or ["failed"], strict=True):
                    record_outcome(job, dst, reason)
                    counts[dst, outcome] += 1
    return counts


def summarise(index: DataFrame) -> None:
    """Log what the index says of these series: how many of each kind, and the first."""
    inside, total = index[["points_inside", "num_points"]].sum()
    if total:
        log_shard(f"{inside:.0f} of {total:.0f} annotated points lie inside the volumes")
    notes = index["notes"].str.split("; ").explode().dropna()
    kinds = {
        "annotated points left out": notes[notes.str.startswith(LEFT_OUT)],
        "doubtful series": index.query("status == 'doubtful'")["reason"],
    }
    for kind, texts in kinds.items():
        if len(texts):
            log_shard(f"{len(texts)} {kind}, see {INDEX}; first {texts.index[0]}: {texts.iloc[0]}")


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return max(map(verify, args.dst)) if args.verify else preprocess(args)
    except (ValueError, OSError) as error:
        log_shard(f"preprocess.py: {error}")
        return 1
    except SystemExit as error:
        log_shard("preprocess.py: interrupted; what is finished is kept, run it again to go on")
        return error.code
    finally:
        for dst in args.dst:
            common.remove_leftovers(dst)


if __name__ == "__main__":
    sys.exit(main())
