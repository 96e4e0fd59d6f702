"""Turn DICOM series into fixed-size cached volumes.

in   --src DIR    any tree of DICOM files; where there are labels, with train.csv and train_localizers.csv in
                  it or beside it
out  --dst DIR    <SeriesInstanceUID>.safetensors: volume uint8 (Z, H, W), annotated points and their labels;
                  index.csv: a row per series with its status: ok, doubtful (a volume that looks wrong) or
                  failed, with the reason; train.csv: a copy of the labels, and its sum in train.csv.sha256;
                  <uid>.failed.txt: what the index is rebuilt from besides the volumes; .patient_key: with
                  which the index hides each PatientID
run  python preprocess.py --src dicoms --dst cache

Run it again at any time: finished series are kept, failed and changed ones are done (again), the index is
rebuilt from the folder. A series counts as changed by the names, sizes and samples of its files (12 kB of
each), not by their place or date. Several machines share one destination: torchrun, accelerate launch and
Slurm arrays from 0 are recognised by their environment, --shard 0/4 ... 3/4 works everywhere. A series that
crashes a decoder, hangs (--timeout, in seconds) or needs too much memory (--memory-gb) costs only itself.
--workers N processes share the work; --limit N takes only the first N series. --verify (instead of --src)
compares volumes, index and labels with what they should be; running again heals what it finds.

exit 0 all well, 1 nothing could be done or the disk is full, 2 wrong usage, 3 some series failed: named on
stderr and in index.csv (0 under torchrun and accelerate, which would stop the other processes).
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import hmac
import os
import secrets
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

import common
import dicom
from common import AP, LABELS, LOCATIONS, UID, load_volume, log, volume_path, volume_settings, write_atomic
from dicom import Series, VolumeSettings, safe_uid

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
    """The CSV in --src or in the folder above it (--src may be the `series` folder itself);
    logs its absence."""
    for folder in (src, src.absolute().parent):
        if (folder / name).is_file():
            return folder / name
    log(f"no {name} in {src} or above it: the cache gets none")
    return None


def read_points(path: Path) -> dict[str, list[list]]:
    """train_localizers.csv as {uid: [[SOPInstanceUID, x, y, frame or None, label], ...]}, x and y
    in pixels of that image, frames counted from 0. Raises ValueError naming the first faulty lines."""
    columns = [UID, "SOPInstanceUID", "coordinates", "location"]
    rows = common.read_csv(path, columns, dtype=str)[columns].itertuples(index=False)
    points, faults = defaultdict(list), []
    for line, (uid, sop_uid, coordinates, location) in enumerate(rows, start=2):
        try:
            point = [sop_uid, *parse_coordinates(coordinates), LOCATIONS.index(location)]
        except Exception:  # literal_eval raises many kinds
            faults.append(f"line {line} has {location!r:.60}, {coordinates!r:.60}")
        else:
            points[safe_uid(str(uid))].append(point)
    if faults:
        raise ValueError(
            f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}; expected one of the {len(LOCATIONS)} "
            f"locations, and coordinates in pixels such as {{'x': 258.4, 'y': 261.4}}"
        )
    return points


def read_labels(path: Path) -> dict[str, dict]:
    """The label table by UID. Says how many rows contradict themselves."""
    table = common.read_label_table(path).set_index(UID)
    is_odd = table[list(LOCATIONS)].any(axis=1) != table[LABELS[AP]].astype(bool)
    if is_odd.any():
        log_shard(
            f"{path}: in {is_odd.sum()} rows {LABELS[AP]} and the arteries disagree, as in {is_odd.idxmax()}"
        )
    return table.to_dict("index")


def parse_coordinates(text: str) -> tuple[float, float, int | None]:
    """(x, y, frame or None) of `{'x': 258.4, 'y': 261.4, 'f': 12}`; any Exception for other text."""
    place = ast.literal_eval(text if len(text) <= 200 else "")
    frame = place.get("f")
    return float(place["x"]), float(place["y"]), None if frame is None else int(frame)


# --- one series ---------------------------------------------------------------------------------------------


def fingerprint(job: dict) -> str:
    """What a volume was made from: name, size and samples (start, middle and end) of each file, the annotated
    points, and the key of its patient. 0.03 s for 1,000 files in memory, nothing where reading follows."""
    digest = hmac.new(job["key"], str(job["points"]).encode(), "sha256")
    for path in sorted(job["files"]):
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode(errors="surrogateescape"))
            for start in (0, size // 2, max(0, size - 4096)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def cache_series(job: dict) -> str | OSError:
    """Read one series and write its volume, unless the cache has it from the same files and settings.

    Runs in a worker. Returns "cached" or "kept", or the error with which the disk refused the volume.
    """
    uid, files, cfg = job["uid"], job["files"], job["cfg"]
    path = volume_path(job["dst"], uid)
    made_from = {"source": fingerprint(job), "settings": volume_settings(cfg)}
    with contextlib.suppress(FileNotFoundError, ValueError):
        _, meta = load_volume(path)
        if meta == meta | made_from:
            return "kept"
    series = dicom.read_series(files, uid)
    volume = dicom.make_volume(series, cfg.volume)
    notes = [*series.notes, *volume.notes]
    for file, reason in series.skipped[:1]:
        notes.append(f"{len(series.skipped)} of {len(files)} files left out: {file.name}: {reason}")
    points, point_labels, problems = place_points(series, volume.affine, job["points"])
    meta = describe_series(series, job) | {
        **made_from,
        "uid": uid,
        "affine": volume.affine.tolist(),
        "spacing_mm": volume.spacing_mm,
        "num_points": len(job["points"]),
        "points_inside": int(common.is_inside(points, volume.voxels.shape).sum()),
        "notes": [hide_folders(note, files) for note in notes + problems],
        "doubts": volume.doubts,
    }
    sop_uids = {sop_uid for sop_uid, _ in series.geometry}
    try:
        common.save_volume(path, volume.voxels, points, point_labels, meta, sop_uids)
    except OSError as error:
        return error
    return "cached"


def hide_folders(text: str, files: list[Path]) -> str:
    """The text with the names of files, but not with where these lie: that may name a patient."""
    for folder in {path.parent for path in files}:
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def place_points(series: Series, affine: np.ndarray, points: list[list]) -> tuple:
    """Annotated points as voxels (P, 3) of the volume, their labels (P,), and a note for each point whose
    image is missing or does not reach so far."""
    places, labels, problems = [], [], []
    for sop_uid, x, y, frame, label in points:
        try:
            place = series.point(sop_uid, x, y, frame)
            image = series.geometry[sop_uid, frame or 0]
            is_in_image = 0 <= x <= image.cols and 0 <= y <= image.rows
            if not is_in_image:
                raise ValueError(f"({x:g}, {y:g}) lies outside of image {sop_uid}")
        except ValueError as error:
            problems.append(f"{LEFT_OUT}: {error}")
        else:
            places.append(place)
            labels.append(label)
    return dicom.to_voxel(np.array(places).reshape(-1, 3), affine), labels, problems


def describe_series(series: Series, job: dict) -> dict:
    """The index's columns that follow from the series; age and sex are the label table's where the files have
    none."""
    frame = series.frames[0]
    low, high = dicom.canonical_grid(series).extent_mm(0)
    slice_mm, row_mm, col_mm = (round(float(length), 4) for length in series.spacing_mm)
    years = common.parse_age(series.age or job["labels"].get("PatientAge"))
    sex = series.sex or str(job["labels"].get("PatientSex"))[:1]
    patient = ""
    if series.patient:
        patient = hmac.digest(job["key"], series.patient.encode(errors="surrogatepass"), "sha256").hex()[:12]
    return {
        "modality": series.modality,
        "plane": series.plane,
        "patient": patient,
        "age": "" if pd.isna(years) else int(years),
        "sex": sex if sex in ("F", "M") else "",
        "num_slices": len(series.frames),
        "rows": frame.rows,
        "cols": frame.cols,
        "slice_mm": slice_mm,
        "row_mm": row_mm,
        "col_mm": col_mm,
        "thickness_mm": round(frame.header.get("SliceThickness", 0), 4) or "",
        "coverage_mm": round(high - low, 2),  # along z
        "transfer_syntax": series.transfer_syntax,
    }


# --- the cache's folder -------------------------------------------------------------------------------------


def read_patient_key(dst: Path) -> bytes:
    """The random key of a cache, the same for all its shards: made by the first that comes."""
    path = dst / ".patient_key"
    with contextlib.suppress(FileExistsError), open(path, "xb") as file:
        file.write(secrets.token_bytes(32))
    for _ in range(50):  # the process that made it may not have written it yet
        if len(key := path.read_bytes()) == 32:
            return key
        time.sleep(0.1)
    raise ValueError(f"{path}: found {len(key)} bytes, expected 32; delete it and run again")


def read_cache(dst: Path, names: tuple | None = ()) -> tuple[dict[str, dict], list[str]]:
    """(uid -> metadata of the volumes in dst, a fault for each that differs from its sum or is of another
    series). The sums of tensors are checked where names is None."""
    cached, faults = {}, []
    paths = sorted(dst.glob("*.safetensors"))
    with common.progress(len(paths), desc="verify", show=names is None) as bar:
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


def record_outcome(job: dict, reason: str | None) -> None:
    """Log and write down why a series failed; a volume made from other files or with other settings goes.
    Without a reason the record of an earlier failure goes."""
    uid, dst = job["uid"], job["dst"]
    record = dst / f"{uid}.failed.txt"
    if reason:
        reason = hide_folders(reason, job["files"])
        log_shard(f"{uid}: failed: {reason}")
        write_atomic(record, reason.encode(errors="backslashreplace"))
        volume_path(dst, uid).unlink(missing_ok=True)
    else:
        record.unlink(missing_ok=True)


def build_index(dst: Path, cached: dict[str, dict]) -> tuple[pd.DataFrame, bytes]:
    """The index in the order of UIDs, from the folder's failures and the metadata of its volumes alone; and
    its CSV, where what is not UTF-8 in a file's name comes out as an escape such as \\udce4."""
    rows = {}
    for path in dst.glob("*.failed.txt"):
        with contextlib.suppress(FileNotFoundError):  # another process succeeded meanwhile
            reason = path.read_text(errors="replace")
            rows[path.name.removesuffix(".failed.txt")] = {"status": "failed", "reason": reason}
    for uid, meta in cached.items():
        reason, notes = "; ".join(meta["doubts"]), "; ".join(meta["notes"])
        status = "doubtful" if reason else "ok"
        rows[uid] = meta | {"status": status, "reason": reason, "notes": notes}
    index = pd.DataFrame.from_dict(rows, orient="index", dtype=object).sort_index()
    index = index.reindex(columns=INDEX_COLUMNS.split()).rename_axis(UID)
    return index, index.to_csv(lineterminator="\n").encode(errors="backslashreplace")


