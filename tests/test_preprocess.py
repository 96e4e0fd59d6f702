"""preprocess.py as a user runs it: what it leaves behind, also after kills, full disks and hostile input."""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from conftest import expect_refusal, flip_bit
from phantom import make_set
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_find_series import write_slice

import common
import dicom
import frames
import preprocess
from common import HOST, LABELS, UID, Config, load_volume, remove_leftovers, run_isolated
from dicom import VolumeSettings
from preprocess import read_patient_key, read_points

SMALL = ["--set", "base_slices=8", "--set", "img_size=48"]
KEY = bytes(range(32))
POINT = [UID, "SOPInstanceUID", "coordinates", "location"]
HOSTILE = ["{'x': 1, 'y': nan}", "[1, 2]", "{'u': 1}", "", "(" * 199, "-" * 3000 + "1", "__import__('os')"]
HOSTILE += ["{'x': 1, 'y': 2, 'f': 1e999}", str(list(range(6_000_000)))]


def arguments_for(src: Path, dst: Path, *arguments: object) -> list[str]:
    """Of a run on a cache whose key is KEY, so that two caches can be compared."""
    dst.mkdir(parents=True, exist_ok=True)
    (dst / ".patient_key").write_bytes(KEY)
    return [*map(str, ["--src", src, "--dst", dst, *SMALL, "--workers", 2, *arguments])]


def start(src: Path, dst: Path, *arguments: object, **environment: str) -> subprocess.Popen:
    """The script as a process of its own, in a group with its workers."""
    command = [sys.executable, preprocess.__file__, *arguments_for(src, dst, *arguments)]
    options = {"text": True, "start_new_session": True, "env": os.environ | environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*command: str, code: int = 0, **environment: str) -> str:
    """stderr of a run in this process, which is faster, and must end with this exit code."""
    err, argv = io.StringIO(), mock.patch.object(sys, "argv", ["preprocess.py", *command])
    ranks, signals = mock.patch.dict(os.environ, environment), mock.patch.object(signal, "signal")
    with argv, ranks, signals, contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        sys.exit(preprocess.main())
    assert ended.value.code == code, err.getvalue()
    return err.getvalue()


def run_on(src: Path, dst: Path, *arguments: object, code: int = 0, **environment: str) -> str:
    return run(*arguments_for(src, dst, *arguments), code=code, **environment)


def contents(folder: Path, pattern: str = "*.safetensors") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def index(folder: Path) -> dict[str, dict]:
    return pd.read_csv(folder / "index.csv", dtype=str, na_filter=False, index_col=UID).to_dict("index")


def cache_alone(uid: str, files: list[Path], dst: Path, cfg: Config, points: list = ()) -> Path:
    dst.mkdir(exist_ok=True)
    (dst / ".patient_key").write_bytes(KEY)
    assert preprocess.cache_series(preprocess.Job(uid, files, list(points), {}, {dst: cfg})) == ["cached"]
    return dst / f"{uid}.safetensors"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Six series of all modalities and planes, with labels and points."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_set(folder, series=6, seed=3, matrix=48)
    return folder


@pytest.fixture(scope="module")
def cached(phantoms, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    process = start(phantoms, folder)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    return folder


@pytest.fixture
def cache(cached, tmp_path) -> Path:
    return Path(shutil.copytree(cached, tmp_path / "cache"))


@pytest.fixture
def src(phantoms, tmp_path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "src"))


