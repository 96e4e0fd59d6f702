"""preprocess.py as a user runs it: what it leaves behind, also after kills, full disks and hostile input."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from phantom import make_set
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_find_series import write_slice

import dicom
import preprocess
from common import LABELS, UID, Config, host_name, load_volume, remove_leftovers, run_isolated, save_volume
from dicom import VolumeSettings, find_series

SCRIPT = Path(preprocess.__file__)
SMALL = ["--set", "base_slices=8", "--set", "img_size=48"]
KEY = bytes(range(32))


def arguments_for(src: Path, dst: Path, *arguments: object) -> list[str]:
    """Of a run on a cache whose key is KEY, so that two caches can be compared."""
    dst.mkdir(parents=True, exist_ok=True)
    (dst / ".patient_key").write_bytes(KEY)
    return [*map(str, ["--src", src, "--dst", dst, *SMALL, "--workers", 2, *arguments])]


def start(*command: str, env: dict | None = None, **options: object) -> subprocess.Popen:
    """The script as a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen([sys.executable, str(SCRIPT), *command], **options)


def run(*command: str, **environment: str) -> tuple[int, str]:
    """(exit code, stderr) of a run in this process, which is faster."""
    err = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["preprocess.py", *command])
    ranks = mock.patch.dict(os.environ, environment)
    with argv, ranks, mock.patch.object(signal, "signal"), contextlib.redirect_stderr(err):
        try:
            code = preprocess.main()
        except SystemExit as error:
            code = error.code
    return code, err.getvalue()


def preprocessed(src: Path, dst: Path, *arguments: object, **environment: str) -> tuple[int, str]:
    return run(*arguments_for(src, dst, *arguments), **environment)


def volumes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def index(folder: Path) -> dict[str, dict]:
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        return {row[UID]: row for row in csv.DictReader(file)}


def cache_alone(uid: str, files: list[Path], dst: Path, cfg: Config, points: list = ()) -> Path:
    """The volume that cache_series makes of these files."""
    dst.mkdir(exist_ok=True)
    job = {"uid": uid, "files": files, "points": list(points), "labels": {}}
    assert preprocess.cache_series(job | {"cfg": cfg, "dst": dst, "key": KEY}) == "cached"
    return dst / f"{uid}.safetensors"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Six series of all modalities and planes, with labels and points."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_set(folder, series=6, seed=3, matrix=48)
    return folder


@pytest.fixture(scope="module")
def cached(phantoms, tmp_path_factory) -> Path:
    """An undisturbed run of the script."""
    folder = tmp_path_factory.mktemp("cache")
    process = start(*arguments_for(phantoms, folder))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    return folder


@pytest.fixture
def cache(cached, tmp_path) -> Path:
    """A copy of the undisturbed run's cache."""
    return Path(shutil.copytree(cached, tmp_path / "cache"))


@pytest.fixture
def src(phantoms, tmp_path) -> Path:
    """A copy of the phantoms."""
    return Path(shutil.copytree(phantoms, tmp_path / "src"))


def test_every_series_becomes_a_volume_and_a_row(phantoms, cached):
    uids, rows = set(os.listdir(phantoms / "series")), index(cached)
    points = preprocess.read_points(phantoms / "train_localizers.csv")
    assert sum(map(len, points.values())) >= 2
    assert set(rows) == uids == {path.stem for path in cached.glob("*.safetensors")}
    assert list(next(iter(rows.values()))) == preprocess.INDEX_COLUMNS
    for uid, row in rows.items():
        tensors, meta = load_volume(cached / f"{uid}.safetensors")
        assert row["status"] == "ok" and row["plane"] in ("axial", "coronal", "sagittal")
        assert float(row["coverage_mm"]) > 50 and 18 <= int(row["age"]) <= 100 and row["sex"] in "FM"
        assert tensors["volume"].shape == (8, 48, 48) and tensors["volume"].dtype == np.uint8
        assert sorted(tensors["point_labels"]) == sorted(label for *_, label in points.get(uid, []))
        assert len(tensors["points"]) == int(row["num_points"]) == int(row["points_inside"])
        assert np.array(meta["affine"]).shape == (4, 4) and meta["settings"]["img_size"] == 48
    assert (cached / "train.csv").read_bytes() == (phantoms / "train.csv").read_bytes()
    assert not list(cached.glob(".*.tmp"))


