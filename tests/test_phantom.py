"""The phantoms are what they say: real DICOM, right labels, no trace of a label outside an aneurysm."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import phantom
import pytest
from pydicom import Dataset, dcmread

from common import LABELS, LOCATIONS, MODALITIES

JOBS = phantom.plan(40, 0, 40)  # two decks of storage forms, four of modalities and planes


def read_files(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory) -> Path:
    dst = tmp_path_factory.mktemp("phantom")
    phantom.make_set(dst, 40, seed=0, matrix=40)
    return dst


@pytest.fixture(scope="module")
def headers(dicoms) -> dict[str, list[Dataset]]:
    return {d.name: [dcmread(p) for p in sorted(d.iterdir())] for d in (dicoms / "series").iterdir()}


def place(d: Dataset, point: dict[str, float]) -> np.ndarray:
    """LPS mm of a localizer's point by the equation of PS3.3 C.7.6.2.1.1; `f` counts frames from 0."""
    position = orientation = spacing = d
    if "f" in point:
        position = d.PerFrameFunctionalGroupsSequence[point["f"]].PlanePositionSequence[0]
        shared = d.SharedFunctionalGroupsSequence[0]
        orientation, spacing = shared.PlaneOrientationSequence[0], shared.PixelMeasuresSequence[0]
    along_row, along_col = np.reshape(orientation.ImageOrientationPatient, (2, 3)).astype(float)
    row_mm, col_mm = spacing.PixelSpacing
    offset = along_row * col_mm * point["x"] + along_col * row_mm * point["y"]
    return np.array(position.ImagePositionPatient, float) + offset


def test_files_form_the_challenges_tree_in_every_modality_plane_and_storage(dicoms, headers):
    table, points = pd.read_csv(dicoms / "train.csv"), pd.read_csv(dicoms / "train_localizers.csv")
    assert list(table) == ["SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABELS]
    assert list(points) == ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]
    assert sorted(table.SeriesInstanceUID) == sorted(headers) and len(headers) == 40
    for uid, datasets in headers.items():
        names = {path.stem for path in (dicoms / "series" / uid).iterdir()}
        assert names == {d.SOPInstanceUID for d in datasets}
        assert {d.SeriesInstanceUID for d in datasets} == {uid}
        assert len({d.StudyInstanceUID for d in datasets}) == 1
    assert set(table.Modality) == set(MODALITIES)
    assert {job.plane for job in JOBS} == {"axial", "coronal", "sagittal"}
    flat = [datasets[0] for datasets in headers.values()]
    assert {d.file_meta.TransferSyntaxUID for d in flat} == {syntax for syntax, _ in phantom.FORMS.values()}
    assert {d.PhotometricInterpretation for d in flat} == {"MONOCHROME1", "MONOCHROME2"}
    assert {d.PixelRepresentation for d in flat} == {0, 1}
    assert {"RescaleIntercept" in d for d in flat if "NumberOfFrames" not in d} == {True, False}
    assert len({d.PatientID for d in flat}) < len(flat)  # some were scanned twice


def test_pydicom_decodes_every_file_to_the_grey_values_that_were_drawn(headers):
    for job in JOBS:
        drawn, to_slice = phantom.render(job), np.linalg.inv(phantom.make_scan(job).affine)
        for d in headers[job.uid]:
            pixels = d.pixel_array.reshape(-1, d.Rows, d.Columns).astype(np.float64)
            if d.PhotometricInterpretation == "MONOCHROME1":
                pixels = 4095 - pixels
            groups = d.get("SharedFunctionalGroupsSequence", [d])[0]
            scale = groups.get("PixelValueTransformationSequence", [groups])[0]
            slope = scale.get("RescaleSlope", 1)
            for f, image in enumerate(pixels * slope + scale.get("RescaleIntercept", 0)):
                point = {"x": 0, "y": 0} | ({"f": f} if "NumberOfFrames" in d else {})
                z, y, x, _ = to_slice @ [*place(d, point), 1]
                assert np.allclose([y, x], 0, atol=1e-3)
                expected = np.clip(drawn[round(z)], -1024 if job.modality == "CTA" else 0, None)
                assert np.abs(np.clip(image, -1024, None) - expected).max() <= 0.51 * slope, job


def test_localizers_agree_with_labels_and_lie_at_the_aneurysms_within_a_pixel(dicoms, headers):
    table, points = pd.read_csv(dicoms / "train.csv"), pd.read_csv(dicoms / "train_localizers.csv")
    labels = table.set_index("SeriesInstanceUID")[list(LOCATIONS)].stack()
    pairs = zip(points.SeriesInstanceUID, points.location, strict=True)
    assert set(labels.index[labels == 1]) == set(pairs) and set(labels) == {0, 1}
    assert (table["Aneurysm Present"] == table[list(LOCATIONS)].max(axis=1)).all()
    assert set(points.location) == set(LOCATIONS)
    jobs = {job.uid: job for job in JOBS}
    assert len(points) == sum(len(job.locations) for job in JOBS) > 10
    for uid, sop_uid, coordinates, location in points.itertuples(index=False):
        d = next(d for d in headers[uid] if d.SOPInstanceUID == sop_uid)
        point = ast.literal_eval(coordinates)
        assert ("f" in point) == ("NumberOfFrames" in d)
        centre = next(c for name, c, _ in phantom.list_truth(jobs[uid]) if name == location)
        to_voxels = np.linalg.inv(phantom.make_scan(jobs[uid]).affine)[:3, :3]
        off = np.abs(to_voxels @ (place(d, point) - centre))  # (z, y, x)
        assert off.max() <= 0.51 and off[1:].max() < 0.01, uid