def test_every_series_becomes_a_volume_and_a_row_and_ages_are_read_in_all_their_units(phantoms, cached):
    ages = [common.parse_age(text) for text in ("086Y", "86", "86.0", "018M", "052W", "")]
    assert ages == pytest.approx([86, 86, 86, 1.5, 1.0, np.nan], abs=0.01, nan_ok=True)
    uids, rows = set(os.listdir(phantoms / "series")), index(cached)
    points = read_points(phantoms / "train_localizers.csv")
    assert sum(map(len, points.values())) >= 2
    assert set(rows) == uids == {path.stem for path in cached.glob("*.safetensors")}
    for uid, row in rows.items():
        assert list(row) == preprocess.INDEX_COLUMNS.split()
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
    folders = {True: tmp_path / "with", False: tmp_path / "without"}
    for is_drawn, folder in folders.items():
        make_set(folder, series=6, seed=5, matrix=96, draw_aneurysms=is_drawn)
    away_mm = []
    for uid, points in read_points(folders[True] / "train_localizers.csv").items():
        files = [sorted((folder / "series" / uid).iterdir()) for folder in folders.values()]
        plain, _ = load_volume(cache_alone(uid, files[1], tmp_path / "plain", cfg, points))
        tensors, meta = load_volume(cache_alone(uid, files[0], tmp_path / "drawn", cfg, points))
        changed = np.abs(tensors["volume"].astype(float) - plain["volume"]).ravel()
        places = np.indices(plain["volume"].shape).reshape(3, -1).T * meta["spacing_mm"]
        for point in tensors["points"] * meta["spacing_mm"]:
            near = changed * (np.linalg.norm(places - point, axis=1) < 8)
            away_mm.append(np.linalg.norm(near @ places / near.sum() - point))
    assert len(away_mm) >= 3 and max(away_mm) < 2.5  # a voxel is 2 mm, a pixel of the scan 2.3


def test_patients_are_hidden_by_the_caches_key_and_folders_are_not_named(tmp_path):
    files = [write_slice(tmp_path / "Jane Doe" / f"{z}", z, PatientID="MRN 1") for z in range(4)]
    files[0].write_bytes(files[0].read_bytes()[:-9])
    path = cache_alone("1.2.3.4", files, tmp_path / "cache", Config())
    _, meta = load_volume(path)
    assert meta["patient"] == "eba9739693ba"  # openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...
    assert "1 of 4 files left out: 0: truncated" in str(meta["notes"])
    assert b"MRN 1" not in path.read_bytes() and b"Jane Doe" not in path.read_bytes()
    keys = [read_patient_key(tmp_path / name) for name in ("cache", "cache", "Jane Doe")]
    assert keys[0] == keys[1] != keys[2] and len(keys[0]) == 32
    (tmp_path / "cache" / ".patient_key").write_bytes(b"")
    expect_refusal(r"found 0 bytes, expected 32; delete it", read_patient_key, tmp_path / "cache")


def test_doubts_make_a_series_doubtful_in_index_and_summary(tmp_path, monkeypatch, capsys):
    files = [write_slice(tmp_path / "src" / f"{z}", z) for z in range(4)]
    volume = dicom.make_volume(dicom.read_series(files, "1.2.3.4"), Config().volume)
    doubtful = replace(volume, notes=["a note"], doubts=["67 % white", "no air"])
    monkeypatch.setattr(dicom, "make_volume", lambda *_: doubtful)
    cache_alone("1.2.3.4", files, tmp_path / "cache", Config())
    preprocess.summarise(preprocess.write_index(tmp_path / "cache"))
    row = index(tmp_path / "cache")["1.2.3.4"]
    assert (row["status"], row["reason"], row["notes"]) == ("doubtful", "67 % white; no air", "a note")
    assert "1 doubtful series, see index.csv; first 1.2.3.4: 67 % white; no air" in capsys.readouterr().err


