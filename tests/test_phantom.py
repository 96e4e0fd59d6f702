"""The phantoms are what they say: real DICOM, right labels, no trace of a label outside an aneurysm."""

from __future__ import annotations

import ast
import csv
import filecmp
import subprocess
import sys
from pathlib import Path

import numpy as np
import phantom
import pytest
from pydicom import Dataset, dcmread

from common import LABELS, LOCATIONS, MODALITIES

SERIES, MATRIX = 40, 40  # two decks of storage forms, four of modalities and planes


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def files(root: Path) -> list[Path]:
    """All files below a folder, relative to it, sorted."""
    return sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed set as the defaults have it, but coarse."""
    dst = tmp_path_factory.mktemp("phantom") / "dicoms"
    phantom.make_set(dst, SERIES, seed=0, matrix=MATRIX)
    return dst


@pytest.fixture(scope="module")
def headers(dicoms: Path) -> dict[str, list[Dataset]]:
    """Every file of every series, read by pydicom with its pixels."""
    return {d.name: [dcmread(p) for p in sorted(d.iterdir())] for d in (dicoms / "series").iterdir()}


def place(d: Dataset, point: dict[str, float]) -> np.ndarray:
    """LPS mm of a localizer's point by the equation of PS3.3 C.7.6.2.1.1; `f` counts frames from 0."""
    if "f" in point:
        frame, shared = d.PerFrameFunctionalGroupsSequence[point["f"]], d.SharedFunctionalGroupsSequence[0]
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        row_mm, col_mm = shared.PixelMeasuresSequence[0].PixelSpacing
    else:
        position, orientation, (row_mm, col_mm) = (
            d.ImagePositionPatient,
            d.ImageOrientationPatient,
            d.PixelSpacing,
        )
    along_row, along_col = np.array(orientation[:3], float), np.array(orientation[3:], float)
    return np.array(position, float) + along_row * col_mm * point["x"] + along_col * row_mm * point["y"]


def jobs() -> list[phantom.Job]:
    """The plan of the set that `dicoms` holds."""
    return phantom.plan(SERIES, 0, MATRIX, "all", "mixed", False, True)


def test_files_form_the_challenges_tree(dicoms, headers):
    table, points = rows(dicoms / "train.csv"), rows(dicoms / "train_localizers.csv")
    assert list(table[0]) == ["SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABELS]
    assert list(points[0]) == ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]
    assert sorted(r["SeriesInstanceUID"] for r in table) == sorted(headers) and len(headers) == SERIES
    for folder, datasets in headers.items():
        names = {p.stem for p in (dicoms / "series" / folder).iterdir()}
        assert names == {d.SOPInstanceUID for d in datasets}
        assert {d.SeriesInstanceUID for d in datasets} == {folder}
        assert len({d.StudyInstanceUID for d in datasets}) == 1


def test_pydicom_decodes_every_file_to_the_grey_values_that_were_drawn(headers):
    for job in jobs():
        head, scan = phantom.make_head(job.seed, job.patient, job.aneurysms), phantom.make_scan(job)
        drawn = phantom.render(head, scan, job)
        datasets = headers[phantom.uid(job.seed, "series", job.number)]
        to_slice = np.linalg.inv(scan.affine)
        for d in datasets:
            pixels = d.pixel_array.reshape(-1, d.Rows, d.Columns).astype(np.float64)
            if d.PhotometricInterpretation == "MONOCHROME1":
                pixels = 4095 - pixels
            groups = d.get("SharedFunctionalGroupsSequence", [d])[0]
            scale = groups.get("PixelValueTransformationSequence", [groups])[0]
            values = pixels * scale.get("RescaleSlope", 1) + scale.get("RescaleIntercept", 0)
            for f, image in enumerate(values):
                corner = place(d, {"x": 0, "y": 0} | ({"f": f} if "NumberOfFrames" in d else {}))
                k = to_slice @ [*corner, 1]
                assert np.allclose(k[1:3], 0, atol=1e-3)
                expected = np.clip(drawn[round(k[0])], -1024 if job.modality == "CTA" else 0, None)
                assert np.abs(np.clip(image, -1024, None) - expected).max() <= 0.51 * scale.get(
                    "RescaleSlope", 1
                ), job


def test_localizers_lie_at_the_aneurysms_within_a_pixel(dicoms, headers):
    truth = {phantom.uid(j.seed, "series", j.number): phantom.truth(j) for j in jobs()}
    points = rows(dicoms / "train_localizers.csv")
    assert len(points) == sum(map(len, truth.values())) > 10
    for row in points:
        d = next(d for d in headers[row["SeriesInstanceUID"]] if d.SOPInstanceUID == row["SOPInstanceUID"])
        point = ast.literal_eval(row["coordinates"])
        assert ("f" in point) == ("NumberOfFrames" in d)
        centre = next(c for name, c, _ in truth[row["SeriesInstanceUID"]] if name == row["location"])
        scan = next(
            phantom.make_scan(j) for j in jobs() if phantom.uid(0, "series", j.number) == d.SeriesInstanceUID
        )
        off = np.linalg.inv(scan.affine)[:3, :3] @ (place(d, point) - centre)  # in voxels (z, y, x)
        assert np.abs(off).max() <= 0.51 and np.abs(off[1:]).max() < 0.01, row


