"""Series with the troubles that people report: each comes out right, or is refused or doubted."""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, MRImageStorage, RLELossless
from test_dicom_reading import PLANES, enhanced, image, noted, stack, write

from dicom import Series, read_series
from dicom_file import read_header

pytestmark = pytest.mark.filterwarnings("ignore")
NORMALS = {"axial": [0, 0, 1], "coronal": [0, 1, 0], "sagittal": [-1, 0, 0]}  # row x column direction
STRIPPED = {"SeriesInstanceUID": None}


def head(n: int = 24, vessel: float = 40, size: int = 32) -> np.ndarray:
    """(n, size, size) HU + 1024: a cone of brain in a skull, wide at slice 0, with a vessel in it."""
    y, x = np.mgrid[:size, :size] - size / 2
    hu = np.full((n, size, size), -1000.0)
    for i in range(n):
        radius = 13 - 10 * i / n
        hu[i][np.hypot(x, y) < radius] = 700
        hu[i][np.hypot(x, y) < radius - 2] = 40
        hu[i][np.hypot(x, y) < 1.5] = vessel
    return (hu + 1024).astype("u2")


def scan(
    folder: Path, pixels: np.ndarray, plane: str = "axial", start=0.0, step=4.0, first=1, **tags
) -> list[Path]:
    """A file per image, `step` mm apart along the normal; a tuple has a value for each image."""
    points = [
        np.round((start + i * step) * np.array(NORMALS[plane]) - 50.0, 6).tolist() for i in range(len(pixels))
    ]
    numbers = tuple(range(first, first + len(pixels)))
    defaults = {
        "ImagePositionPatient": tuple(points), "InstanceNumber": numbers, "SliceThickness": abs(step),
        "ImageOrientationPatient": PLANES[plane], "PixelSpacing": [5.0, 5.0], "pixels": tuple(pixels),
    }  # fmt: skip
    if tags.get("Modality") == "MR":
        defaults["RescaleIntercept"] = 0.0
    return stack(folder, [0.0] * len(pixels), **(defaults | tags))


def offsets(series: Series) -> list[float]:
    """Millimetres along the normal from the first slice."""
    return np.round(series.positions_mm - series.positions_mm[0], 2).tolist()


def folders(series: Series) -> set[str]:
    return {frame.path.parent.name for frame in series.frames}


def check_order(series: Series, num: int, step: float) -> None:
    """All images in the order of their numbers (or frames), `step` mm apart, without a doubt."""
    numbers = [frame.header["InstanceNumber"] + frame.index for frame in series.frames]
    assert len(numbers) == num and numbers in (sorted(numbers), sorted(numbers, reverse=True))
    np.testing.assert_allclose(np.diff(series.positions_mm), step, atol=0.02 * step)
    assert series.doubts == []


# --- several volumes in one series


@pytest.mark.parametrize("offset", [0.0, 1.7, 2.0])
@pytest.mark.parametrize("plane", ["axial", "sagittal"])
@pytest.mark.parametrize(
    "plain, arterial",
    [
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
        ({}, {"first": 101}),
        ({"AcquisitionTime": "101500"}, {"AcquisitionTime": "101530"}),
        ({"InstanceNumber": tuple(range(1, 48, 2))}, {"InstanceNumber": tuple(range(2, 49, 2))}),
    ],
    ids=["AcquisitionNumber", "InstanceNumber", "AcquisitionTime", "alternating numbers"],
)
def test_of_two_ct_phases_the_one_with_filled_vessels_is_read(tmp_path, offset, plane, plain, arterial):
    scan(tmp_path / "a", head(vessel=40), plane, **plain)
    scan(tmp_path / "b", head(vessel=400), plane, start=offset, **arterial)
    if offset == 2.0 and "InstanceNumber" in plain:
        pytest.skip("even and odd slices of one volume look the same")
    for path in list(tmp_path.glob("?/*")):  # names tell nothing
        path.rename(tmp_path / f"{zlib.crc32(bytes(path))}{path.parent.name}")
    series = read_series(tmp_path)
    assert {frame.path.name[-1] for frame in series.frames} == {"b"}
    assert offsets(series) == [4.0 * i for i in range(24)]
    assert series.doubts == [] and noted(series, "volumes by")


def test_two_mr_phases_are_not_interleaved(tmp_path):
    for name, start, first in (("a", 0, 1), ("b", 1.7, 101)):
        scan(tmp_path / name, head(), start=start, first=first, Modality="MR", SOPClassUID=MRImageStorage)
    assert folders(read_series(tmp_path)) == {"a"}