def test_left_is_the_patients_left():
    for job in phantom.plan(400, 1, 32, "CTA", "axial"):
        to_head = np.linalg.inv(phantom.make_scan(job).pose)
        for name, centre, half_mm in phantom.list_truth(job):
            x = (to_head @ [*centre, 1])[0]  # LPS: +x is the patient's left
            assert not name.startswith("Left ") or x > 0, name
            assert not name.startswith("Right ") or x < 0, name
            assert 3 <= 2 * half_mm <= 9


def test_a_longer_set_starts_like_a_shorter_one_and_has_the_prevalence_of_the_challenge():
    jobs = phantom.plan(1000, 0, 40)
    assert jobs[:40] == JOBS
    counts = np.array([len(job.locations) for job in jobs])
    assert abs(np.mean(counts > 0) - 0.45) < 0.03 and 0.1 < np.mean(counts[counts > 0] > 1) < 0.3


def test_the_command_writes_the_same_bytes_with_several_processes_and_refuses_another_set(dicoms, tmp_path):
    options = ["--dst", tmp_path, "--series", "40", "--matrix", "40"]
    result = subprocess.run([sys.executable, phantom.__file__, *options], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert read_files(tmp_path) == read_files(dicoms)
    with pytest.raises(SystemExit, match=r"series of another set; expected none"):
        phantom.make_set(tmp_path, 2, seed=1, matrix=40)


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> dict[str, tuple]:
    """Heads that stand for real ones, without aneurysms: job and what find_backgrounds says, by UID."""
    dst, options = tmp_path_factory.mktemp("heads"), {"matrix": 64, "plain": True, "draw_aneurysms": False}
    phantom.make_set(dst, 12, 7, **options)
    found = {head[0][0].parent.name: head for head in phantom.find_backgrounds(dst)}
    return {job.uid: (job, found[job.uid]) for job in phantom.plan(12, 7, **options) if job.uid in found}


def test_a_real_head_is_drawn_into_at_its_place_and_size(heads, tmp_path):
    assert len(heads) >= 10
    for job, (files, _, plane) in heads.values():
        values, scan, scale, *_ = phantom.read_background(files)
        (size, *_), truth = phantom.make_head(job), phantom.make_scan(job)
        assert plane == job.plane and values.shape == truth.shape
        away_mm = ((scan.pose - truth.pose) @ [0, 0, -90, 1])[:3]  # where the arteries are
        assert np.linalg.norm(away_mm) < 8 and scale == pytest.approx(size, abs=0.12)
    with pytest.raises(SystemExit, match="no series of a head; expected CT or MR, 120 mm in each direction"):
        phantom.find_backgrounds(tmp_path)


@pytest.mark.parametrize("is_real", [False, True])
def test_without_aneurysms_only_their_voxels_change(is_real, heads, tmp_path):
    """So nothing else can tell the label: not the noise, the anatomy, the geometry, nor a name."""
    jobs, real = phantom.plan(16, 5, 64, plain=True), None
    if is_real:
        real = next(iter(heads.values()))[1][0][0].parents[2]
        jobs = [phantom.draw_into(job, phantom.find_backgrounds(real)) for job in jobs]
    for name, is_drawn in (("with", True), ("without", False)):
        options = {"matrix": 64, "plain": True, "draw_aneurysms": is_drawn, "backgrounds": real}
        phantom.make_set(tmp_path / name, 16, 5, **options)
    files, others = read_files(tmp_path / "with"), read_files(tmp_path / "without")
    assert files.keys() == others.keys()
    jobs, changed = {job.uid: job for job in jobs}, set()
    for name in [name for name in files if files[name] != others[name]]:
        a, b = dcmread(tmp_path / "with" / name), dcmread(tmp_path / "without" / name)
        differences = np.argwhere(a.pixel_array != b.pixel_array)
        del a.PixelData, b.PixelData
        assert a == b
        job = jobs[a.SeriesInstanceUID]
        reach_mm = 1.5 * np.linalg.norm(phantom.make_scan(job).affine[:3, :3], axis=0).max()
        domes = [(centre, 1.35 * half_mm) for _, centre, half_mm in phantom.list_truth(job)]
        for y, x in differences:
            voxel = place(a, {"x": x, "y": y})
            assert any(np.linalg.norm(voxel - centre) <= radius + reach_mm for centre, radius in domes), job
        changed.add(job.uid)
    assert changed == {job.uid for job in jobs.values() if job.locations} and 4 < len(changed) < 12