def test_points_lie_on_the_aneurysms(tmp_path):
    """The same phantoms with and without aneurysms differ exactly where the points are."""
    cfg = Config(volume=VolumeSettings(base_slices=80, img_size=100))
    for name, is_drawn in (("with", True), ("without", False)):
        make_set(tmp_path / name, series=6, seed=5, matrix=96, draw_aneurysms=is_drawn)
    num_checked = 0
    for uid, points in preprocess.read_points(tmp_path / "with" / "train_localizers.csv").items():
        files = {name: sorted((tmp_path / name / "series" / uid).iterdir()) for name in ("with", "without")}
        tensors, meta = load_volume(cache_alone(uid, files["with"], tmp_path / "a", cfg, points))
        plain, _ = load_volume(cache_alone(uid, files["without"], tmp_path / "b", cfg, points))
        changed = np.abs(tensors["volume"].astype(int) - plain["volume"]).astype(float)
        spacing_mm = np.array(meta["spacing_mm"])
        places = np.moveaxis(np.indices(changed.shape), 0, -1) * spacing_mm
        for point in tensors["points"] * spacing_mm:
            near = changed * (np.linalg.norm(places - point, axis=-1) < 8)
            centre = (places * near[..., None]).sum(axis=(0, 1, 2)) / near.sum()
            assert np.linalg.norm(centre - point) < 2.5  # mm; a voxel is 2 mm, a pixel of the scan 2.3
            num_checked += 1
    assert num_checked >= 3


def test_patients_are_hidden_by_the_caches_key_and_folders_are_not_named(tmp_path):
    files = [write_slice(tmp_path / "Jane Doe" / f"{z}", z, PatientID="MRN 1") for z in range(4)]
    files[0].write_bytes(files[0].read_bytes()[:-9])
    path = cache_alone("1.2.3.4", files, tmp_path / "cache", Config())
    _, meta = load_volume(path)
    assert meta["patient"] == "eba9739693ba"  # openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...
    assert "1 of 4 files left out: 0: truncated" in "; ".join(meta["notes"])
    assert b"MRN 1" not in path.read_bytes() and b"Jane Doe" not in path.read_bytes()
    keys = [preprocess.read_patient_key(tmp_path / name) for name in ("cache", "cache", "Jane Doe")]
    assert keys[0] == keys[1] != keys[2] and len(keys[0]) == 32
    (tmp_path / "cache" / ".patient_key").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.patient_key: found 0 bytes, expected 32; delete it"):
        preprocess.read_patient_key(tmp_path / "cache")


def test_doubts_make_a_series_doubtful_in_index_and_summary(tmp_path, monkeypatch, capsys):
    def make_doubtful(*arguments: object) -> dicom.Volume:
        return replace(dicom.make_volume(*arguments), notes=["a note"], doubts=["67 % white", "no air"])

    monkeypatch.setattr(preprocess, "make_volume", make_doubtful)
    files = [write_slice(tmp_path / "src" / f"{z}", z) for z in range(4)]
    cache_alone("1.2.3.4", files, tmp_path / "cache", Config())
    preprocess.summarise(preprocess.write_index(tmp_path / "cache"))
    row = index(tmp_path / "cache")["1.2.3.4"]
    assert (row["status"], row["reason"], row["notes"]) == ("doubtful", "67 % white; no air", "a note")
    assert "1.2.3.4: doubtful: 67 % white; no air" in capsys.readouterr().err


def test_a_folder_without_permission_costs_its_series(src, tmp_path, monkeypatch):
    closed = src / "series" / "1.2.77"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    code, err = preprocessed(src, tmp_path / "cache")
    rows = index(tmp_path / "cache")
    assert code == 3 and "1.2.77: failed: " in err
    assert [uid for uid, row in rows.items() if row["status"] == "failed"] == ["1.2.77"] and len(rows) == 7


