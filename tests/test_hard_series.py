"""Series with the troubles that people report: each comes out right, or is refused or doubted."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames
from test_dicom_reading import IPP, PLANES, enhanced, folders, image, names, noted, offsets, stack, write

from dicom import VolumeSettings, make_volume, read_series
from frames import EXPLICIT, read_header

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = VolumeSettings(img_size=64)
NORMALS = {"axial": [0, 0, 1], "coronal": [0, 1, 0], "sagittal": [-1, 0, 0]}  # row x column direction
WORDS = ["MIP ", "CT_SOM5 MIP", "MAX_IP", "MIP_TRA", "PROJECTION IMAGE", "MINIP", "LOCALIZER "]
# IP: in phase, not an intensity projection
MR = {"Modality": "MR", "SOPClassUID": uid.MRImageStorage, "RescaleIntercept": 0, "ImageType": ["M", "IP"]}
PASSES = {"InstanceNumber": tuple(1 + i // 2 + 12 * (i % 2) for i in range(24))}  # even images first
PASSES["AcquisitionNumber"] = (1, 2) * 12
SOUND = [(24, 4, PASSES), (24, 4, MR | PASSES), (75, 0.8, MR), (18, 5, MR), (5, 5, {})]
SPOILED = {  # fault -> what it makes of the positions p (num, 3)
    "to 5 mm": lambda p: 5 * np.round(p / 5),
    "rounded": np.trunc,
    "one position": lambda p: np.full(p.shape, [-108.8, -108.8, -383.447]),
    # the rest tells in which direction numbers run
    "half unknown": lambda p: p * (np.arange(len(p)) % 2)[:, None],
    "half at one place": lambda p: np.r_[[p[len(p) // 4]] * (len(p) // 2), p[len(p) // 2 :]],
}
FAULTS = [*SPOILED, "a third missing", "jitter", "no orientation", "orientation of some"]
FAULTS += ["rounded, no orientation", "rounded, jitter"]


def head(n: int = 24, vessel: float = 40, size: int = 32) -> np.ndarray:
    """(n, size, size) HU + 1024: a cone of brain in a skull, wide at slice 0, with a vessel in it."""
    y, x = np.mgrid[:size, :size] - size / 2
    distance, radius = np.hypot(x, y), 13 - 10 * np.arange(n)[:, None, None] / n
    hu = np.select([distance < 1.5, distance < radius - 2, distance < radius], [vessel, 40, 700], -1000)
    return (hu + 1024).astype("u2")


def scan(folder: Path, pixels: np.ndarray, /, plane="axial", start=0.0, step=4.0, first=1, **tags) -> list:
    """A file per image, `step` mm apart along the normal; a tuple has a value for each image."""
    places = start + step * np.arange(len(pixels))
    defaults = {
        IPP: tuple((np.outer(places, NORMALS[plane]) - 50).round(6).tolist()), "SliceThickness": abs(step),
        "ImageOrientationPatient": PLANES[plane], "PixelSpacing": [5.0, 5.0], "pixels": tuple(pixels),
        "InstanceNumber": tuple(range(first, first + len(pixels))),
    }  # fmt: skip
    return stack(folder, places, **(defaults | tags))


TURNS = {"AcquisitionNumber": tuple(1 + i // 4 for i in range(24))}  # one per turn of the tube
SLABS = {"SliceThickness": 20.0, "start": 2.0, "first": 201}
FILLED, AT_SLICE_13 = {"pixels": tuple(head(vessel=300))}, {"start": 52.0, "step": 0.0, "SliceThickness": 4.0}
AT_SLICE_13["pixels"] = (head()[13],) * 20
SHUFFLED = head()[np.random.default_rng(0).permutation(24)]
BOLUS = np.repeat(head(1), 24, axis=0)
BOLUS[:, 16, 16] = np.linspace(1064, 1400, 24)  # it arrives
MIRRORED = (PLANES["axial"], [-1, 0, 0, 0, 1, 0]) * 12


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
@pytest.mark.parametrize("shifts, plain, arterial", [
    ([0.0, 1.7, 2.0], {"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
    ([0.0, 1.7, 2.0], {}, {"first": 101}),
    ([0.0, 1.7, 2.0], {"AcquisitionTime": "101500"}, {"AcquisitionTime": "101530"}),
    # 2 mm apart these are one volume of even and odd slices
    ([0.0, 1.7], {"InstanceNumber": tuple(range(1, 48, 2))}, {"InstanceNumber": tuple(range(2, 49, 2))}),
])  # fmt: skip
def test_of_two_ct_phases_the_one_with_filled_vessels_is_read(tmp_path, shifts, plane, plain, arterial):
    for shift in shifts:
        folder = tmp_path / str(shift)
        scan(folder / "a", head(vessel=40), plane, **plain)
        scan(folder / "b", head(vessel=400), plane, start=shift, **arterial)
        for i, path in enumerate(sorted(folder.glob("?/*"))):
            path.rename(folder / f"{29 * i % 48}{path.parent.name}")  # so that names tell nothing
        series = read_series(folder)
        assert {name[-1] for name in names(series)} == {"b"}
        assert offsets(series) == [4.0 * i for i in range(24)]
        assert series.doubts == [] and noted(series, "volumes by")


@pytest.mark.parametrize("num, step, tags", SOUND)
def test_sound_and_partial_scans_have_neither_notes_nor_doubts(tmp_path, num, step, tags):
    series = read_series(scan(tmp_path, head(num), step=step, **tags))
    assert len(series.frames) == num and series.notes == [] and make_volume(series, SETTINGS).doubts == []


@pytest.mark.parametrize("shared", [{"SeriesInstanceUID": None}, MR])
@pytest.mark.parametrize("tags, num, others, note", [
    ({}, 6, SLABS | {"step": 16.0}, "thicker"),
    ({}, 24, SLABS, "thicker"),
    ({}, 24, {"start": -1.7, "first": 101}, "volumes by"),  # a later phase
    ({"first": 101}, 12, {"start": 17.7}, "volumes by"),  # an earlier, shorter one
    (TURNS | {"first": 2}, 1, {"start": 48.0}, "images"),  # bolus tracking
    (TURNS | {"InstanceNumber": tuple(range(25, 1, -1))}, 1, {"start": 48.0}, "images"),
    (FILLED | {"first": 21}, 20, AT_SLICE_13, "images"),  # bolus tracking before them
    (FILLED | {"first": 13}, 12, {"pixels": tuple(head(vessel=90))}, "images"),  # half of an earlier phase
])  # fmt: skip
def test_slices_are_read_without_the_others_among_them(tmp_path, shared, tags, num, others, note):
    scan(tmp_path / "slices", head(), **shared | tags)
    scan(tmp_path / "others", head(num), **shared | others)
    series = read_series(tmp_path)
    assert folders(series) == {"slices"} and offsets(series) == [4.0 * i for i in range(24)]
    assert noted(series, note) and series.doubts == []


@pytest.mark.parametrize("step, start, first", [(5.0, 30.0, 13), (2.5, 120.0, 31)])
def test_a_change_of_thickness_or_a_hole_costs_no_slices(tmp_path, step, start, first):
    scan(tmp_path / "base", head(12), step=2.5)
    scan(tmp_path / "vertex", head(12), start=start, step=step, first=first)
    assert len(read_series(tmp_path).frames) == 24


@pytest.mark.parametrize("words", WORDS)
def test_projections_and_scouts_are_known_by_words_of_the_image_type(tmp_path, words):
    scan(tmp_path / "slices", head(10))
    scan(tmp_path / "others", head(), start=1.0, ImageType=["DERIVED ", "SECONDARY", words])
    assert folders(read_series(tmp_path)) == {"slices"}
    with pytest.raises(ValueError, match=r"1 (projection|scout) images, no volume"):
        read_series(tmp_path / "others" / "I1")


def spoil(fault: str, plane: str, num: int, step: float) -> tuple[list, list]:
    """Positions and orientations of `num` images, `step` mm apart, with a fault."""
    points = step * np.outer(range(num), NORMALS[plane])
    noise = np.random.default_rng(0).uniform(-0.012, 0.012, (num, 6))
    noise[0] = 0.012  # the first is the worst
    orientations = (PLANES[plane] + noise * ("jitter" in fault)).round(5).tolist()
    points = SPOILED.get(fault.split(",")[0], np.copy)(points).tolist()
    if fault == "a third missing":
        points[::3] = [None] * len(points[::3])
    if "orientation" in fault:
        step = 1 if "no orientation" in fault else 3
        orientations[::step] = [None] * len(orientations[::step])
    return points, orientations


@pytest.mark.parametrize("is_enhanced", [False, True])
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("num, step", [(24, 4.0), (60, -0.5), (40, 0.7)])
@pytest.mark.parametrize("fault", FAULTS)
def test_images_keep_their_places_in_spite_of_a_fault(tmp_path, is_enhanced, plane, num, step, fault):
    points, orientations = spoil(fault, plane, num, step)
    if is_enhanced:
        ds = enhanced(points, [1] * num, orientations, pixels=head(num), SliceThickness=abs(step))
        write(tmp_path / "e.dcm", ds)
    else:
        tags = {"AcquisitionNumber": tuple(range(num)), "ImageOrientationPatient": tuple(orientations)}
        scan(tmp_path, head(num), step=step, **{IPP: tuple(points)}, **tags)
    series = read_series(tmp_path)
    numbers = [frame.header["InstanceNumber"] + frame.index for frame in series.frames]
    assert numbers == sorted(range(1, num + 1), reverse=step < 0 and fault != "one position")
    np.testing.assert_allclose(np.diff(series.positions_mm), abs(step), rtol=0.02)
    assert series.plane == plane and series.doubts == []
    assert noted(series, f"InstanceNumber times {abs(step):g} mm") or fault != "one position"
    assert noted(series, "ImageOrientationPatient in", plane) or "orientation" not in fault


@pytest.mark.parametrize("pixels, tags, doubt", [
    (SHUFFLED, {IPP: [0, 0, 0], "InstanceNumber": None}, "24 images without plausible positions"),
    (BOLUS, {IPP: [0, 0, 0]}, "24 images without plausible positions"),
    (head(), {IPP: None, "ImageOrientationPatient": None}, "axial assumed"),
    (head(), {"ImageOrientationPatient": MIRRORED}, "12 of 24 images"),
    (head(), {IPP: ([0, 0, 0], [0, 0, 4], [0, 0, 8]) * 8}, "3 slices of 24 images"),
    (head(40), {"step": 0.4, "SliceThickness": 4.0}, "too little of a head: slices: 40, 16 x 160"),  # in cm
    (head(5), {"step": 3.9}, "too little of a head: slices: 5, 19.5 x 160 x 160 mm"),
    (head(4), MR, "too little of a head: slices: 4, 16 x 160 x 160 mm (z, y, x); expected: 5, 25 mm"),
    (head(1), {}, "too little of a head: slices: 1, 4 x 160 x 160 mm (z, y, x); expected: 5, 25 mm"),
])  # fmt: skip
def test_a_guess_a_tiny_scan_and_less_than_five_slices_are_doubted(tmp_path, pixels, tags, doubt):
    scan(tmp_path, pixels, **tags)
    assert doubt in make_volume(read_series(tmp_path), SETTINGS).doubts[0]


@pytest.mark.parametrize("moved, num, note", [
    ({7: 61.3}, 23, "1 images left out: far"),
    ({23: 117.0}, 23, "1 images left out: far"),  # 25 mm above the last but one
    ({0: 92.0, 23: 0.0}, 22, "2 images left out: far"),  # swapped
])  # fmt: skip
def test_slices_that_their_numbers_contradict_are_left_out(tmp_path, moved, num, note):
    points = tuple([0.0, 0.0, moved.get(i, 4.0 * i)] for i in range(24))
    series = read_series(scan(tmp_path, head(), ImagePositionPatient=points))
    assert len(series.frames) == num and noted(series, note, f"{next(iter(moved.values()))}]")


@pytest.mark.parametrize("is_other", [np.arange(24) % 2 == 1, np.isin(np.arange(24), [5, 9, 14])])
def test_slices_whose_intercept_is_lost_get_that_of_hu(tmp_path, is_other):
    intercepts = tuple(np.where(is_other, 0, -1024).tolist())
    series = read_series(scan(tmp_path, head(), RescaleIntercept=intercepts))
    assert {frame.intercept for frame in series.frames} == {-1024.0} and series.doubts == []
    assert noted(series, "HU only with RescaleIntercept -1024")


def test_images_that_nothing_tells_apart_are_refused(tmp_path):
    points = tuple([0, 0, mm] for mm in [0.3] * 5 + [7.1] + [9.7] * 3 + [20.2] * 3)
    scan(tmp_path, np.zeros((12, 8, 8)), ImagePositionPatient=points, InstanceNumber=1)
    with pytest.raises(ValueError, match="12 images share 4 positions"):
        read_series(tmp_path)


def test_decimal_commas_are_read_as_points_and_noted_once(tmp_path):
    for path in scan(tmp_path, head(), step=4.5, PixelSpacing=[1.75, 1.75], SliceThickness=4.5):
        header, mark, pixels = path.read_bytes().partition(b"\xe0\x7f\x10\x00")
        header = re.sub(rb"(?<=[0-9])\.(?=[0-9]+[ \\])", b",", header.replace(b"-50.0\\", b"-50,0\\"))
        path.write_bytes(header + mark + pixels)
    series = read_series(tmp_path)
    assert series.spacing_mm == (4.5, 1.75, 1.75) and offsets(series) == [4.5 * i for i in range(24)]
    assert len(series.notes) == 6 and series.doubts == []  # one of each attribute
    assert all("decimal commas read as points (24 of 24 images)" in note for note in series.notes)


def test_an_rle_frame_in_several_fragments_is_one_image(tmp_path):
    ds = pydicom.dcmread(write(tmp_path / "x", image(), uid.RLELossless))
    (stream,) = generate_frames(ds.PixelData, number_of_frames=1)
    ds.PixelData = encapsulate([stream], fragments_per_frame=3)
    ds.save_as(tmp_path / "x")
    series = read_series(tmp_path)
    assert len(series.frames) == 1 and series.stored(0)[0, :3].tolist() == [0, 1, 2]


def test_pixel_data_longer_than_the_image_is_noted(tmp_path):
    for path in scan(tmp_path, head()):
        path.write_bytes(path.read_bytes().replace(b"(\0\x11\0US\2\0 \0", b"(\0\x11\0US\2\0\x0c\0"))
    series = read_series(tmp_path)
    assert len(series.frames) == 24
    assert noted(series, "PixelData of 2048 bytes is longer", "32 x 12", "24 of 24 images")


@pytest.mark.parametrize("syntax, damage", [
    (EXPLICIT, lambda data: data[:-10]), (EXPLICIT, lambda data: data[:400]), (EXPLICIT, lambda data: b""),
    (EXPLICIT, lambda data: bytes(3000)), (EXPLICIT, lambda data: gzip.compress(data)[:-100]),
    (uid.DeflatedExplicitVRLittleEndian, lambda data: data[:-20]),
])  # fmt: skip
def test_a_tenth_of_the_files_may_be_damaged_but_no_more(tmp_path, syntax, damage):
    for num, path in enumerate(scan(tmp_path, head(20))[:3]):
        assert len(read_series(tmp_path).frames) == 20 - num
        write(path, pydicom.dcmread(path), syntax)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="3 of 20 images are damaged"):
        read_series(tmp_path)


def test_absurd_files_are_refused_in_bounded_time_and_memory(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    write(tmp_path / "rows", image(Rows=60000, Columns=60000))
    write(tmp_path / "number", image(NumberOfFrames=2**31 - 1))
    write(tmp_path / "bomb", image(pixels=np.zeros((3000, 3000))), uid.DeflatedExplicitVRLittleEndian)
    for name, size in (("sparse", 60_000_000), ("frames", 3_000_000_000)):
        data = write(tmp_path / name, image(pixels=[[0]])).read_bytes()
        (tmp_path / name).write_bytes(data[:-6] + size.to_bytes(4, "little"))  # of the pixel data
        os.truncate(tmp_path / name, len(data) - 2 + size)
    plain = write(tmp_path / "elements", image()).read_bytes()
    start = plain.index(b"\x08\0\x16\0")
    (tmp_path / "elements").write_bytes(gzip.compress(plain[:start] + b"\x08\0\x08\0CS\0\0" * 1_000_000))
    header, mark, pixels = plain.partition(b"\xe0\x7f\x10\x00")
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * 20_000
    groups = b"\x00\x52\x30\x92SQ\0\0" + len(items).to_bytes(4, "little") + items
    (tmp_path / "items").write_bytes(header + groups + mark + pixels)
    monkeypatch.setattr("frames.MAX_HEADER_READS", 10_000)
    monkeypatch.setattr("frames.MAX_UNPACKED_BYTES", 2**24)
    expected = {"fifo": "regular file", "bomb": "bomb", "elements": "absurd header", "items": "absurd header"}
    expected |= dict.fromkeys(["sparse", "frames", "rows", "number"], "absurd size")
    for name, reason in expected.items():
        with pytest.raises(ValueError, match=reason):
            read_header(tmp_path / name)