def test_of_a_long_and_a_short_phase_the_complete_one_is_read(tmp_path):
    scan(tmp_path / "a", head(vessel=40)[:12], start=17.7)
    scan(tmp_path / "b", head(vessel=400), first=101)
    series = read_series(tmp_path)
    assert folders(series) == {"b"} and len(series.frames) == 24


def test_slices_taken_in_two_passes_are_one_volume(tmp_path):
    odd_first = tuple(i // 2 + 1 if i % 2 == 0 else 13 + i // 2 for i in range(24))
    passes = tuple(1 + i % 2 for i in range(24))
    for name, modality in (("a", "CT"), ("b", "MR")):
        tags = {"InstanceNumber": odd_first, "AcquisitionNumber": passes, "Modality": modality}
        scan(tmp_path / name, head(), **tags)
        series = read_series(tmp_path / name)
        assert len(series.frames) == 24 and series.notes == [] and series.doubts == []


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("num, step", [(6, 16.0), (24, 4.0)])
def test_thick_slabs_among_thin_slices_are_left_out(tmp_path, modality, num, step):
    scan(tmp_path / "thin", head(), Modality=modality, **STRIPPED)
    slabs = {"SliceThickness": 20.0, "first": 201, "Modality": modality}
    scan(tmp_path / "slab", head(num), start=2.0, step=step, **slabs, **STRIPPED)
    series = read_series(tmp_path)
    assert folders(series) == {"thin"} and len(series.frames) == 24 and noted(series, "thicker")


def test_a_scan_whose_slices_grow_thicker_is_one_volume(tmp_path):
    scan(tmp_path / "base", head(12), step=2.5)
    scan(tmp_path / "vertex", head(12), start=30.0, step=5.0, first=13)
    assert len(read_series(tmp_path).frames) == 24


@pytest.mark.parametrize("words", ["MIP ", "CT_SOM5 MIP", "MAX_IP", "MIP_TRA", "PROJECTION IMAGE", "MINIP"])
def test_projections_are_known_by_words_of_the_image_type(tmp_path, words):
    scan(tmp_path / "slices", head(10))
    scan(tmp_path / "mip", head(), start=1.0, ImageType=["DERIVED ", "SECONDARY", words])
    assert folders(read_series(tmp_path)) == {"slices"}
    with pytest.raises(ValueError, match="1 projection images, no volume"):
        read_series(tmp_path / "mip" / "I1")


def test_in_phase_images_are_not_taken_for_projections(tmp_path):
    scan(tmp_path, head(), ImageType=["DERIVED", "PRIMARY", "IP", "IP"])
    assert read_series(tmp_path).notes == []


def test_a_lone_scout_is_refused(tmp_path):
    scan(tmp_path, head(1), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER "])
    with pytest.raises(ValueError, match="1 scout images, no volume"):
        read_series(tmp_path)


@pytest.mark.parametrize("numbers", [tuple(range(2, 26)), tuple(range(25, 1, -1))])
def test_a_bolus_tracking_image_replaces_no_slice(tmp_path, numbers):
    packs = tuple(1 + i // 4 for i in range(24))  # one acquisition per turn of the tube
    scan(tmp_path / "scan", head(), InstanceNumber=numbers, AcquisitionNumber=packs)
    scan(tmp_path / "bolus", head(1), start=48.0)
    series = read_series(tmp_path)
    assert folders(series) == {"scan"} and len(series.frames) == 24
    assert noted(series, "1 images left out") or noted(series, "kept (24 images)")


# --- positions


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("numbers", [tuple(range(1, 25)), tuple(range(24, 0, -1))])
def test_slices_with_one_position_lie_by_instance_number(tmp_path, plane, numbers):
    same = [-108.8, -108.8, -383.447]
    packs = tuple(range(24))
    scan(tmp_path, head(), plane, ImagePositionPatient=same, InstanceNumber=numbers, AcquisitionNumber=packs)
    series = read_series(tmp_path)
    check_order(series, 24, 4.0)
    assert series.plane == plane and noted(series, "InstanceNumber times 4 mm (SliceThickness)")


def test_without_numbers_slices_with_one_position_lie_by_file_name_if_that_is_plausible(tmp_path):
    same = {"ImagePositionPatient": [0, 0, 0], "InstanceNumber": None}
    scan(tmp_path / "named", head(), **same)
    series = read_series(tmp_path / "named")
    assert [frame.path.name for frame in series.frames] == [f"I{i + 1}" for i in range(24)]
    assert noted(series, "file names") and series.doubts == []
    scan(tmp_path / "shuffled", head()[np.random.default_rng(0).permutation(24)], **same)
    assert read_series(tmp_path / "shuffled").doubts


def test_a_time_series_at_one_position_is_doubted(tmp_path):
    pixels = np.repeat(head(1), 24, axis=0)
    pixels[:, 16, 16] = np.linspace(1064, 1400, 24)  # the bolus arrives
    scan(tmp_path, pixels, ImagePositionPatient=[0, 0, 0])
    series = read_series(tmp_path)
    assert len(series.frames) == 1 and "24 images without plausible positions" in series.doubts[0]


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("orientation", [True, False])
@pytest.mark.parametrize("step", [0.5, -0.5, 0.7])
def test_positions_rounded_to_millimetres_are_put_back_on_their_line(tmp_path, plane, orientation, step):
    points = tuple(np.trunc(i * step * np.array(NORMALS[plane])).tolist() for i in range(60))
    tags = {} if orientation else {"ImageOrientationPatient": None}
    scan(tmp_path, head(60), plane, step=step, ImagePositionPatient=points, **tags)
    series = read_series(tmp_path)
    check_order(series, 60, 0.5 if abs(step) == 0.5 else 0.7)
    assert series.plane == plane


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("case", ["one position", "rounded", "no orientation"])
def test_an_enhanced_file_with_poor_positions_keeps_all_frames(tmp_path, plane, case):
    step = 0.5 if case == "rounded" else 4.0
    points = [i * step * np.array(NORMALS[plane], float) for i in range(24)]
    points = [np.trunc(p) if case == "rounded" else p * (case != "one position") for p in points]
    iop = None if case == "no orientation" else PLANES[plane]
    tags = {"pixels": head(24), "SliceThickness": step}
    write(tmp_path / "e.dcm", enhanced([p.tolist() for p in points], [1] * 24, orientation=iop, **tags))
    series = read_series(tmp_path)
    check_order(series, 24, step)
    assert series.plane == plane


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("jitter", [0.004, 0.012])
def test_slices_whose_orientation_jitters_stay_together(tmp_path, plane, jitter):
    noise = np.random.default_rng(0).uniform(-jitter, jitter, (24, 6))
    noise[0] = jitter  # the first is the worst
    iop = tuple(np.round(PLANES[plane] + row, 5).tolist() for row in noise)
    scan(tmp_path, head(), plane, ImageOrientationPatient=iop)
    series = read_series(tmp_path)
    check_order(series, 24, 4.0)
    assert series.plane == plane


def test_slices_without_an_orientation_join_the_others(tmp_path):
    iop = tuple(None if i % 3 == 0 else PLANES["sagittal"] for i in range(24))
    scan(tmp_path, head(), "sagittal", ImageOrientationPatient=iop)
    series = read_series(tmp_path)
    check_order(series, 24, 4.0)
    assert noted(series, "ImageOrientationPatient in 8 of 24 images: sagittal by their positions")


def test_without_orientation_and_positions_the_plane_is_doubted(tmp_path):
    scan(tmp_path, head(), ImageOrientationPatient=None, ImagePositionPatient=None)
    assert "axial assumed" in read_series(tmp_path).doubts[0]


@pytest.mark.parametrize("place", [[-50.0, -50.0, 290.0], [-50.0, -50.0, 9000.0], [-50.0, 9000.0, 40.0]])
def test_a_slice_far_from_the_others_is_left_out(tmp_path, place):
    scan(tmp_path / "a", head())
    scan(tmp_path / "stray", head(1), first=12, ImagePositionPatient=place)
    series = read_series(tmp_path)
    assert folders(series) == {"a"} and noted(series, "1 images left out: far")


def test_a_slice_among_others_that_its_number_contradicts_is_left_out(tmp_path):
    points = tuple([0.0, 0.0, 4.0 * i if i != 7 else 61.3] for i in range(24))
    scan(tmp_path, head(), ImagePositionPatient=points)
    series = read_series(tmp_path)
    assert len(series.frames) == 23 and noted(series, "1 images left out: far", "61.3")


def test_a_hole_in_a_scan_costs_no_slices(tmp_path):
    scan(tmp_path / "a", head(12))
    scan(tmp_path / "b", head(12), start=120.0, first=31)
    assert len(read_series(tmp_path).frames) == 24


def test_images_that_nothing_tells_apart_are_refused(tmp_path):
    z = (0.3, 0.3, 0.3, 0.3, 0.3, 7.1, 9.7, 9.7, 9.7, 20.2, 20.2, 20.2)
    points = tuple([0, 0, mm] for mm in z)
    scan(tmp_path, np.zeros((12, 8, 8)), ImagePositionPatient=points, InstanceNumber=1, SOPInstanceUID=None)
    with pytest.raises(ValueError, match="12 images share 4 positions"):
        read_series(tmp_path)


def test_decimal_commas_are_read_as_points_and_noted_once(tmp_path):
    for path in scan(tmp_path, head(), step=4.5, PixelSpacing=[1.75, 1.75], SliceThickness=4.5):
        data = path.read_bytes()
        at = data.index(b"\xe0\x7f\x10\x00")
        header = re.sub(rb"(?<=[0-9])\.(?=[0-9]+[ \\])", b",", data[:at].replace(b"-50.0\\", b"-50,0\\"))
        path.write_bytes(header + data[at:])
    series = read_series(tmp_path)
    assert series.spacing_mm == (4.5, 1.75, 1.75) and offsets(series) == [4.5 * i for i in range(24)]
    assert len(series.notes) == 6  # one of each attribute
    assert all("decimal commas read as points (24 of 24 images)" in note for note in series.notes)


@pytest.mark.parametrize("slab_mm, thickness", [(60.0, 0.8), (140.0, 5.0)])
def test_partial_scans_are_not_doubted(tmp_path, slab_mm, thickness):
    num = int(slab_mm / thickness)
    scan(tmp_path, head(num), step=thickness, Modality="MR", SOPClassUID=MRImageStorage)
    series = read_series(tmp_path)
    assert len(series.frames) == num and series.doubts == [] and series.notes == []


# --- damaged and hostile files


def test_an_rle_frame_in_several_fragments_is_one_image(tmp_path):
    ds = pydicom.dcmread(write(tmp_path / "x", image(), RLELossless))
    (stream,) = generate_frames(ds.PixelData, number_of_frames=1)
    ds.PixelData = encapsulate([stream], fragments_per_frame=3)
    ds.save_as(tmp_path / "x")
    series = read_series(tmp_path)
    assert len(series.frames) == 1 and series.stored(0)[0, :3].tolist() == [0, 1, 2]


def test_pixel_data_longer_than_the_image_is_noted(tmp_path):
    for path in scan(tmp_path, head(), size=None):
        path.write_bytes(path.read_bytes().replace(b"(\0\x11\0US\2\0 \0", b"(\0\x11\0US\2\0\x0c\0"))
    series = read_series(tmp_path)
    assert len(series.frames) == 24
    assert noted(series, "PixelData of 2048 bytes is longer than 1 frames of 32 x 12", "24 of 24 images")


def test_compressed_files_that_end_early_count_as_damaged(tmp_path):
    scan(tmp_path, head(20))
    for i in range(2):
        path = write(tmp_path / f"deflated{i}", image(), DeflatedExplicitVRLittleEndian)
        path.write_bytes(path.read_bytes()[:-20])
    packed = gzip.compress((tmp_path / "I3").read_bytes())
    (tmp_path / "I3").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"3 of 22 images are damaged .*truncated"):
        read_series(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\0" * 3000, "in the header"])
def test_files_without_content_count_as_damaged(tmp_path, damage):
    for path in scan(tmp_path, head(20))[:3]:
        path.write_bytes(path.read_bytes()[:400] if damage == "in the header" else damage)
    with pytest.raises(ValueError, match="3 of 20 images are damaged"):
        read_series(tmp_path)


def absurd_files(folder: Path) -> dict[str, Path]:
    """Files that would cost a naive reader minutes or gigabytes."""
    os.mkfifo(folder / "fifo")
    tiny = image(pixels=np.zeros((1, 1)), NumberOfFrames=None)
    for name, size in (("sparse", 60_000_000), ("frames", 3_000_000_000)):
        data = write(folder / name, tiny).read_bytes()
        at = data.index(b"\xe0\x7f\x10\x00OW\0\0") + 8
        (folder / name).write_bytes(data[:at] + struct.pack("<I", size))
        os.truncate(folder / name, at + 4 + size)
    plain = write(folder / "elements", image()).read_bytes()
    at = plain.index(b"\x08\0\x16\0")
    (folder / "elements").write_bytes(gzip.compress(plain[:at] + b"\x08\0\x08\0CS\0\0" * 1_000_000))
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * 20_000
    pixels = plain.index(b"\xe0\x7f\x10\x00")
    groups = b"\x00\x52\x30\x92SQ\0\0" + struct.pack("<I", len(items)) + items
    (folder / "items").write_bytes(plain[:pixels] + groups + plain[pixels:])
    return {path.name: path for path in folder.iterdir()}


def test_absurd_files_are_refused_in_bounded_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dicom_file.MAX_HEADER_READS", 10_000)
    expected = {"fifo": "not a regular file", "sparse": "absurd size", "frames": "absurd size"}
    expected |= {"elements": "absurd header", "items": "absurd header"}
    files = absurd_files(tmp_path)
    assert files.keys() == expected.keys()
    for name, path in files.items():
        with pytest.raises(ValueError, match=expected[name]):
            read_header(path)