def test_names_that_are_not_utf8_and_foreign_files_do_no_harm(src, tmp_path):
    folder = next((src / "series").iterdir())
    for name in (folder / "Bericht_Fran\udce7ois.txt", src / "B\udce4r.txt"):
        name.write_bytes(b"report")
    write_slice(src / "series" / "1.2.3.4" / "a").rename(src / "series" / "1.2.3.4" / "\udce4")
    (src / "series" / "1.2.3.4").rename(src / "series" / "M\udcfcller")
    (src / "index.csv").write_text("a,b\n1,2\n")
    (folder / "mask.safetensors").write_bytes(b"not ours")
    for expected in ("7 series, 7 cached, 0 kept, 0 failed", "7 series, 0 cached, 7 kept, 0 failed"):
        err = run_on(src, tmp_path / "cache")
        assert expected in err and "1; first B\udce4r.txt beside no series\n" in err
    rows = index(tmp_path / "cache")
    assert len(rows) == 7 and r"Bericht_Fran\udce7ois.txt" in rows[folder.name]["notes"]
    assert r"not DICOM,B\udce4r.txt beside no" in (tmp_path / "cache" / "faults.csv").read_text()
    meta = load_volume(tmp_path / "cache" / f"{folder.name}.safetensors")[1]
    assert meta["left_out"] == ["Bericht_Fran\udce7ois.txt", "mask.safetensors"]


def test_finished_series_are_kept_changed_ones_redone_other_settings_and_lost_points_refused(src, cache):
    for path in src.rglob("*.dcm"):
        os.utime(path, (0, 0))  # the place and the times have changed; that alone counts for nothing
    folders = sorted((src / "series").iterdir(), key=lambda folder: -len(os.listdir(folder)))
    min(folders[0].iterdir()).unlink()
    flip_bit(sorted(folders[1].iterdir())[1])
    before = contents(cache)
    assert "6 series, 2 cached, 4 kept, 0 failed" in run_on(src, cache)
    changed = {name for name, data in contents(cache).items() if data != before[name]}
    assert changed == {f"{folder.name}.safetensors" for folder in folders[:2]}
    before, complaint = contents(cache), "6 volumes have other settings: roi_mm 200.0 (expected 180.0)"
    assert complaint in run_on(src, cache, "--set", "roi_mm=180.0", code=1)
    (src / "train_localizers.csv").unlink()
    assert "has annotated points, but there is no train_localizers" in run_on(src, cache, code=1)
    assert contents(cache) == before


def test_folders_filled_in_one_pass_equal_those_filled_alone_at_one_reading(src, tmp_path, monkeypatch):
    """Also of a cache begun before and an unreadable series. Readings and decoded slices are counted."""
    broken = min((src / "series").iterdir())
    for path in broken.iterdir():
        path.write_bytes(b"this is not a DICOM file" * 100)
    counts = Counter()
    for module, name in ((dicom, "read_series"), (frames, "decode")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function: counts.update([f"{f} {a[0]}"]) or f(*a))
    safely = common.call_safely  # in this process
    monkeypatch.setattr(common, "run_isolated", lambda f, jobs, *_: ((x, *safely(f, 4, x)) for x in jobs))
    configs, alone, together = ([tmp_path / f"{name}{i}" for i in range(2)] for name in ("c", "alone", "dst"))
    for config, dst in zip(configs, alone, strict=True):
        config.write_text("roi_mm: 180" if config == configs[1] else "")
        run_on(src, dst, "--config", config, code=3)
    shutil.copytree(alone[1], together[1])
    for path in sorted(together[1].glob("*.safetensors"))[:2]:
        path.unlink()
    command = (src, together[0], "--dst", *together, "--config", *configs)
    for outcomes in (["5 cached, 0 kept", "2 cached, 3 kept"], ["0 cached, 5 kept"] * 2):
        counts.clear()
        err = run_on(*command, code=3)
        readable = Counter({call: num for call, num in counts.items() if broken.name not in call})
        assert set(readable.values()) == ({1} if "5 cached" in outcomes[0] else set())
        for dst, expected, numbers in zip(together, alone, outcomes, strict=True):
            assert f"{dst}: shard 0 of 1: 6 series, {numbers}, 1 failed" in err
            assert contents(dst, "*") == contents(expected, "*")


