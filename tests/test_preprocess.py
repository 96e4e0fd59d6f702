"""preprocess.py as a user runs it: what it leaves behind, after kills, crashes, full disks and hostile input
too."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from phantom import make_set
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

import preprocess
from common import LABELS, Config, _host, load_volume, remove_leftovers, run_isolated, safe_uid, tensor_sum

SCRIPT = Path(preprocess.__file__)
SMALL = ["--set", "base_slices=8", "--set", "img_size=48"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "dicom"


def start(*arguments: object, env: dict | None = None, **options: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def preprocessed(src: Path, dst: Path, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    return run("--src", src, "--dst", dst, *SMALL, "--workers", 2, *arguments, **options)


def volumes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def index(folder: Path) -> dict[str, dict]:
    with open(folder / "index.csv", newline="") as file:
        return {row["SeriesInstanceUID"]: row for row in csv.DictReader(file)}


def without_seconds(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in index(folder).values()
    ]


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Six series of all modalities and planes, with labels and points."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_set(folder, series=6, seed=3, matrix=48)
    return folder


@pytest.fixture(scope="module")
def cached(phantoms, tmp_path_factory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("cache")
    result = preprocessed(phantoms, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return folder


@pytest.fixture
def cache(cached, tmp_path) -> Path:
    """A copy of the undisturbed run's cache."""
    return Path(shutil.copytree(cached, tmp_path / "cache"))


# --- what a run leaves --------------------------------------------------------------------------------------


def test_every_series_becomes_a_volume_and_a_row(phantoms, cached):
    uids = {path.name for path in (phantoms / "series").iterdir()}
    rows = index(cached)
    assert set(rows) == uids == {path.stem for path in cached.glob("*.safetensors")}
    assert tuple(next(iter(rows.values()))) == preprocess.INDEX_COLUMNS
    for uid, row in rows.items():
        tensors, meta = load_volume(cached / f"{uid}.safetensors")
        assert row["status"] == "ok"
        assert row["plane"] in ("axial", "coronal", "sagittal")
        assert float(row["seconds"]) > 0
        assert float(row["coverage_mm"]) > 50
        assert 18 <= int(row["age"]) <= 100
        assert tensors["volume"].shape == (8, 48, 48)
        assert tensors["volume"].dtype == np.uint8
        assert len(tensors["points"]) == len(tensors["point_labels"]) == int(row["num_points"])
        assert meta["sha256"] == tensor_sum(tensors)
        assert np.array(json.loads(meta["affine"])).shape == (4, 4)
        assert json.loads(meta["settings"])["img_size"] == 48
    assert (cached / "train.csv").read_bytes() == (phantoms / "train.csv").read_bytes()
    assert leftovers(cached) == []


def test_the_points_of_train_localizers_are_all_there(phantoms, cached):
    wanted = preprocess.read_points(phantoms / "train_localizers.csv")
    assert sum(map(len, wanted.values())) >= 2
    for uid, points in wanted.items():
        tensors, _ = load_volume(cached / f"{uid}.safetensors")
        assert sorted(tensors["point_labels"].tolist()) == sorted(label for *_, label in points)