def write_index(dst: Path) -> pd.DataFrame:
    """Rebuild index.csv from the folder."""
    cached, faults = read_cache(dst)
    for fault in faults:
        log_shard(f"counts as missing: {fault}")
    index, text = build_index(dst, cached)
    write_atomic(dst / INDEX, text)
    return index


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def verify(dst: Path) -> int:
    """Compare every volume, the index and the label table with what they should be; exit code."""
    cached, faults = read_cache(dst, names=None)
    _, text = build_index(dst, cached)
    sums = {dst / INDEX: sha256(text)}
    if (dst / LABEL_SUM).is_file():
        sums[dst / LABEL_TABLE] = (dst / LABEL_SUM).read_text(errors="replace")
    for path, expected in sums.items():
        if not path.is_file() or sha256(path.read_bytes()) != expected:
            faults.append(f"{path}: missing, or differs from the folder; run preprocess.py again")
    for fault in faults:
        log(fault)
    log(f"{dst}: {len(cached)} volumes agree with their sums; {len(faults)} faults")
    return 3 if faults else 0


# --- the command --------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__, has_config=True, listed=[VolumeSettings])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--src", type=Path, metavar="DIR")
    task.add_argument("--verify", action="store_true")
    parser.add_argument("--dst", type=Path, metavar="DIR", required=True)
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", default=shard_of(os.environ))
    counts = {"workers": common.usable_cores(), "timeout": 600, "memory-gb": 4, "limit": None}
    for name, default in counts.items():
        parser.add_argument(
            f"--{name}", type=common.positive_int, metavar="N", default=default, help="default: %(default)s"
        )
    return parser.parse_args()


def parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N-1, for example 0/4")


def shard_of(environment: dict) -> str:
    """I/N of this process among those that torchrun, accelerate launch or a Slurm array from 0 started."""
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
        if index in environment and count in environment:
            return f"{environment[index]}/{environment[count]}"
    return "0/1"


def list_series(src: Path, dst: Path) -> dict[str, list[Path]]:
    """uid -> files below src; logs how many other files there are, and the first of them."""
    if src.resolve() == dst.resolve():
        raise ValueError(f"--dst {dst}: it is --src; expected a folder of its own for the volumes")
    series, strays = dicom.find_series(src, skip=dst) if src.is_dir() else ({}, [])
    if not series:
        raise ValueError(f"{src}: found no DICOM series; expected a folder with DICOM files at any depth")
    strays = [stray for stray in strays if stray[0].suffix != ".csv"]
    for path, reason in strays[:1]:
        log(f"{len(strays)} files left out; first {path}: {reason}")
    return series


def check_cache(args: argparse.Namespace, settings: dict, uids: list[str], points: dict) -> None:
    """Raises ValueError where this run would spoil what an earlier one made."""
    cached, _ = read_cache(args.dst)
    others = [meta["settings"] for meta in cached.values() if meta["settings"] != settings]
    if others:
        difference = common.describe_difference(others[0], settings)
        raise ValueError(
            f"{args.dst}: {len(others)} volumes have other settings: {difference}. Choose another --dst, or "
            f"delete these volumes to make them again"
        )
    if not points and any(cached[uid]["num_points"] for uid in uids if uid in cached):
        raise ValueError(
            f"{args.dst}: has annotated points, but there is no {POINT_TABLE} in {args.src} or above it; "
            f"expected it there, or the points would be lost"
        )