def test_labels_agree_with_localizers_and_present_with_both(dicoms):
    found = {}
    for row in rows(dicoms / "train_localizers.csv"):
        found.setdefault(row["SeriesInstanceUID"], set()).add(row["location"])
    table = rows(dicoms / "train.csv")
    for row in table:
        positive = {name for name in LOCATIONS if row[name] == "1"}
        assert positive == found.get(row["SeriesInstanceUID"], set())
        assert row["Aneurysm Present"] == str(int(bool(positive)))
    assert all(any(r[name] == "1" for r in table) for name in LOCATIONS)


def test_left_is_the_patients_left():
    for job in phantom.plan(400, 1, 32, "CTA", "axial", True, True):
        to_head = np.linalg.inv(phantom.make_scan(job).pose)
        for name, centre, half in phantom.truth(job):
            x = (to_head @ [*centre, 1])[0]  # LPS: +x is the patient's left
            assert not name.startswith("Left ") or x > 0, name
            assert not name.startswith("Right ") or x < 0, name
            assert 3 <= 2 * half <= 9


def test_every_modality_plane_and_storage_occurs(dicoms, headers):
    assert {r["Modality"] for r in rows(dicoms / "train.csv")} == set(MODALITIES)
    assert {(j.plane) for j in jobs()} == {"axial", "coronal", "sagittal"}
    assert {j.form for j in jobs()} == set(phantom.FORMS)
    flat = [datasets[0] for datasets in headers.values()]
    assert {d.file_meta.TransferSyntaxUID for d in flat} == {syntax for syntax, _ in phantom.FORMS.values()}
    assert {d.PixelRepresentation for d in flat} == {0, 1}
    assert {"RescaleIntercept" in d for d in flat if "NumberOfFrames" not in d} == {True, False}
    patients = [d.PatientID for d in flat]
    assert len(set(patients)) < len(patients)  # some were scanned twice


def test_prevalence_is_that_of_the_challenge():
    plan = phantom.plan(1000, 2, 32, "all", "mixed", False, True)
    assert abs(np.mean([bool(j.aneurysms) for j in plan]) - 0.45) < 0.03
    assert 0.1 < np.mean([len(j.aneurysms) > 1 for j in plan if j.aneurysms]) < 0.3


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(dicoms, tmp_path):
    command = [
        sys.executable,
        phantom.__file__,
        "--dst",
        tmp_path,
        "--series",
        str(SERIES),
        "--matrix",
        str(MATRIX),
    ]
    run = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stderr
    assert files(tmp_path) == files(dicoms)
    same, different, failed = filecmp.cmpfiles(dicoms, tmp_path, files(dicoms), shallow=False)
    assert not different and not failed and len(same) > SERIES


def test_a_shorter_set_is_the_start_of_a_longer_one():
    long, short = (phantom.plan(n, 0, 64, "all", "mixed", False, True) for n in (120, 30))
    assert long[:30] == short


def test_without_aneurysms_only_their_voxels_change(tmp_path):
    """So nothing else can tell the label: not the noise, the anatomy, the geometry, nor a name."""
    sets = {draw: tmp_path / str(draw) for draw in (True, False)}
    for draw, dst in sets.items():
        phantom.make_set(dst, 16, seed=5, matrix=64, plain=True, draw_aneurysms=draw)
    assert files(sets[True]) == files(sets[False])
    plan, changed = phantom.plan(16, 5, 64, "all", "mixed", plain=True), set()
    for job in plan:
        scan, truth = phantom.make_scan(job), phantom.truth(job)
        spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
        for path in (sets[True] / "series" / phantom.uid(5, "series", job.number)).iterdir():
            other = sets[False] / path.relative_to(sets[True])
            if filecmp.cmp(path, other, shallow=False):
                continue
            a, b = dcmread(path), dcmread(other)
            y, x = np.nonzero(a.pixel_array != b.pixel_array)
            del a.PixelData, b.PixelData
            assert a == b and job.aneurysms
            for row, col in zip(y, x, strict=True):
                where = place(a, {"x": col, "y": row})
                reach_mm = min(np.linalg.norm(where - c) - 1.35 * half for _, c, half in truth)
                assert reach_mm <= 1.5 * spacing_mm.max(), (job, reach_mm)
            changed.add(job.number)
    assert changed == {job.number for job in plan if job.aneurysms} and 4 < len(changed) < 12


def test_a_folder_with_another_set_is_refused(dicoms):
    with pytest.raises(ValueError, match=r"series: 40 series of another set; expected none"):
        phantom.make_set(dicoms, 2, seed=1, matrix=40)