def test_points_lie_on_the_aneurysms(tmp_path):
    """The same phantoms with and without aneurysms differ exactly where the points are."""
    cfg = Config(base_slices=80, img_size=100)
    for name, is_drawn in (("with", True), ("without", False)):
        make_set(tmp_path / name, series=6, seed=5, matrix=96, draw_aneurysms=is_drawn)
    checked = 0
    for uid, points in preprocess.read_points(tmp_path / "with" / "train_localizers.csv").items():
        for name in ("with", "without"):
            files = sorted((tmp_path / name / "series" / uid).iterdir())
            dst = tmp_path / f"cache_{name}"
            dst.mkdir(exist_ok=True)
            job = {"uid": uid, "files": files, "points": points, "source": "", "cfg": cfg, "dst": dst}
            preprocess.cache_series(job | {"age": "", "sex": ""})
        tensors, meta = load_volume(tmp_path / "cache_with" / f"{uid}.safetensors")
        plain, _ = load_volume(tmp_path / "cache_without" / f"{uid}.safetensors")
        assert meta["num_points"] == meta["points_inside"] == str(len(points))
        changed = np.abs(tensors["volume"].astype(int) - plain["volume"]).astype(float)
        spacing_mm = np.array(json.loads(meta["spacing_mm"]))
        places = np.moveaxis(np.indices(changed.shape), 0, -1) * spacing_mm
        for point in tensors["points"] * spacing_mm:
            near = changed * (np.linalg.norm(places - point, axis=-1) < 8)
            centre = (places * near[..., None]).sum(axis=(0, 1, 2)) / near.sum()
            assert np.linalg.norm(centre - point) < 2.5  # mm; a voxel is 2 mm, a pixel of the scan 2.3
            checked += 1
    assert checked >= 3


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as stop:
        preprocess.parse_arguments(["--help"])
    assert stop.value.code == 0
    assert preprocess.__doc__.strip() in capsys.readouterr().out


# --- running again ------------------------------------------------------------------------------------------


def test_finished_series_are_kept_and_changed_ones_done_again(phantoms, cache, tmp_path):
    src = Path(shutil.copytree(phantoms, tmp_path / "src"))
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    folder = max((src / "series").iterdir(), key=lambda folder: len(list(folder.iterdir())))
    sorted(folder.iterdir())[0].unlink()
    result = preprocessed(src, cache)
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert result.returncode == 0
    assert "1 series cached, 5 kept from before, 0 failed" in result.stderr
    assert {name for name in before if before[name] != after[name]} == {f"{folder.name}.safetensors"}
    expected = (cache / "index.csv").read_bytes()
    (cache / "index.csv").unlink()
    preprocess.write_index(cache)  # from the folder alone
    assert (cache / "index.csv").read_bytes() == expected


def test_other_settings_are_refused_or_made_again(phantoms, cache):
    before = volumes(cache)
    result = preprocessed(phantoms, cache, "--set", "roi_mm=180.0")
    assert result.returncode == 1
    assert "roi_mm 200.0 there, 180.0 now" in result.stderr
    assert "--overwrite" in result.stderr
    assert "Traceback" not in result.stderr
    assert volumes(cache) == before
    result = preprocessed(phantoms, cache, "--set", "roi_mm=180.0", "--overwrite")
    assert result.returncode == 0
    assert "6 series cached" in result.stderr
    assert all(before[name] != data for name, data in volumes(cache).items())