def test_names_that_are_not_utf8_and_foreign_files_do_no_harm(src, tmp_path):
    folder = next((src / "series").iterdir())
    for name in (folder / "Bericht_Fran\udce7ois.txt", src / "B\udce4r.txt"):
        name.write_bytes(b"report")
    write_slice(src / "series" / "1.2.3.4" / "a").rename(src / "series" / "1.2.3.4" / "\udce4")
    (src / "series" / "1.2.3.4").rename(src / "series" / "M\udcfcller")
    (src / "index.csv").write_text("a,b\n1,2\n")
    (folder / "mask.safetensors").write_bytes(b"not ours")
    for expected in ("7 series, 7 cached, 0 kept, 0 failed", "7 series, 0 cached, 7 kept, 0 failed"):
        process = start(*arguments_for(src, tmp_path / "cache"))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and expected in err and r"B\udce4r.txt: not DICOM" in err
    rows = index(tmp_path / "cache")
    assert len(rows) == 7 and r"Bericht_Fran\udce7ois.txt" in rows[folder.name]["notes"]


# --- running again ------------------------------------------------------------------------------------------


def test_finished_series_are_kept_and_changed_ones_done_again(src, cache):
    for path in src.rglob("*.dcm"):
        os.utime(path, (0, 0))  # the place and the times have changed; that alone counts for nothing
    folders = sorted((src / "series").iterdir(), key=lambda folder: -len(list(folder.iterdir())))
    sorted(folders[0].iterdir())[0].unlink()
    flip_bit(sorted(folders[1].iterdir())[1], 0.5)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    code, err = preprocessed(src, cache)
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert code == 0 and "6 series, 2 cached, 4 kept, 0 failed" in err
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{folder.name}.safetensors" for folder in folders[:2]}
    expected = (cache / "index.csv").read_bytes()
    (cache / "index.csv").unlink()
    preprocess.write_index(cache)  # from the folder alone
    assert (cache / "index.csv").read_bytes() == expected


def test_other_settings_are_refused_or_made_again(phantoms, cache):
    before = volumes(cache)
    code, err = preprocessed(phantoms, cache, "--set", "roi_mm=180.0")
    assert code == 1 and "6 volumes have other settings: roi_mm 200.0 (expected 180.0)" in err
    assert "--overwrite" in err and volumes(cache) == before
    code, err = preprocessed(phantoms, cache, "--set", "roi_mm=180.0", "--overwrite")
    assert code == 0 and "6 series, 6 cached" in err
    assert all(before[name] != data for name, data in volumes(cache).items())


def test_shards_and_runs_that_meet_on_one_cache_make_the_same(phantoms, cached, tmp_path):
    command = arguments_for(phantoms, tmp_path / "cache", "--workers", 1)
    ranks = {"RANK": "1", "WORLD_SIZE": "2"}
    processes = [start(*command, "--shard", "0/2"), start(*command, env=ranks), start(*command)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert "shard 0 of 2: 3 series" in errors[0] and "shard 1 of 2: 3 series" in errors[1]
    assert volumes(tmp_path / "cache") == volumes(cached) and index(tmp_path / "cache") == index(cached)
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_limited_run_takes_the_first_series_and_says_that_labels_are_missing(phantoms, tmp_path):
    src = Path(shutil.copytree(phantoms / "series", tmp_path / "some" / "series"))
    code, err = preprocessed(src, tmp_path / "cache", "--limit", 2)
    assert code == 0 and f"no labels: no train.csv in {src} or above it" in err
    assert set(index(tmp_path / "cache")) == set(sorted(os.listdir(src))[:2])


def test_ranks_come_from_the_environment():
    array = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}
    steps = {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "2"}  # the array's tasks are 5, 7, 9
    environments = ({}, {"RANK": "2", "WORLD_SIZE": "4"}, array | steps)
    assert [preprocess.shard_of(variables) for variables in environments] == ["0/1", "2/4", "2/3"]


# --- it must survive ----------------------------------------------------------------------------------------


LAUNCHER = """
import multiprocessing, os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import common, preprocess
context = multiprocessing.get_context("fork")
common.start_forkserver = lambda: context  # forked workers start at once; the rest is real
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
sys.argv = sys.argv[1:]
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os._exit(preprocess.main())
    print(pid, flush=True)
"""