def preprocess(args: argparse.Namespace) -> int:
    """The run from tables to summary; exit code. Raises ValueError (input that cannot be right) and OSError
    (disk) for main."""
    cfg = common.load_config(args.config, args.set)
    labels_path, points_path = (find_table(args.src, name) for name in (LABEL_TABLE, POINT_TABLE))
    labels = read_labels(labels_path) if labels_path else {}
    points = read_points(points_path) if points_path else {}
    series = list_series(args.src, args.dst)
    shard, num_shards = args.shard
    uids = sorted(series)[: args.limit][shard::num_shards]
    if labels and not labels.keys() & series.keys():
        log_shard(f"none of the {len(series)} series is in {labels_path}: nothing to train on")
    args.dst.mkdir(parents=True, exist_ok=True)
    check_cache(args, volume_settings(cfg), uids, points)
    if labels_path:
        data = labels_path.read_bytes()
        write_atomic(args.dst / LABEL_TABLE, data)
        write_atomic(args.dst / LABEL_SUM, sha256(data).encode())
    shared = {"cfg": cfg, "dst": args.dst, "key": read_patient_key(args.dst)}
    jobs = [
        dict(shared, uid=uid, files=series[uid], points=points.get(uid, []), labels=labels.get(uid, {}))
        for uid in uids
    ]
    try:
        outcomes = run_jobs(jobs, args)
    finally:
        index = write_index(args.dst)
    summarise(index[index.index.isin(uids)])
    counts = f"{outcomes['cached']} cached, {outcomes['kept']} kept, {outcomes['failed']} failed"
    log_shard(f"{args.dst}: shard {shard} of {num_shards}: {len(uids)} series, {counts}")
    if not outcomes["failed"] or "RANK" in os.environ:
        return 0
    return 3 if outcomes["failed"] < len(jobs) else 1


def run_jobs(jobs: list[dict], args: argparse.Namespace) -> Counter:
    """Do all jobs in worker processes; how many ended as cached, kept or failed. OSError if the disk is
    full."""
    results = common.run_isolated(
        cache_series, jobs, workers=args.workers, timeout_s=args.timeout, memory_gb=args.memory_gb
    )
    outcomes = Counter()
    bar = common.progress(len(jobs), desc="preprocess", show=os.environ.get("RANK", "0") == "0")
    with bar, contextlib.closing(results):
        for job, outcome, reason in results:
            if isinstance(outcome, OSError):
                raise outcome
            record_outcome(job, reason)
            outcomes[outcome or "failed"] += 1
            bar.update()
    return outcomes


def summarise(index: pd.DataFrame) -> None:
    """Log what the index says of these series: how many of each kind, and the first."""
    inside, total = index["points_inside"].sum(), index["num_points"].sum()
    if total:
        log_shard(f"{inside:.0f} of {total:.0f} annotated points lie inside the volumes")
    notes = index["notes"].str.split("; ").explode().dropna()
    kinds = {
        "annotated points left out": notes[notes.str.startswith(LEFT_OUT)],
        "doubtful series": index.query("status == 'doubtful'")["reason"],
    }
    for kind, texts in kinds.items():
        if len(texts):
            log_shard(f"{len(texts)} {kind} in {INDEX}; first {texts.index[0]}: {texts.iloc[0]}")


def main() -> int:
    args = parse_arguments()

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        return verify(args.dst) if args.verify else preprocess(args)
    except (ValueError, OSError) as error:
        log_shard(f"preprocess.py: {error}")
        return 1
    except SystemExit as error:
        log_shard("preprocess.py: interrupted; what is finished is kept, run it again to go on")
        return error.code
    finally:
        common.remove_leftovers(args.dst)


if __name__ == "__main__":
    sys.exit(main())