def test_shards_together_make_the_whole(phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    by_option = start("--src", phantoms, "--dst", dst, *SMALL, "--workers", 1, "--shard", "0/2")
    ranks = {"RANK": "1", "WORLD_SIZE": "2"}
    by_rank = start("--src", phantoms, "--dst", dst, *SMALL, "--workers", 1, env=ranks)
    for process in (by_option, by_rank):
        assert "3 series cached" in process.communicate(timeout=120)[1]
    assert volumes(dst) == volumes(cached)
    assert without_seconds(dst) == without_seconds(cached)


def test_ranks_come_from_the_environment():
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "2"}
    assert preprocess.shard_of({}) == (0, 1)
    assert preprocess.shard_of({"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    assert preprocess.shard_of({"SLURM_ARRAY_TASK_ID": "9", **array}) == (2, 3)
    with pytest.raises(ValueError, match="process 4 of 4"):
        preprocess.shard_of({"RANK": "4", "WORLD_SIZE": "4"})


def test_two_runs_on_one_cache_agree(phantoms, cached, tmp_path):
    arguments = ["--src", phantoms, "--dst", tmp_path / "cache", *SMALL, "--workers", 1]
    both = [start(*arguments), start(*arguments)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert volumes(tmp_path / "cache") == volumes(cached)
    assert without_seconds(tmp_path / "cache") == without_seconds(cached)
    assert leftovers(tmp_path / "cache") == []


# --- it must survive ----------------------------------------------------------------------------------------


LAUNCHER = """
import multiprocessing, os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import common, preprocess
context = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: context  # forked workers start at once; the rest is real
common._start_forkserver = lambda context: None
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
    """20 runs, each killed with its workers after up to the time that a whole one takes; their imports are
    shared."""
    dst, rng = tmp_path / "cache", np.random.default_rng(0)
    arguments = ["--src", phantoms, "--dst", dst, *SMALL, "--workers", 2]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, SCRIPT, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
        pid = launch()
        time.sleep(usual_s * rng.uniform(0.02, 0.8))
        while Path(f"/proc/{pid}").exists():
            with contextlib.suppress(ProcessLookupError):  # done, or not yet a group of its own
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.002)
        for path in dst.glob("*.safetensors"):
            tensors, meta = load_volume(path)
            assert meta["sha256"] == tensor_sum(tensors)
        counts.add(len(list(dst.glob("*.safetensors"))))
    launcher.communicate()
    assert len(counts) >= 3  # the kills came at differing moments
    assert preprocessed(phantoms, dst).returncode == 0
    assert volumes(dst) == volumes(cached)
    assert without_seconds(dst) == without_seconds(cached)
    assert leftovers(dst) == []


def test_workers_of_a_killed_run_finish_and_leave(phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    process = start("--src", phantoms, "--dst", dst, *SMALL, "--workers", 2)
    deadline = time.monotonic() + 60
    while not list(dst.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    assert volumes(dst).items() <= volumes(cached).items()
    assert leftovers(dst) == []


def descendants(pid: int) -> list[int]:
    """PIDs below pid, nearest first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def test_a_killed_worker_costs_its_series_alone(phantoms, tmp_path):
    src = Path(shutil.copytree(phantoms, tmp_path / "src"))
    slow = src / "series" / "1.2.3"
    slow.mkdir()
    for path in (src / "series").glob("*/*"):
        if path.parent != slow:
            for i in range(40):  # many files: time to hit the worker
                shutil.copy(path, slow / f"{path.parent.name[-6:]}_{path.name}_{i}")
    process = start("--src", src, "--dst", tmp_path / "cache", *SMALL, "--workers", 1)
    deadline = time.monotonic() + 60
    workers: list[int] = []
    while not workers and time.monotonic() < deadline:
        time.sleep(0.02)
        below = descendants(process.pid)
        parents = {pid: descendants(pid) for pid in below}
        workers = [child for children in parents.values() for child in children]
    time.sleep(0.3)
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    rows = index(tmp_path / "cache")
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert process.returncode == 3, err
    assert len(rows) == 7
    assert len(failed) == 1
    assert "killed by signal 9" in failed[0]["reason"]


def test_sigterm_is_clean(phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    process = start("--src", phantoms, "--dst", dst, *SMALL, "--workers", 1)
    deadline = time.monotonic() + 60
    while not list(dst.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=30)
    if process.returncode != 0:  # it may have been done by then
        assert process.returncode == 143
        assert "interrupted" in err
    assert "Traceback" not in err
    assert leftovers(dst) == []
    assert volumes(dst).items() <= volumes(cached).items()
    assert len(index(dst)) == len(volumes(dst))


def test_a_full_disk_is_one_line_and_keeps_what_is_done(phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    dst.mkdir()
    uid = sorted(path.name for path in (phantoms / "series").iterdir())[0]
    shutil.copy(cached / f"{uid}.safetensors", dst)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(dst)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        shutil.copy(cached / f"{uid}.safetensors", dst)
        result = preprocessed(phantoms, dst)
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert "Traceback" not in result.stderr
        assert leftovers(dst) == []
        kept = volumes(dst)
        assert kept.items() <= volumes(cached).items()
        assert f"{uid}.safetensors" in kept
    finally:
        subprocess.run(["umount", str(dst)], check=True)


def test_files_that_may_not_grow_are_one_line_too(phantoms, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    result = preprocessed(phantoms, tmp_path / "cache", preexec_fn=limit)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert leftovers(tmp_path / "cache") == []


def bomb(folder: Path) -> None:
    """A deflated CT image of 60,000 x 60,000 pixels in a small file."""
    folder.mkdir(parents=True)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = (
        "1.2.840.10008.5.1.4.1.1.2",
        "1.2.9",
        folder.name,
    )
    ds.Modality, ds.Rows, ds.Columns = "CT", 60_000, 60_000
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.PixelSpacing, ds.ImageOrientationPatient = [0.01, 0.01], [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [0, 0, 0]
    ds.PixelData = bytes(300_000_000)
    ds.save_as(folder / "bomb.dcm", enforce_file_format=True)


def test_hostile_and_broken_series_fail_alone_and_are_tried_again(phantoms, cached, tmp_path):
    src = Path(shutil.copytree(phantoms, tmp_path / "inner" / "src"))
    uid = sorted(path.name for path in (src / "series").iterdir())[2]
    good = Path(shutil.move(src / "series" / uid, tmp_path / "good"))
    (src / "series" / uid).mkdir()
    (src / "series" / uid / "image.dcm").write_bytes(b"this is no DICOM file" * 100)
    bomb(src / "series" / "1.2.777")
    escape = src / "elsewhere"
    escape.mkdir()
    ds = pydicom.dcmread(next(good.iterdir()))
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):
        ds.SeriesInstanceUID = "../../escaped"
    ds.save_as(escape / "image")
    (src / "segmentations").mkdir()
    shutil.copy(escape / "image", src / "segmentations" / "1.2.5.dcm")
    (src / "notes.txt").write_text("no image")
    before = {path for path in tmp_path.rglob("*") if path.is_relative_to(tmp_path / "inner")}

    dst = tmp_path / "inner" / "cache"
    result = preprocessed(src, dst, "--memory-gb", "0.5")
    rows = index(dst)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert "notes.txt: left out" in result.stderr
    assert "segmentations" not in result.stderr
    assert {uid: row["status"] for uid, row in rows.items() if row["status"] != "ok"} == {
        uid: "failed",
        "1.2.777": "failed",
    }
    assert rows[safe_uid("../../escaped")]["status"] == "ok"
    assert len(rows) == 8
    for failed in (uid, "1.2.777"):
        assert rows[failed]["reason"]
        assert f"{failed}: failed: {rows[failed]['reason']}" in result.stderr
        assert json.loads((dst / f"{failed}.failed.json").read_text())["reason"] == rows[failed]["reason"]
    new = {path for path in tmp_path.rglob("*") if not path.is_relative_to(dst)} - before
    assert new <= {tmp_path / "inner", good, *good.rglob("*")}  # nothing written outside

    shutil.rmtree(src / "series" / uid)
    shutil.copytree(good, src / "series" / uid)
    again = preprocessed(src, dst, "--memory-gb", "0.5")
    assert again.returncode == 3
    assert "1 series cached, 6 kept from before, 1 failed" in again.stderr
    assert index(dst)[uid]["status"] == "ok"
    assert not (dst / f"{uid}.failed.json").exists()
    assert volumes(dst).items() >= volumes(cached).items()


def test_mutated_files_end_as_volume_or_as_failure(phantoms, tmp_path):
    rng = np.random.default_rng(7)
    files = sorted((phantoms / "series").rglob("*.dcm"))
    for i in range(150):
        data = bytearray(files[rng.integers(len(files))].read_bytes())
        head = int(rng.choice([1500, len(data)]))
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(128, min(head, len(data))))] = int(rng.integers(256))
        if i % 5 == 0:
            del data[int(rng.integers(len(data))) :]
        folder = tmp_path / "src" / f"1.2.{i + 1}"
        folder.mkdir(parents=True)
        (folder / "image.dcm").write_bytes(data)
    result = preprocessed(tmp_path / "src", tmp_path / "cache", "--timeout", "20", "--memory-gb", "1")
    rows = index(tmp_path / "cache")
    assert result.returncode == 3, result.stderr[-2000:]
    assert len(rows) == 150
    assert all(row["reason"] for row in rows.values() if row["status"] == "failed")
    assert 20 < sum(row["status"] == "ok" for row in rows.values()) < 150
    assert preprocess.verify(tmp_path / "cache") == 0


# --- exit codes and complaints ------------------------------------------------------------------------------


def test_verify_names_a_damaged_volume(cache, tmp_path):
    assert preprocess.verify(cache) == 0
    victims = sorted(cache.glob("*.safetensors"))[:2]
    data = bytearray(victims[0].read_bytes())
    data[-1000] ^= 1
    victims[0].write_bytes(data)
    victims[1].write_bytes(victims[1].read_bytes()[:500])
    result = run("--verify", "--dst", cache)
    assert result.returncode == 3
    for path in victims:
        assert str(path) in result.stderr
    assert "4 of 6 volumes agree" in result.stderr
    (tmp_path / "empty").mkdir()
    assert preprocess.verify(tmp_path / "empty") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--dst", "{tmp}/c"], 2, "--src DIR is missing"),
        (["--src", "{tmp}/absent", "--dst", "{tmp}/c"], 2, "no such folder"),
        (["--src", "{tmp}", "--dst", "{tmp}/c", "--set", "bas_slices=3"], 2, "'base_slices'"),
        (["--src", "{tmp}", "--dst", "{tmp}/c", "--shard", "4/4"], 2, "expected I/N"),
        (["--src", "{tmp}", "--dst", "{tmp}/c"], 1, "found no DICOM series"),
    ],
)
def test_mistakes_are_one_line_with_their_exit_code(
    arguments, code, complaint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *(a.format(tmp=tmp_path) for a in arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        found = preprocess.main()
    except SystemExit as error:
        found = error.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    err = capsys.readouterr().err
    assert found == code
    assert complaint in err.strip().splitlines()[-1]


def test_faulty_tables_stop_the_run_before_work(phantoms, tmp_path):
    text = (phantoms / "train_localizers.csv").read_text()
    path = tmp_path / "train_localizers.csv"
    path.write_text(text.replace(next(name for name in LABELS if name in text), "Left Knee"))
    with pytest.raises(ValueError, match=r"train_localizers.csv: line \d+: unknown location 'Left Knee'"):
        preprocess.read_points(path)
    path.write_text(text.replace("{'x'", "{'u'", 1))
    with pytest.raises(ValueError, match=r"line 2: coordinates .* expected \{'x': 258.4"):
        preprocess.read_points(path)
    labels = (phantoms / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(labels.replace("CTA", "PET").replace("Basilar Tip", "Basilar"))
    with pytest.raises(ValueError, match="no column 'Basilar Tip'"):
        preprocess.read_labels(tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text(labels.replace("MRA", "PET"))
    with pytest.raises(ValueError, match="Modality 'PET'"):
        preprocess.read_labels(tmp_path / "train.csv")


def test_series_without_files_and_points_without_images_are_told(phantoms, tmp_path):
    src = Path(shutil.copytree(phantoms, tmp_path / "src"))
    points = preprocess.read_points(src / "train_localizers.csv")
    gone = next(path for path in (src / "series").iterdir() if path.name not in points)
    shutil.rmtree(gone)
    uid, (point, *_) = next(iter(points.items()))
    table = (src / "train_localizers.csv").read_text()
    (src / "train_localizers.csv").write_text(table.replace(point[0], "1.2.3.4.5"))
    result = preprocessed(src, tmp_path / "cache")
    assert result.returncode == 0
    assert f"1 series of train.csv have no files: {gone.name}" in result.stderr
    row = index(tmp_path / "cache")[uid]
    assert "point left out" in row["notes"] and int(row["num_points"]) > int(row["points_inside"])
    (src / "train_localizers.csv").unlink()
    before = volumes(tmp_path / "cache")
    result = preprocessed(src, tmp_path / "cache")
    assert (
        result.returncode == 1 and "has annotated points, but there is no train_localizers" in result.stderr
    )
    assert volumes(tmp_path / "cache") == before


def test_under_a_launcher_a_failed_series_does_not_stop_the_other_shards(phantoms, tmp_path):
    src, ranks = tmp_path / "src", {"RANK": "0", "WORLD_SIZE": "2"}
    for path in sorted((phantoms / "series").iterdir())[:4]:
        shutil.copytree(path, src / path.name)
    for path in (src / min(os.listdir(src))).iterdir():
        path.write_bytes(b"broken")
    assert preprocessed(src, tmp_path / "cache", env=ranks).returncode == 0
    assert [row["status"] for row in index(tmp_path / "cache").values()] == ["failed", "ok"]
    result = preprocessed(src, tmp_path / "cache", "--shard", "0/2")
    assert result.returncode == 3 and "shard 0 of 2: 0 series cached, 1 kept" in result.stderr


def test_ages_are_whole_years():
    assert [preprocess.years(age) for age in ("063Y", "018M", "***", "", "000Y")] == ["63", "1", "", "", "0"]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real series in shared/dicom")
def test_real_series_are_cached_or_named(tmp_path):
    result = run("--src", REAL, "--dst", tmp_path / "cache", *SMALL, "--workers", 2)
    rows = index(tmp_path / "cache")
    assert result.returncode == 3
    assert len(rows) >= 40
    assert sum(row["status"] == "ok" for row in rows.values()) >= 35
    assert all(row["reason"] for row in rows.values() if row["status"] == "failed")
    assert "Traceback" not in result.stderr


# --- isolated workers ---------------------------------------------------------------------------------------


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
    found = {item: (result, reason) for item, result, reason in answers}
    assert list(found.keys()) != []
    assert set(found) == set(items)
    for item in "abcd":
        assert found[item] == (item.upper(), None)
    reasons = {item: reason for item, (result, reason) in found.items() if result is None}
    assert "killed by signal 9" in reasons["dies"]
    assert "killed by signal 6" in reasons["aborts"]
    assert reasons["hangs"] == "took longer than 1.5 s"
    assert reasons["eats"] == "needs more than 1 GB of memory"
    assert reasons["raises"] == "two lines"
    assert reasons["panics"] == "BaseException: not an Exception"


def test_a_closed_run_leaves_no_process():
    answers = run_isolated(misbehave, ["a", "hangs", "hangs", "b"], workers=3, timeout_s=60, memory_gb=1)
    assert next(answers)[1] is not None
    before = set(descendants(os.getpid()))
    answers.close()
    time.sleep(0.2)
    assert len(set(descendants(os.getpid()))) <= len(before) - 2


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    dead = tmp_path / f".1.2.3.safetensors.{_host()}.{child.pid}.tmp"
    alive = tmp_path / f".1.2.4.safetensors.{_host()}.{os.getpid()}.tmp"
    foreign = tmp_path / ".1.2.5.safetensors.elsewhere.1.tmp"
    old = tmp_path / ".1.2.6.safetensors.elsewhere.1.tmp"
    for path in (dead, alive, foreign, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, foreign.name}


def test_settings_of_the_volume_are_all_compared_and_so_is_the_codes_version():
    names = "base_slices img_size roi_mm roi_top_mm slab_mode ct_window mr_percentiles volume_version"
    assert set(preprocess.volume_settings(Config())) == set(names.split())