def test_shards_and_runs_that_meet_on_one_cache_make_the_same(phantoms, cached, tmp_path):
    command = (phantoms, tmp_path / "cache", "--workers", 1)
    ranks = {"RANK": "1", "WORLD_SIZE": "2"}
    processes = [start(*command), start(*command, "--shard", "0/2"), start(*command, **ranks)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert "shard 0 of 2: 3 series" in errors[1] and "shard 1 of 2: 3 series" in errors[2]
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert preprocess.shard_of({}) == "0/1" and preprocess.shard_of(slurm) == "2/3"
    assert contents(tmp_path / "cache", "*") == contents(cached, "*")


def test_kills_leave_no_trace(phantoms, cached, tmp_path):
    dst, rng, counts = tmp_path / "cache", np.random.default_rng(0), [0]
    for _ in range(4):
        process = start(phantoms, dst, "--workers", 1)
        while process.poll() is None and len(contents(dst)) == counts[-1]:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.communicate()
        for path in dst.glob("*.safetensors"):
            load_volume(path)  # ValueError if it differs from its sums
        counts.append(len(contents(dst)))
    assert 0 < counts[1] < counts[-1]  # the kills came at differing moments
    run_on(phantoms, dst)
    assert contents(dst, "*") == contents(cached, "*")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_says_so_in_one_line(number, code, phantoms, cached, tmp_path):
    dst = tmp_path / "cache"
    process = start(phantoms, dst, "--workers", 1)
    while not contents(dst) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("preprocess.py: interrupted")
    assert contents(dst).items() <= contents(cached).items() and len(index(dst)) == len(contents(dst))
    assert not list(dst.glob(".*.tmp"))


def test_a_full_disk_is_one_line_that_names_the_file(phantoms, tmp_path):
    """The system lets no file grow over 10 kB; a volume has 18."""
    dst = tmp_path / "cache"
    process = start(phantoms, dst)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and f"File too large: '{dst}/" in err.splitlines()[-1]
    assert contents(dst) == {} and not list(dst.glob(".*.tmp"))


def test_broken_series_fail_alone_and_are_tried_again(src, phantoms, cached, tmp_path):
    dst, uid = tmp_path / "cache", sorted(os.listdir(src / "series"))[2]
    for path in (src / "series" / uid).iterdir():
        path.write_bytes(b"this is not a DICOM file" * 100)
    tags = {"Rows": 60_000, "Columns": 60_000, "PixelData": bytes(300_000_000)}
    bomb = src / "series" / "1.2.777" / "bomb.dcm"
    write_slice(bomb, syntax=DeflatedExplicitVRLittleEndian, SeriesInstanceUID="1.2.777", **tags)
    command = (src, dst, "--memory-gb", 1)
    err, rows = run_on(*command, code=3), index(dst)
    assert len(rows) == 7 and "Traceback" not in err
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"}
    assert reasons.keys() == {uid, "1.2.777"} and all(reasons.values())
    assert all(f"{name}: failed: {reason}" in err for name, reason in reasons.items())
    shutil.copytree(phantoms / "series" / uid, src / "series" / uid, dirs_exist_ok=True)
    assert "7 series, 1 cached, 5 kept, 1 failed" in run_on(*command, code=3)
    # of several processes: code 3 would make the launcher stop the others
    assert "0 cached, 6 kept, 1 failed" in run_on(*command, RANK="0", WORLD_SIZE="1")
    assert index(dst)[uid]["status"] == "ok" and contents(dst) == contents(cached)


def test_verify_names_what_is_damaged_and_the_next_run_heals_it(phantoms, cached, cache):
    labels, table, (a, b, *_) = cache / "train.csv", cache / "index.csv", sorted(cache.glob("*.safetensors"))
    reshaped = a.read_bytes().replace(b"[8,48,48]", b"[8,24,96]")  # as many bytes
    damages = {
        f"{a}: volume differs from its sum": lambda: flip_bit(a),
        f"{a}: volume differs": lambda: a.write_bytes(reshaped),
        f"{a}: not a readable volume": lambda: os.truncate(a, 500),
        f"{a}: holds series {b.stem}": lambda: shutil.copy(b, a),
        f"{table}: missing, or differs from the folder": a.unlink,
        f"{table}: missing, or differs": lambda: flip_bit(table),
        f"{labels}: missing, or differs": lambda: flip_bit(labels),
        f"{labels}: missing": labels.unlink,
    }
    for complaint, damage in damages.items():
        run("--verify", "--dst", str(cache))
        damage()
        assert complaint in run("--verify", "--dst", str(cached), str(cache), code=3)
        run_on(phantoms, cache)
        assert contents(cache, "*") == contents(cached, "*")


MISTAKES = {  # options -> exit code and last line
    "--scr {tmp} --dst {tmp}/c": (2, "unrecognized arguments: --scr {tmp}"),
    "--dst {tmp}/c": (2, "--src DIR (or --verify) is missing"),
    "--src {tmp} --dst {tmp}/c {tmp}/d": (2, "1 --config for 2 --dst: expected one for each folder"),
    "--src {tmp} --dst {tmp}/c {tmp}/c --config a b": (2, "2 --config for 2 --dst: expected one for each"),
    "--src {tmp} --dst {tmp}/c --shard 4/4": (2, "'4/4': expected I/N"),
    "--src {tmp} --dst {tmp}/c --limit 0": (2, "expected a whole number above 0, found '0'"),
    "--src {tmp} --dst {tmp}/c --workers ²": (2, "expected a whole number above 0, found '²'"),
    "--src {tmp}/absent --dst {tmp}/c": (1, "preprocess.py: --src {tmp}/absent: no such folder"),
    "--src {tmp} --dst {tmp}/c --set bas_slices=3": (1, "--set bas_slices=3: unknown setting 'bas_slices'"),
    "--src {tmp} --dst {tmp}/file": (1, "{tmp}/file: a file; expected a folder"),
    "--verify --dst {tmp}/absent": (1, "{tmp}/absent: no such folder; expected a cache"),
    "--verify --dst {tmp}": (3, "0 volumes agree with their sums; 1 faults"),
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_one_line_with_their_exit_code(options, tmp_path):
    (tmp_path / "file").touch()
    code, complaint = MISTAKES[options]
    err = run(*options.format(tmp=tmp_path).split(), code=code)
    assert complaint.format(tmp=tmp_path) in err.strip().splitlines()[-1]
    assert code != 1 or err.count("\n") == 1


def test_bad_points_are_one_line_with_their_number_in_bounded_time(tmp_path):
    path, good = tmp_path / "points.csv", "{'x': 1.5, 'y': 2}"
    for coordinates, location in [*((text, LABELS[3]) for text in HOSTILE), (good, "Left Knee")]:
        rows = [["1.2", "1.2.3", good, LABELS[3]], ["1.2", "1.2.3", coordinates, location]]
        pd.DataFrame(rows, columns=POINT).to_csv(path, index=False)
        begin = time.monotonic()
        text = expect_refusal(r"points\.csv: 1 faults: line 3 has", read_points, path)
        assert time.monotonic() - begin < 10 and len(text) < 300 + len(str(path)) and "\n" not in text


def test_missing_tables_are_said_faulty_ones_stop_the_run_and_odd_labels_are_counted(src, tmp_path):
    some = shutil.copytree(src / "series", tmp_path / "some" / "series")
    assert f"no train.csv in {some} or above it" in run_on(some, tmp_path / "two", "--limit", 2)
    assert set(index(tmp_path / "two")) == set(sorted(os.listdir(some))[:2])
    table = pd.read_csv(src / "train.csv", dtype={UID: str})
    table.assign(Modality="Left Knee").to_csv(src / "train.csv", index=False)
    last_line = run_on(src, tmp_path / "cache", code=1).splitlines()[-1]
    assert f"{src}/train.csv" in last_line and "'Left Knee'" in last_line
    assert contents(tmp_path / "cache") == {}
    table.assign(**dict.fromkeys(LABELS, 0)).to_csv(src / "train.csv", index=False)
    positive = sorted(table.loc[table["Aneurysm Present"] == 1, UID])
    complaint = f"A point whose label is 0 in train.csv: {len(positive)}; first {positive[0]}\n"
    assert complaint in run_on(src, tmp_path / "other")
    table[UID], table["Aneurysm Present"] = "1.2.9" + table.index.astype(str), 1 - table["Aneurysm Present"]
    table.to_csv(src / "train.csv", index=False)
    err = run_on(src, tmp_path / "cache")
    assert f"Aneurysm Present and arteries disagree in train.csv: {len(table)}; first 1.2.9" in err
    assert f"Series not in train.csv: {len(table)}; first " in err
    faults = (tmp_path / "cache" / "faults.csv").read_text()
    assert all(f"\nSeries not in train.csv,{uid}\n" in faults for uid in os.listdir(src / "series"))
    assert "expected a folder of its own" in run_on(src, src, code=1).splitlines()[-1] and contents(src) == {}


def test_points_outside_of_their_image_or_on_the_other_side_are_counted_and_the_first_is_named(src, tmp_path):
    path = src / "train_localizers.csv"
    table = pd.read_csv(path, dtype=str).sort_values(UID)
    bad = table[:1].assign(coordinates="{'x': 1, 'y': 48.5}")  # of 48 rows
    unknown, endless = bad.assign(SOPInstanceUID="1.2.3.4.5"), bad.assign(coordinates="{'x': 1e999, 'y': 1}")
    sides = [bad.assign(coordinates="{'x': 40, 'y': 24}", location=name) for name in LABELS[:2]]
    pd.concat([bad, unknown, endless, table, bad.assign(**{UID: "1.2.9"}), *sides]).to_csv(path, index=False)
    err = run_on(src, tmp_path / "cache")
    assert "Series of train_localizers.csv not in --src: 1; first 1.2.9\n" in err
    uid, sop_uid = table.iloc[0][[UID, "SOPInstanceUID"]]
    reason = f"{uid}: point left out: (1, 48.5) lies outside of image {sop_uid}"
    assert f"3 annotated points left out, see index.csv; first {reason}\n" in err
    assert f"{len(table) + 2} of {len(table) + 5} annotated points lie inside the volumes" in err
    notes = index(tmp_path / "cache")[uid]["notes"]
    assert "no image 1.2.3.4.5" in notes and notes.count("on the other side of the middle") == 1


def misbehave(item: str) -> str:
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    while item == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    errors = {"raises": ValueError("two\n  lines"), "panics": BaseException("not an Exception")}
    if item in errors:
        raise errors[item]
    return str(len(np.ones(3 * 2**30, np.uint8))) if item == "eats" else item.upper()


def test_a_bad_item_costs_only_itself():
    items = ["a", "dies", "b", "hangs", "c", "eats", "raises", "panics", "d"]
    answers = run_isolated(misbehave, iter(items), workers=2, timeout_s=1.5, memory_gb=1)
    outcomes = {item: result or reason for item, result, reason in answers}
    assert len(outcomes) == len(items) and [outcomes[item] for item in "abcd"] == ["A", "B", "C", "D"]
    assert "killed by signal 9" in outcomes["dies"] and outcomes["hangs"] == "took longer than 1.5 s"
    assert outcomes["eats"] == "needs more than 1 GB of memory"
    assert (outcomes["raises"], outcomes["panics"]) == ("two lines", "BaseException: not an Exception")


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    dead, alive = (f".1.{pid}.safetensors.{HOST}.{pid}.tmp" for pid in (child.pid, os.getpid()))
    foreign, old = (f".1.{k}.safetensors.elsewhere.1.tmp" for k in (1, 2))
    for name in (dead, alive, foreign, old):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / old, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive, foreign}
