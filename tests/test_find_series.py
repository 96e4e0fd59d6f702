"""find_series: which files are one series, and that no file stops or swells the search."""

import errno
import gzip
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from test_dicom_reading import image, write

import dicom
from dicom import find_series, safe_uid

GROUPINGS = {  # a file, its SeriesInstanceUID and PatientID (- for none), and the series that it belongs to
    "date folders": "anna/2024.03.01/1 1.2.1 anna 1.2.1, bert/2024.03.01/1 1.2.2 bert 1.2.2",
    "date folders without UIDs": "a/2024.03.01/1 - a 2024.03.01-1of2, b/2024.03.01/1 - b 2024.03.01-2of2",
    "a study's folder": "1.2.5/1 1.2.5.1 a 1.2.5.1, 1.2.5/2 1.2.5.2 a 1.2.5.2, 1.2.5/3 1.2.5.1 a 1.2.5.1",
    "the hidden test": "1.2.1/1 - a 1.2.1, 1.2.1/2 - a 1.2.1, 1.2.2/1 - a 1.2.2",
    "identifiers": f"ID_0a1b/1 - a ID_0a1b, flat/1 ID_9f a ID_9f, x/1 ../../x a {safe_uid('../../x')}",
    "one series in three folders": "a/1 1.2.3 a 1.2.3, b/1 1.2.3 - 1.2.3, 1.2.3/1 1.2.3 a 1.2.3",
    "two patients in one folder": "scans/1 - a scans-1of2, scans/2 - b scans-2of2, scans/3 - a scans-1of2",
    "two patients with one UID": "a/1 1.2.3 a 1.2.3-1of2, b/1 1.2.3 b 1.2.3-2of2",
    "vessel masks": "segmentations/1 1.2 a -, 1/1 1.3 a 1.3",
}
SEARCH = """import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (400 * 2**20,) * 2)
import dicom
series, rejected = dicom.find_series(pathlib.Path(sys.argv[1]))
print(*sorted(p.name for p in series["1.2.3.4"]), "not", *sorted(p.name for p, _ in rejected))
"""


def write_slice(path: Path, z: float = 0.0, syntax: str = ExplicitVRLittleEndian, **tags: object) -> Path:
    """A CT image of 512 bytes; a tag given as None is left out."""
    tags = {"SeriesInstanceUID": "1.2.3.4", "ImagePositionPatient": [0, 0, z]} | tags
    return write(path, image(pixels=np.zeros((16, 16)), **tags), syntax)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("name", GROUPINGS)
def test_images_are_grouped_by_their_own_uids_and_never_across_patients(name, tmp_path):
    expected = {}
    for text in GROUPINGS[name].split(", "):
        path, uid, patient, series = (None if word == "-" else word for word in text.split())
        write_slice(tmp_path / path, SeriesInstanceUID=uid, PatientID=patient)
        expected[path] = series
    series, rejected = find_series(tmp_path)
    uids = {str(path.relative_to(tmp_path)): uid for uid, paths in series.items() for path in paths}
    assert dict.fromkeys(expected) | uids == expected and rejected == []
    assert sum(map(len, series.values())) == len(uids) and all(safe_uid(uid) == uid for uid in series)


def test_in_a_folder_named_by_its_series_one_file_is_opened(tmp_path, monkeypatch):
    for k, z in np.ndindex(3, 50):
        write_slice(tmp_path / f"1.2.{k}" / f"{z}.dcm", z, SeriesInstanceUID=f"1.2.{k}")
    spy = Mock(wraps=dicom.read_identity)
    monkeypatch.setattr(dicom, "read_identity", spy)
    assert [len(files) for files in find_series(tmp_path)[0].values()] == [50] * 3
    assert [call.args[0].name for call in spy.call_args_list] == ["0.dcm"] * 3


@pytest.mark.parametrize("folder", ["CT", "1.2.3.4", "2024.03.01"])
@pytest.mark.parametrize("size", [0, 100, 300, -10])  # nothing, half a preamble, half a header, most pixels
def test_damaged_files_count_as_their_folders_series(folder, size, tmp_path):
    for z in range(26):
        path = write_slice(tmp_path / folder / f"{z}", z)
        if z >= 2:
            path.write_bytes(path.read_bytes()[:size])
    series, rejected = find_series(tmp_path)
    assert {uid: len(files) for uid, files in series.items()} == {"1.2.3.4": 26} and rejected == []


def test_odd_files_cost_the_search_neither_time_nor_memory(tmp_path):
    good = write_slice(tmp_path / "good").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with gzip.open(tmp_path / "bomb.gz", "wb") as file:
        file.writelines([good[:-512], *[bytes(2**20)] * 500])
    assert (tmp_path / "bomb.gz").stat().st_size < 600_000
    write_slice(tmp_path / "sparse", Rows=1, Columns=1)
    os.truncate(tmp_path / "sparse", 60_000_000)
    write_slice(tmp_path / "deflated", syntax=DeflatedExplicitVRLittleEndian)
    os.truncate(tmp_path / "deflated", 3 * 2**30)
    (tmp_path / "sequences").write_bytes(good[:360] + b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" * 10**6)
    (tmp_path / "report.txt").write_text("no image")
    command, folder = [sys.executable, "-c", SEARCH, tmp_path], Path(dicom.__file__).parent
    output = subprocess.check_output(command, cwd=folder, timeout=20, text=True)
    assert output == "bomb.gz deflated good sequences sparse not circle pipe report.txt\n"


def test_files_that_may_not_be_opened_stay_in_their_folders_series(tmp_path, monkeypatch):
    paths = [write_slice(tmp_path / "Jane" / f"{z}", z) for z in range(3)]
    refuse = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(os, "stat", refuse)  # as in a folder that may be listed but not entered
    monkeypatch.setattr("frames.open", refuse, raising=False)
    assert find_series(tmp_path) == ({"Jane": paths}, [])