def test_twenty_kills_leave_no_trace(phantoms, cached, tmp_path):
    """20 runs, each killed with its workers after up to the time that an undisturbed one takes; their imports
    are shared."""
    dst, rng = tmp_path / "cache", np.random.default_rng(0)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, SCRIPT, *arguments_for(phantoms, dst)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def launch() -> int:
        launcher.stdin.write("\n")
        launcher.stdin.flush()
        return int(launcher.stdout.readline())

    pid, begin = launch(), time.monotonic()
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.005)
    usual_s = time.monotonic() - begin
    assert volumes(dst) == volumes(cached)
    counts = set()
    for i in range(20):
        if i % 3 == 0:  # else the later runs would find nothing to do
            shutil.rmtree(dst)
            arguments_for(phantoms, dst)
        pid = launch()
        time.sleep(usual_s * rng.uniform(0.02, 0.8))
        while Path(f"/proc/{pid}").exists():
            with contextlib.suppress(ProcessLookupError):  # done, or not yet a group of its own
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.002)
        for path in dst.glob("*.safetensors"):
            load_volume(path)  # ValueError if it differs from its sums
        counts.add(len(list(dst.glob("*.safetensors"))))
    launcher.communicate()
    assert len(counts) >= 3  # the kills came at differing moments
    assert preprocessed(phantoms, dst)[0] == 0
    assert volumes(dst) == volumes(cached) and index(dst) == index(cached)
    assert not list(dst.glob(".*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_says_so_in_one_line(number, code, phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    process = start(*arguments_for(phantoms, dst, "--workers", 1))
    while not volumes(dst) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if process.returncode != 0:  # it may have been done by then
        assert process.returncode == code
        assert err.strip().splitlines()[-1].startswith("preprocess.py: interrupted")
    assert "Traceback" not in err and not list(dst.glob(".*.tmp"))
    assert volumes(dst).items() <= volumes(cached).items()
    assert len(index(dst)) == len(volumes(dst))


def test_a_full_disk_is_one_line_that_names_the_file(phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    dst.mkdir()
    volume = cached / f"{min(os.listdir(phantoms / 'series'))}.safetensors"
    command = f"mount -t tmpfs -o size=60k none {dst}".split()
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        shutil.copy(volume, dst)
        code, err = preprocessed(phantoms, dst)
        assert code == 1 and f"No space left on device: '{dst}/" in err.splitlines()[-1]
        assert volumes(dst).items() <= volumes(cached).items() and volume.name in volumes(dst)
        assert not list(dst.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(dst)], check=True)


def test_broken_series_fail_alone_and_are_tried_again(src, phantoms, cached, tmp_path):
    uid = sorted(os.listdir(src / "series"))[2]
    for path in (src / "series" / uid).iterdir():
        path.write_bytes(b"this is not a DICOM file" * 100)
    tags = {"Rows": 60_000, "Columns": 60_000, "PixelData": bytes(300_000_000)}
    bomb = src / "series" / "1.2.777" / "bomb.dcm"
    write_slice(bomb, syntax=DeflatedExplicitVRLittleEndian, SeriesInstanceUID="1.2.777", **tags)
    before, dst = set(tmp_path.rglob("*")), tmp_path / "cache"
    code, err = preprocessed(src, dst, "--memory-gb", "0.5")
    rows = index(dst)
    assert code == 3 and len(rows) == 7 and "Traceback" not in err
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {uid, "1.2.777"}
    for failed in (uid, "1.2.777"):
        assert rows[failed]["reason"] and f"{failed}: failed: {rows[failed]['reason']}" in err
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(dst)} == before

    shutil.copytree(phantoms / "series" / uid, src / "series" / uid, dirs_exist_ok=True)
    code, err = preprocessed(src, dst, "--memory-gb", "0.5")
    assert code == 3 and "7 series, 1 cached, 5 kept, 1 failed" in err
    code, err = preprocessed(src, dst, "--memory-gb", "0.5", RANK="0", WORLD_SIZE="2")
    assert code == 0 and "a launcher would stop the other" in err
    assert [path.name for path in dst.glob("*.failed.txt")] == ["1.2.777.failed.txt"]
    assert volumes(dst) == volumes(cached)


def test_mutated_files_end_as_volume_or_as_failure(phantoms, tmp_path):
    rng = np.random.default_rng(7)
    files = sorted((phantoms / "series").rglob("*.dcm"))
    for i in range(150):
        data = bytearray(files[rng.integers(len(files))].read_bytes())
        end = rng.choice([1500, len(data)])
        for position in rng.integers(128, min(end, len(data)), size=rng.integers(1, 6)):
            data[position] = rng.integers(256)
        folder = tmp_path / "src" / f"patient{i}"
        folder.mkdir(parents=True)
        (folder / "image.dcm").write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
    series, rejected = find_series(tmp_path / "src")
    assert sum(map(len, series.values())) + len(rejected) == 150 and len(rejected) < 10
    code, _ = preprocessed(tmp_path / "src", tmp_path / "cache", "--timeout", "20", "--memory-gb", "1")
    rows = index(tmp_path / "cache")
    assert code == 3 and set(rows) == set(series)
    assert all(row["reason"] for row in rows.values() if row["status"] != "ok")
    assert sum(row["status"] == "ok" for row in rows.values()) >= 6
    assert run("--verify", "--dst", str(tmp_path / "cache"))[0] == 0


# --- exit codes and complaints ------------------------------------------------------------------------------


def flip_bit(path: Path, share: float) -> None:
    """Of the byte that lies at this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)


def shrink(path: Path) -> None:
    """A volume of another shape than its settings say, with right sums."""
    tensors, meta = load_volume(path)
    save_volume(path, tensors["volume"][:4], tensors["points"], tensors["point_labels"], meta)


DAMAGE = {  # what --verify says -> what happened to the volumes a and b of a cache
    "volume differs from its sum": lambda cache, a, b: flip_bit(a, 0.7),
    "not a readable volume": lambda cache, a, b: os.truncate(a, 500),
    "holds series": lambda cache, a, b: shutil.copy(a, b),
    "shape (4, 48, 48), expected (8, 48, 48)": lambda cache, a, b: shrink(a),
    "differs from the folder": lambda cache, a, b: a.unlink(),
    "differs from the folder;": lambda cache, a, b: flip_bit(cache / "index.csv", 0.5),
    "differs from train.csv.sha256": lambda cache, a, b: flip_bit(cache / "train.csv", 0.9),
    "train.csv: differs from train.csv.sha256": lambda cache, a, b: (cache / "train.csv").unlink(),
}


@pytest.mark.parametrize("complaint", DAMAGE)
def test_verify_names_what_is_damaged_and_the_next_run_heals_it(complaint, phantoms, cached, cache):
    assert run("--verify", "--dst", str(cache))[0] == 0
    DAMAGE[complaint](cache, *sorted(cache.glob("*.safetensors"))[:2])
    code, err = run("--verify", "--dst", str(cache))
    assert code == 3 and complaint in err
    assert preprocessed(phantoms, cache)[0] == 0
    assert run("--verify", "--dst", str(cache))[0] == 0
    assert volumes(cache) == volumes(cached)
    assert (cache / "train.csv").read_bytes() == (cached / "train.csv").read_bytes()


@pytest.mark.parametrize(
    ("command", "code", "complaint"),
    [
        ("--dst {tmp}/c", 2, "--src DIR is missing"),
        ("--src {tmp}/absent --dst {tmp}/c", 2, "absent: no such folder"),
        ("--src {tmp} --dst {tmp}/c --set bas_slices=3", 2, "'base_slices'"),
        ("--src {tmp} --dst {tmp}/c --shard 4/4", 2, "'4/4': expected I/N"),
        ("--src {tmp} --dst {tmp}/c --limit 0", 2, "expected more than 0"),
        ("--src {tmp} --dst {tmp}/c", 1, "found no DICOM series"),
        ("--verify --dst {tmp}", 1, "no volumes to verify"),
    ],
)
def test_mistakes_are_one_line_with_their_exit_code(command, code, complaint, tmp_path):
    returned, err = run(*command.format(tmp=tmp_path).split())
    assert returned == code and complaint in err.strip().splitlines()[-1]


HOSTILE = ["{'x': 1e999, 'y': 3}", "{'x': 1, 'y': nan}", "{'x': 1, 'y': 2, 'f': " + "9" * 400 + "}", "[1, 2]"]
HOSTILE += [str(list(range(6_000_000))), "-" * 3000 + "1", "(" * 199, "{'u': 1}", "", "{'x': 7e4, 'y': 1}"]
HOSTILE += ["{'x': 1, 'y': 2, 'f': -1}", "{'x': 1, 'y': 2, 'f': 1e999}", "__import__('os')"]


def test_bad_coordinates_are_one_line_with_their_number_in_bounded_time(tmp_path):
    path = tmp_path / "points.csv"
    for coordinates in HOSTILE:
        rows = [["1.2", "1.2.3", place, LABELS[3]] for place in ("{'x': 1.5, 'y': 2}", coordinates)]
        columns = [UID, "SOPInstanceUID", "coordinates", "location"]
        pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
        begin = time.monotonic()
        with pytest.raises(
            ValueError, match=r"points.csv: 1 faults: line 3: coordinates .* expected"
        ) as error:
            preprocess.read_points(path)
        assert time.monotonic() - begin < 10
        assert len(str(error.value)) < 300 + len(str(path)) and "\n" not in str(error.value)


def test_faulty_tables_stop_the_run_before_work(src, tmp_path):
    points, labels = src / "train_localizers.csv", src / "train.csv"
    location = points.read_text().split(",")[-1].strip()
    changes = [(labels, "MRA", "PET", "'PET'"), (points, "location", "place", "columns missing: 'location'")]
    changes.append((points, location, "Left Knee", "unknown location 'Left Knee'"))
    for path, before, after, complaint in changes:
        text = path.read_text()
        path.write_text(text.replace(before, after))
        code, err = preprocessed(src, tmp_path / "cache")
        assert code == 1 and str(path) in err.splitlines()[-1] and complaint in err.splitlines()[-1]
        assert volumes(tmp_path / "cache") == {}
        path.write_text(text)


def test_series_without_files_and_points_without_images_are_told(src, tmp_path):
    points = preprocess.read_points(src / "train_localizers.csv")
    gone = next(path for path in (src / "series").iterdir() if path.name not in points)
    shutil.rmtree(gone)
    uid, (point, *_) = next(iter(points.items()))
    table = (src / "train_localizers.csv").read_text()
    (src / "train_localizers.csv").write_text(table.replace(point[0], "1.2.3.4.5"))
    code, err = preprocessed(src, tmp_path / "cache")
    assert code == 0 and f"1 series of train.csv have no files: {gone.name}" in err
    row = index(tmp_path / "cache")[uid]
    assert "point left out" in row["notes"] and int(row["num_points"]) > int(row["points_inside"])
    (src / "train_localizers.csv").unlink()
    before = volumes(tmp_path / "cache")
    code, err = preprocessed(src, tmp_path / "cache")
    assert code == 1 and "has annotated points, but there is no train_localizers" in err
    assert volumes(tmp_path / "cache") == before


def misbehave(item: str) -> str:
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "aborts":
        os.abort()
    if item == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if item == "eats":
        return str(len(np.ones(3 * 2**30, np.uint8)))
    if item == "raises":
        raise ValueError("two\n  lines")
    if item == "panics":
        raise BaseException("not an Exception")
    return item.upper()


def test_a_bad_item_costs_only_itself():
    items = ["a", "dies", "b", "aborts", "hangs", "c", "eats", "raises", "panics", "d"]
    answers = run_isolated(misbehave, iter(items), workers=2, timeout_s=1.5, memory_gb=1)
    outcomes = {item: result or reason for item, result, reason in answers}
    assert len(outcomes) == len(items) and [outcomes[item] for item in "abcd"] == ["A", "B", "C", "D"]
    assert "killed by signal 9" in outcomes["dies"] and "killed by signal 6" in outcomes["aborts"]
    assert outcomes["hangs"] == "took longer than 1.5 s"
    assert outcomes["eats"] == "needs more than 1 GB of memory"
    assert (outcomes["raises"], outcomes["panics"]) == ("two lines", "BaseException: not an Exception")


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    dead, alive = (f".1.{pid}.safetensors.{host_name()}.{pid}.tmp" for pid in (child.pid, os.getpid()))
    foreign, old = (f".1.{k}.safetensors.elsewhere.1.tmp" for k in (1, 2))
    for name in (dead, alive, foreign, old):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / old, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive, foreign}
