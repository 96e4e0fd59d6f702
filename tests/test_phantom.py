"""The phantoms are what they say: real DICOM, right labels, no trace of a label outside an aneurysm."""

from __future__ import annotations

import ast
import filecmp
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import phantom
import pytest
from numpy.linalg import norm
from pydicom import Dataset, dcmread

from common import LABELS, LOCATIONS, MODALITIES

SERIES, MATRIX = 40, 40  # two decks of storage forms, four of modalities and planes
JOBS = phantom.plan(SERIES, 0, MATRIX, "all", "mixed")


def list_files(root: Path) -> list[Path]:
    """All files below a folder, relative to it, sorted."""
    return sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())


def read(root: Path, job: phantom.Job) -> list[Dataset]:
    """Every file of a job's series, read by pydicom."""
    folder = root / "series" / phantom.uid(job.seed, "series", job.number)
    return [dcmread(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed set as the defaults have it, but coarse."""
    dst = tmp_path_factory.mktemp("phantom") / "dicoms"
    phantom.make_set(dst, SERIES, seed=0, matrix=MATRIX)
    return dst


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for real scans: a head by CT, one by MR, and a series that ends above the skull base."""
    root = tmp_path_factory.mktemp("normal")
    for number, modality in enumerate(("CTA", "MRI T2")):
        job = phantom.plan(1, 8, 64, modality, "axial", plain=True, draw=False)[0]
        phantom.write_series(phantom.replace(job, number=number), root)
    files = sorted((root / "series" / phantom.uid(8, "series", 1)).iterdir())
    (root / "cut").mkdir()
    for path in sorted(files, key=lambda p: dcmread(p).ImagePositionPatient[2])[-18:]:
        d = dcmread(path)
        d.SeriesInstanceUID = phantom.uid("cut")
        d.save_as(root / "cut" / path.name)
    return root


def to_lps(d: Dataset, point: dict[str, float]) -> np.ndarray:
    """LPS mm of a localizer's point by the equation of PS3.3 C.7.6.2.1.1; `f` counts frames from 0."""
    frame = geometry = measures = d
    if "f" in point:
        shared = d.SharedFunctionalGroupsSequence[0]
        frame = d.PerFrameFunctionalGroupsSequence[point["f"]].PlanePositionSequence[0]
        geometry, measures = shared.PlaneOrientationSequence[0], shared.PixelMeasuresSequence[0]
    row_mm, col_mm = measures.PixelSpacing
    along_row, along_col = np.array(geometry.ImageOrientationPatient, float).reshape(2, 3)
    origin = np.array(frame.ImagePositionPatient, float)
    return origin + along_row * col_mm * point["x"] + along_col * row_mm * point["y"]


def test_files_form_the_challenges_tree(dicoms):
    table, points = (pd.read_csv(dicoms / name) for name in ("train.csv", "train_localizers.csv"))
    assert list(table) == ["SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABELS]
    assert list(points) == ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]
    folders = {path.name: path for path in (dicoms / "series").iterdir()}
    assert sorted(table.SeriesInstanceUID) == sorted(folders) and len(folders) == SERIES
    for name, folder in folders.items():
        datasets = {path.stem: dcmread(path) for path in folder.iterdir()}
        assert all(d.SOPInstanceUID == stem for stem, d in datasets.items())
        assert {d.SeriesInstanceUID for d in datasets.values()} == {name}
        assert len({d.StudyInstanceUID for d in datasets.values()}) == 1


def test_pydicom_decodes_every_file_to_the_grey_values_that_were_drawn(dicoms):
    for job in JOBS:
        scan = phantom.make_scan(job)
        drawn = phantom.render(phantom.make_head(job), scan, job)
        lowest = -1024 if job.modality == "CTA" else 0
        for d in read(dicoms, job):
            pixels = d.pixel_array.reshape(-1, d.Rows, d.Columns).astype(np.float64)
            pixels = 4095 - pixels if d.PhotometricInterpretation == "MONOCHROME1" else pixels
            groups = d.get("SharedFunctionalGroupsSequence", [d])[0]
            rescale = groups.get("PixelValueTransformationSequence", [groups])[0]
            slope = rescale.get("RescaleSlope", 1)
            for f, image in enumerate(pixels * slope + rescale.get("RescaleIntercept", 0)):
                corner = to_lps(d, {"x": 0, "y": 0} | ({"f": f} if "NumberOfFrames" in d else {}))
                k, row, col = scan.to_pixel(corner + 1e-4 * (scan.down + scan.across))
                assert max(row, col) < 1e-3
                error = np.maximum(image, lowest) - np.maximum(drawn[k], lowest)
                assert np.abs(error).max() <= 0.51 * slope, job


def test_localizers_lie_at_the_aneurysms_within_a_pixel_and_agree_with_the_labels(dicoms):
    table = pd.read_csv(dicoms / "train.csv").set_index("SeriesInstanceUID")
    points = pd.read_csv(dicoms / "train_localizers.csv").groupby("SeriesInstanceUID")
    assert (table[list(LOCATIONS)].sum() > 0).all()
    for job in JOBS:
        uid, scan = phantom.uid(0, "series", job.number), phantom.make_scan(job)
        truth = phantom.truth(job, phantom.make_head(job), scan)
        rows = points.get_group(uid) if uid in points.groups else pd.DataFrame()
        assert len(rows) == len(truth)
        names = {name for name, _, _ in truth}
        assert {name for name in LOCATIONS if table.loc[uid, name]} == names
        assert table.loc[uid, "Aneurysm Present"] == bool(names)
        datasets = {d.SOPInstanceUID: d for d in read(dicoms, job)}
        for row, (name, centre, _) in zip(rows.itertuples(), truth, strict=True):
            d, point = datasets[row.SOPInstanceUID], ast.literal_eval(row.coordinates)
            assert row.location == name and ("f" in point) == ("NumberOfFrames" in d)
            off = to_lps(d, point) - centre
            assert abs(off @ scan.normal) <= scan.spacing_mm[0]
            assert abs(off @ scan.across) < 0.1 and abs(off @ scan.down) < 0.1


def test_left_is_the_patients_left_and_sacs_are_2_to_12_mm():
    for job in phantom.plan(200, 1, 40, "CTA", "axial"):
        for aneurysm, sac in zip(job.aneurysms, phantom.make_head(job).sacs, strict=True):
            side = {"Left": 1, "Right": -1}.get(aneurysm.location.split()[0], 0)
            assert side == 0 or sac.centre[0] * side > 0, aneurysm  # x grows to the patient's left
            assert 2 <= 2 * sac.half_mm <= 12


def test_every_modality_plane_and_storage_occurs(dicoms):
    assert {job.modality for job in JOBS} == set(MODALITIES)
    assert {job.plane for job in JOBS} == {"axial", "coronal", "sagittal"}
    first = [read(dicoms, job)[0] for job in JOBS]
    assert {d.file_meta.TransferSyntaxUID for d in first} == {syntax for syntax, _ in phantom.FORMS.values()}
    assert {d.PixelRepresentation for d in first} == {0, 1}
    assert {"RescaleIntercept" in d for d in first if "NumberOfFrames" not in d} == {True, False}
    assert len({d.PatientID for d in first}) < len(first)  # some were scanned twice


def test_prevalence_is_that_of_the_challenge():
    plan = phantom.plan(1000, 2, 40, "all", "mixed")
    assert abs(np.mean([bool(job.aneurysms) for job in plan]) - 0.45) < 0.03
    assert 0.1 < np.mean([len(job.aneurysms) > 1 for job in plan if job.aneurysms]) < 0.3


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(dicoms, tmp_path):
    options = ["--series", str(SERIES), "--matrix", str(MATRIX), "--workers", "2"]
    command = [sys.executable, phantom.__file__, "--dst", str(tmp_path), *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stderr
    files = list_files(dicoms)
    assert list_files(tmp_path) == files and len(files) > SERIES
    assert filecmp.cmpfiles(dicoms, tmp_path, files, shallow=False)[0] == files


def test_a_shorter_set_is_the_start_of_a_longer_one():
    assert phantom.plan(120, 0, MATRIX, "all", "mixed")[:SERIES] == JOBS


@pytest.mark.parametrize("is_real", [False, True])
def test_without_aneurysms_only_their_voxels_change(is_real, normal, tmp_path):
    """So nothing else can tell the label: not the noise, the anatomy, the geometry, nor a name."""
    options = {"series": 12, "seed": 5, "plain": True, "backgrounds": normal if is_real else None}
    drawn, erased = tmp_path / "drawn", tmp_path / "erased"
    phantom.make_set(drawn, **options)
    phantom.make_set(erased, **options, draw_aneurysms=False)
    jobs, changed = phantom.plan(12, 5, 64, "all", "mixed", True), set()
    if is_real:
        jobs = phantom.place_on(phantom.find_backgrounds(normal), jobs, "all", "mixed")
    jobs = {phantom.uid(5, "series", job.number): job for job in jobs}
    files = list_files(drawn)
    assert list_files(erased) == files
    for path in filecmp.cmpfiles(drawn, erased, files, shallow=False)[1]:
        job, a, b = jobs[path.parent.name], dcmread(drawn / path), dcmread(erased / path)
        scan = phantom.make_scan(job)
        truth, reach_mm = phantom.truth(job, phantom.make_head(job), scan), 2.5 * scan.spacing_mm.max() + 2
        for y, x in np.argwhere(a.pixel_array != b.pixel_array):
            point = to_lps(a, {"x": x, "y": y})
            assert any(norm(point - centre) <= 2.3 * half_mm + reach_mm for _, centre, half_mm in truth)
        del a.PixelData, b.PixelData
        assert a == b
        changed.add(path.parent.name)
    table = pd.read_csv(drawn / "train.csv")
    assert changed == set(table.SeriesInstanceUID[table["Aneurysm Present"] == 1]) and len(changed) > 3


def hu(datasets: list[Dataset]) -> np.ndarray:
    """HU (n, rows, cols) of an axial CT series from below upwards."""
    datasets = sorted(datasets, key=lambda d: d.ImagePositionPatient[2])
    return np.stack(
        [d.pixel_array * d.get("RescaleSlope", 1) + d.get("RescaleIntercept", 0) for d in datasets]
    )


def test_real_heads_keep_their_pixels_and_size_but_no_name(normal, tmp_path, capsys):
    phantom.make_set(tmp_path, 4, 1, 64, "CTA", plain=True, backgrounds=normal)
    assert "cut: left out: it ends" in capsys.readouterr().err
    source = read(normal, phantom.plan(1, 8, 64, "CTA", "axial")[0])
    for job in phantom.plan(4, 1, 64, "CTA", "axial", True):
        datasets = read(tmp_path, job)
        assert 0.93 <= datasets[0].PixelSpacing[0] / source[0].PixelSpacing[0] <= 1.07
        is_same = np.abs(hu(datasets) - hu(source)) <= 1
        assert 0.9 < is_same.mean() < 0.995
        for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
            assert datasets[0][name].value != source[0][name].value


def test_folders_without_a_fitting_head_are_refused(normal):
    with pytest.raises(ValueError, match="no head among 1 series; expected CT or MR heads"):
        phantom.find_backgrounds(normal / "cut")
    with pytest.raises(
        ValueError, match="no coronal CT head among 2 series; expected one for --modality CTA"
    ):
        phantom.make_set(normal / "new", 2, 1, 64, "CTA", "coronal", backgrounds=normal)


def test_a_folder_with_another_set_is_refused(dicoms):
    with pytest.raises(ValueError, match=r"series: 40 series of another set; expected none"):
        phantom.make_set(dicoms, 2, seed=1, matrix=40)
