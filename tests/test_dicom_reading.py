"""dicom.py, reading: files written here with pydicom and expectations worked by hand; where ../shared/dicom
exists, 53 real series against what other readers found in them."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import resource
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

import dicom
from dicom import find_series, make_frames, read_series, safe_uid
from dicom_file import decode, fast_header, one_line_errors, read_header, slow_header

pytestmark = pytest.mark.filterwarnings("ignore")
REAL = Path(__file__).resolve().parents[2] / "shared" / "dicom"
PLANES = {"axial": [1, 0, 0, 0, 1, 0], "coronal": [1, 0, 0, 0, 0, -1], "sagittal": [0, 1, 0, 0, 0, -1]}
LITTLE = [ImplicitVRLittleEndian, ExplicitVRLittleEndian]
SYNTAXES = [*LITTLE, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
SYNTAXES += [RLELossless, JPEG2000Lossless, JPEGLSLossless]
ROWS, COLS = 36, 40
SIZE = ROWS * COLS


def image(value: int = 0, **tags: object) -> Dataset:
    """A 36 x 40 CT slice whose pixels count up from `value`; a tag given as None is left out."""
    ds = Dataset()
    pixels = np.asarray(
        tags.pop("pixels", value + np.arange(SIZE).reshape(ROWS, COLS)), tags.pop("dtype", "u2")
    )
    bits = 8 * pixels.itemsize
    defaults = dict(
        SOPClassUID=CTImageStorage, Modality="CT", SeriesInstanceUID="1.2.3", PatientID="p", InstanceNumber=1,
        ImageOrientationPatient=PLANES["axial"], ImagePositionPatient=[-10.0, -20.0, 0.0],
        PixelSpacing=[0.5, 0.25], Rows=pixels.shape[-2], Columns=pixels.shape[-1], SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1,
        PixelRepresentation=int(pixels.dtype.kind == "i"), RescaleSlope=1, RescaleIntercept=-1024,
    )  # fmt: skip
    for name, tag_value in (defaults | tags).items():
        if tag_value is not None:
            setattr(ds, name, tag_value)
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OW"
    return ds


def write(path: Path, ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.setdefault("SOPInstanceUID", f"1.2.9.{zlib.crc32(str(path).encode())}")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
        CTImageStorage,
        ds.SOPInstanceUID,
    )
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
    if syntax == ExplicitVRBigEndian:  # OW: 16-bit words, also of 8-bit pixels
        ds.PixelData = np.frombuffer(ds.PixelData, "u2").byteswap().tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def stack(folder: Path, positions: list[float], **tags: object) -> list[Path]:
    """One slice per z position; InstanceNumber counts from 1, pixels count up from 100 times the index."""
    paths = []
    for i, z in enumerate(positions):
        values = {k: v[i] if isinstance(v, tuple) else v for k, v in tags.items()}
        values = {"ImagePositionPatient": [-10, -20, z], "InstanceNumber": i + 1} | values
        paths.append(write(folder / f"I{i + 1}", image(100 * i, **values)))
    return paths


def z_of(series: dicom.Series) -> list[float]:
    return [round(float(frame.position[2]), 3) for frame in series.frames]


def noted(series: dicom.Series, *words: str) -> bool:
    return any(all(word in note for word in words) for note in series.notes)


# --- which files, which series


def test_files_are_found_by_content_and_others_named(tmp_path):
    a, b, c, d = stack(tmp_path / "deep" / "er", [0, 1, 2, 3])
    b.rename(tmp_path / "deep" / "no ending")
    c.write_bytes(c.read_bytes()[132:])  # without preamble
    d.write_bytes(gzip.compress(d.read_bytes()))
    (tmp_path / "readme.txt").write_text("no DICOM")
    (tmp_path / "short.dcm").write_bytes(a.read_bytes()[:-10])
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2"
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    report = image(Modality="SR")
    del report.PixelData, report.Rows
    write(tmp_path / "report.dcm", report)
    series = read_series(tmp_path)
    assert z_of(series) == [0, 1, 2, 3]
    for i in range(4):
        assert series.stored(i)[0, :2].tolist() == [100 * i, 100 * i + 1]
    reasons = {path.name: reason for path, reason in series.skipped}
    expected = {
        "readme.txt": "not DICOM", "short.dcm": f"truncated: {2 * SIZE - 10}",
        "DICOMDIR": "not an image", "report.dcm": "no (7FE0,0010) PixelData",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[name] for name, text in expected.items()), reasons


def test_of_several_series_the_named_one_else_the_largest_is_read(tmp_path):
    stack(tmp_path / "a", [0, 1, 2], SeriesInstanceUID="1.2.1")
    stack(tmp_path / "b", [10, 11], SeriesInstanceUID="1.2.2")
    assert z_of(read_series(tmp_path)) == [0, 1, 2] and noted(
        read_series(tmp_path), "2 images of another series"
    )
    named = read_series(tmp_path, "1.2.2")
    assert z_of(named) == [10, 11] and named.uid == "1.2.2" and noted(named, "3 images of other series")
    other = read_series(tmp_path, "9.9")  # a folder renamed after it was written
    assert z_of(other) == [0, 1, 2] and other.uid == "9.9"


def test_series_are_found_by_the_uids_of_images_and_the_names_of_folders(tmp_path):
    (tmp_path / "1.2.840.5").mkdir()
    (tmp_path / "1.2.840.5" / "x.dcm").write_text("not an image")
    stack(tmp_path / "a", [0, 1], SeriesInstanceUID="1.2.7")
    moved = stack(tmp_path / "b", [2], SeriesInstanceUID="1.2.7")[0].rename(tmp_path / "b" / "moved")
    stack(tmp_path / "evil", [0], SeriesInstanceUID="../../x")
    stack(tmp_path / "none", [0], SeriesInstanceUID=None)
    (tmp_path / "train.csv").write_text("a,b")
    series, rejected = find_series(tmp_path)
    assert [path.name for path in series["1.2.840.5"]] == ["x.dcm"]
    assert [path.name for path in series["1.2.7"]] == ["I1", "I2", "moved"] and moved in series["1.2.7"]
    assert set(series) == {"1.2.840.5", "1.2.7", safe_uid("../../x"), "none"}
    assert [path.name for path, _ in rejected] == ["train.csv"]
    assert all(safe_uid(uid) == uid and "/" not in uid and len(uid) <= 64 for uid in series)


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    paths = stack(tmp_path / "disk" / "1.2.3", [0, 1, 2])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "series").symlink_to(tmp_path / "disk")
    (tmp_path / "src" / "twice").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "src")
    series, rejected = find_series(tmp_path / "src")
    assert list(series) == ["1.2.3"] and len(series["1.2.3"]) == len(paths) and rejected == []


@pytest.mark.parametrize("num_cut", [2, 3])  # of 20: a tenth may be lost, no more
def test_a_series_of_damaged_files_is_no_volume(tmp_path, num_cut):
    for path in stack(tmp_path, list(range(20)))[:num_cut]:
        path.write_bytes(path.read_bytes()[:-10])
    if num_cut == 2:
        assert len(read_series(tmp_path).frames) == 18
    else:
        with pytest.raises(ValueError, match=r"3 of 20 images are damaged .*truncated"):
            read_series(tmp_path)


def test_a_file_that_the_disk_does_not_give_fails_the_series(tmp_path, monkeypatch):
    stack(tmp_path, list(range(20)))

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("dicom_file.fast_header", stale)
    with pytest.raises(ValueError, match="Stale file handle; the disk is at fault"):
        read_series(tmp_path)


def test_scouts_other_orientations_and_sizes_are_left_out(tmp_path):
    stack(tmp_path / "a", [0, 1, 2])
    stack(tmp_path / "b", [0, 1, 2, 3], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    stack(tmp_path / "c", [0, 1], ImageOrientationPatient=PLANES["sagittal"])
    stack(tmp_path / "d", [0, 1], pixels=np.zeros((5, 5)))
    stack(tmp_path / "e", [0, 1], PixelSpacing=[0.5, 0.26])
    stack(tmp_path / "f", [3], ImageOrientationPatient=[1, 0.0005, 0, -0.0005, 1, 0])  # within 1e-3
    series = read_series(tmp_path)
    assert z_of(series) == [0, 1, 2, 3]
    assert noted(series, "4 images left out: scout") and noted(series, "5 x 5") and noted(series, "0.26 mm")
    assert noted(series, "normal [-1.  0.  0.]")


@pytest.mark.parametrize(
    "tags, reason",
    [
        ({"Modality": "CR"}, "Modality CR"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "tiled"),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, "projection"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
    ],
)
def test_what_is_no_volume_is_refused_with_the_reason(tmp_path, tags, reason):
    stack(tmp_path, [0], **tags)
    with pytest.raises(ValueError, match=reason) as error:
        read_series(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# --- geometry


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "oblique"])
def test_slices_are_sorted_along_the_normal_and_the_affine_maps_voxels_to_lps(tmp_path, plane):
    turn = cv2.Rodrigues(np.array([0.5, 0.3, 0.2]))[0]
    iop = [*turn[0], *turn[1]] if plane == "oblique" else PLANES[plane]
    row_dir, col_dir = np.array(iop[:3], float), np.array(iop[3:], float)
    normal, origin = np.cross(row_dir, col_dir), np.array([5.0, -7.0, 11.0])
    at = [4.0, 0.0, 6.0, 2.0]  # in the order of files
    stack(
        tmp_path, at, ImageOrientationPatient=[round(v, 12) for v in iop],
        ImagePositionPatient=tuple([round(v, 9) for v in origin + mm * normal] for mm in at),
    )  # fmt: skip
    series = read_series(tmp_path)
    assert [frame.path.name for frame in series.frames] == ["I2", "I4", "I1", "I3"]
    voxel = np.array([2, 3, 5, 1])  # (z, y, x, 1): spacing 2 mm, row 0.5, column 0.25
    expected = origin + 2 * 2.0 * normal + 3 * 0.5 * col_dir + 5 * 0.25 * row_dir
    np.testing.assert_allclose((series.affine @ voxel)[:3], expected, atol=1e-6)
    np.testing.assert_allclose(series.point(series.frames[2].sop_uid, 5, 3), expected, atol=1e-6)
    np.testing.assert_allclose(series.positions_mm - series.positions_mm[0], [0, 2, 4, 6], atol=1e-6)
    assert series.spacing_mm == pytest.approx((2.0, 0.5, 0.25)) and not series.notes
    assert series.plane == ("axial" if plane == "oblique" else plane)
    with pytest.raises(ValueError, match=r"no image 1\.2\.404"):
        series.point("1.2.404", 0, 0)


def test_a_missing_slice_stays_a_hole_and_is_noted(tmp_path):
    stack(tmp_path, [0, 2, 4, 8, 10])
    series = read_series(tmp_path)
    assert series.positions_mm.tolist() == [0, 2, 4, 8, 10] and noted(
        series, "1 gaps", "4.000 mm after slice 2"
    )


def test_an_image_uid_that_several_slices_share_places_no_point(tmp_path):
    stack(tmp_path, [0, 1, 2], SOPInstanceUID=("1.2.5", "1.2.5", "1.2.6"))
    series = read_series(tmp_path)
    assert len(series.frames) == 3 and series.point("1.2.6", 0, 0).tolist() == [-10, -20, 2]
    with pytest.raises(ValueError, match=r"no image 1\.2\.5"):
        series.point("1.2.5", 0, 0)


def test_gantry_tilt_shears_the_affine(tmp_path):
    c, s = np.cos(np.radians(15)), np.sin(np.radians(15))
    tilted = [1, 0, 0, 0, round(c, 12), round(s, 12)]  # the table still moves along z
    stack(tmp_path, [0, 3, 6], ImageOrientationPatient=tilted)
    series = read_series(tmp_path)
    np.testing.assert_allclose(series.affine[:3, 0], [0, 0, 3], atol=1e-9)
    np.testing.assert_allclose(series.positions_mm, np.array([0, 3, 6]) * c + 20 * s, atol=1e-6)
    assert noted(series, "tilted", f"{np.tan(np.radians(15)):.4f}")


def test_a_single_slice_is_a_volume(tmp_path):
    stack(tmp_path, [7], SliceThickness=3)
    series = read_series(tmp_path)
    assert len(series.frames) == 1 and series.spacing_mm == (3, 0.5, 0.25) and noted(series, "single slice")


@pytest.mark.parametrize(
    "key, values, kept",
    [
        ("EchoTime", (20, 90), "a"),
        ("TemporalPositionIdentifier", (2, 1), "b"),
        ("AcquisitionNumber", (8, 7), "b"),
        ("DiffusionBValue", (1000.0, None), "b"),
        ("ImageType", (["ORIGINAL", "PRIMARY", "P"], ["ORIGINAL", "PRIMARY", "M"]), "b"),
        ("SOPInstanceUID", ("1.2.5", "1.2.6"), "a"),  # nothing but the order tells: the lower InstanceNumber
    ],
)
def test_of_several_volumes_a_complete_one_is_read(tmp_path, key, values, kept):
    for folder, value in zip("ab", values, strict=True):
        own = tuple(f"{value}.{i}" for i in range(3)) if key == "SOPInstanceUID" else value
        numbers = (1, 3, 5) if folder == "a" else (2, 4, 6)
        stack(tmp_path / folder, [0, 2, 4], InstanceNumber=numbers, **{key: own})
    series = read_series(tmp_path)
    assert z_of(series) == [0, 2, 4] and noted(series, "kept (3 images)")
    assert {frame.path.parent.name for frame in series.frames} == {kept}
    assert len(series.geometry) == 6  # points on the other volume's images still have a place


def test_an_echo_with_a_missing_slice_is_not_mixed_with_the_other(tmp_path):
    stack(tmp_path / "a", list(range(12)), EchoTime=20)
    for path in stack(tmp_path / "b", list(range(12)), EchoTime=90)[3:4]:
        path.unlink()
    (tmp_path / "a" / "I8").unlink()
    series = read_series(tmp_path)
    assert {frame.path.parent.name for frame in series.frames} == {"a"} and len(series.frames) == 11


def test_copies_of_an_image_are_left_out_and_one_position_gives_one_slice(tmp_path):
    paths = stack(tmp_path / "a", [0, 1])
    (tmp_path / "copy").write_bytes(paths[0].read_bytes())
    assert z_of(read_series(tmp_path)) == [0, 1] and noted(read_series(tmp_path), "1 copies")
    stack(tmp_path / "same", [5, 5, 5], InstanceNumber=(7, 3, 5))
    series = read_series(tmp_path / "same")
    assert [frame.path.name for frame in series.frames] == ["I2"] and noted(series, "kept (1 images)")


def enhanced(
    positions: list, slopes: list[float], orientation: object = PLANES["axial"], **tags: object
) -> Dataset:
    """An enhanced file: position (z or x, y, z) and rescale by frame, orientation and spacing shared."""
    pixels = np.arange(len(positions) * SIZE).reshape(len(positions), ROWS, COLS)
    tags = {"pixels": pixels, "SliceThickness": 2} | tags
    ds = image(NumberOfFrames=len(positions), **tags)
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    del ds.RescaleSlope, ds.RescaleIntercept

    def group(sequence: str, **tags: object) -> Dataset:
        item, outer = Dataset(), Dataset()
        item.update(tags)
        setattr(outer, sequence, [item])
        return outer

    shared = group("PixelMeasuresSequence", PixelSpacing=[0.5, 0.25], SliceThickness=tags["SliceThickness"])
    if orientation is not None:
        shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=orientation))
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], []
    for mm, slope in zip(positions, slopes, strict=True):
        point = mm if isinstance(mm, list) else [0, 0, mm]
        frame = group("PlanePositionSequence", ImagePositionPatient=point)
        frame.update(group("PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept=0))
        ds.PerFrameFunctionalGroupsSequence.append(frame)
    return ds


def test_enhanced_frames_have_their_own_geometry_and_rescale(tmp_path):
    write(tmp_path / "e.dcm", enhanced([4, 0, 2], [1, 2, 3]))
    series = read_series(tmp_path)
    assert [frame.index for frame in series.frames] == [1, 2, 0] and z_of(series) == [0, 2, 4]
    assert [series.values(i)[0, 1] for i in range(3)] == [2 * (SIZE + 1), 3 * (2 * SIZE + 1), 1]
    sop = series.frames[0].sop_uid
    with pytest.raises(ValueError, match="several frames, and no frame is named"):
        series.point(sop, 4, 2)
    assert series.point(sop, 4, 2, f=2).tolist() == [
        1,
        1,
        2,
    ]  # column 4 of 0.25 mm, row 2 of 0.5 mm, z of frame 2


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_frames_of_a_stripped_multi_frame_file_are_counted_from_its_pixel_data(tmp_path, syntax):
    pixels = np.arange(3 * SIZE).reshape(3, ROWS, COLS)
    path = write(tmp_path / "m.dcm", image(pixels=pixels, NumberOfFrames=3, SpacingBetweenSlices=1.5), syntax)
    ds = pydicom.dcmread(path)
    del ds.NumberOfFrames, ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.SeriesInstanceUID
    ds.save_as(path)
    series = read_series(tmp_path)
    assert np.diff(z_of(series)).tolist() == [1.5, 1.5] and [series.stored(i)[0, 0] for i in range(3)] == [
        0,
        SIZE,
        2 * SIZE,
    ]
    assert noted(series, "1.5 mm", "SpacingBetweenSlices") and "axial assumed" in series.doubts[0]


# --- fallbacks


def test_without_positions_slice_location_then_instance_number_then_names_order_the_slices(tmp_path):
    none = {"ImagePositionPatient": None, "SliceThickness": 3}
    stack(tmp_path / "a", [0] * 3, SliceLocation=(9, 5, 7), **none)
    stack(tmp_path / "b", [0] * 3, InstanceNumber=(3, 1, 2), SpacingBetweenSlices=2, **none)
    stack(tmp_path / "c", [0] * 11, InstanceNumber=None, **none)
    a, b, c = (read_series(tmp_path / folder) for folder in "abc")
    assert z_of(a) == [5, 7, 9] and noted(a, "SliceLocation")
    assert (
        z_of(b) == [2, 4, 6]
        and [f.path.name for f in b.frames] == ["I2", "I3", "I1"]
        and noted(b, "InstanceNumber")
    )
    assert z_of(c)[:2] == [0, 3] and c.frames[10].path.name == "I11" and noted(c, "file names")


def test_one_slice_without_a_position_goes_where_its_number_says(tmp_path):
    stack(tmp_path, [0, 2, 4], ImagePositionPatient=([0, 0, 0], None, [0, 1, 4]))
    series = read_series(tmp_path)
    assert series.frames[1].position.tolist() == pytest.approx([0, 0.5, 2])
    assert noted(series, "no valid (0020,0032) ImagePositionPatient (1 of 3 images)")


def test_equal_positions_give_way_to_differing_slice_locations(tmp_path):
    stack(tmp_path, [0, 0, 0], SliceLocation=(3, 1, 2))
    series = read_series(tmp_path)
    assert [f.path.name for f in series.frames] == ["I2", "I3", "I1"] and noted(series, "SliceLocation")


def test_missing_orientation_and_spacing_are_assumed_and_noted(tmp_path):
    stack(tmp_path / "a", [0, 1], ImageOrientationPatient=[0, 0, 0, 0, 0, 0], PixelSpacing=None)
    a = read_series(tmp_path / "a")
    assert a.spacing_mm == (1, 1, 1) and a.plane == "axial"
    assert noted(a, "ImageOrientationPatient in 2 of 2 images: axial by their positions")
    assert noted(a, "PixelSpacing: 1 mm assumed (2 of 2 images)")
    assert a.doubts == ["no valid (0028,0030) PixelSpacing: 1 mm assumed (2 of 2 images)"]


def test_an_attribute_that_does_not_parse_counts_as_missing_and_is_noted(tmp_path):
    path = stack(tmp_path, [0, 1, 2])[1]
    path.write_bytes(path.read_bytes().replace(b"-10.0\\-20.0\\1", b"-10.0\\-2O.0\\1"))
    series = read_series(tmp_path)
    assert z_of(series) == [0, 1, 2] and noted(series, "(0020,0032) ImagePositionPatient does not parse")


# --- values


def test_rescale_belongs_to_each_slice(tmp_path):
    stack(tmp_path, [0, 1], RescaleSlope=(1, 2), RescaleIntercept=(-1024, -1000))
    series = read_series(tmp_path)
    assert series.values(0)[0, 1] == 1 - 1024 and series.values(1)[0, 1] == 2 * 101 - 1000


def head(air: int, soft: int, dtype: str) -> np.ndarray:
    """32 x 32: air around a head of soft tissue with a little bone."""
    pixels = np.full((32, 32), air, dtype)
    pixels[8:24, 8:24], pixels[8, 8:24] = soft, soft + 600
    return pixels


def test_ct_in_hu_is_not_shifted_by_an_intercept_of_minus_1024(tmp_path):
    stack(tmp_path / "hu", [0, 1], pixels=head(-1000, 40, "i2"), dtype="i2")
    stack(tmp_path / "shifted", [0, 1], pixels=head(24, 1064, "i2"), dtype="i2")
    hu, shifted = read_series(tmp_path / "hu"), read_series(tmp_path / "shifted")
    for series in (hu, shifted):
        assert series.values(0)[0, 0] == -1000 and series.values(0)[12, 12] == 40
    assert noted(hu, "stored values are HU") and hu.rescale(0) == (1, 0) and not shifted.notes


def test_unsigned_ct_without_intercept_is_shifted(tmp_path):
    stack(tmp_path, [0, 1], pixels=head(24, 1064, "u2"), RescaleIntercept=None)
    series = read_series(tmp_path)
    assert series.values(0)[12, 12] == 40 and noted(series, "RescaleIntercept in 2 CT images: -1024 assumed")


def test_monochrome1_is_inverted_only_if_that_makes_the_background_dark(tmp_path):
    mono1 = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "Modality": "MR"}
    tags = mono1 | {"RescaleIntercept": 0}
    stack(tmp_path / "bright", [0, 1], pixels=np.pad(np.full((20, 20), 95), 2, constant_values=4095), **tags)
    stack(tmp_path / "dark", [0, 1], pixels=np.pad(np.full((20, 20), 95), 2), **tags)
    bright, dark = read_series(tmp_path / "bright"), read_series(tmp_path / "dark")
    assert bright.values(0)[0, 0] == 0 and bright.values(0)[9, 9] == 4000 and bright.rescale(0) == (-1, 4095)
    assert (
        dark.values(0)[0, 0] == 0
        and dark.values(0)[9, 9] == 95
        and noted(bright, "inverted")
        and not dark.notes
    )


def test_padding_is_compared_in_stored_units(tmp_path):
    pixels = np.array([[-2000, -1995, 0, 24]], "i2")
    tags = {"pixels": pixels, "dtype": "i2", "RescaleIntercept": 0}
    stack(tmp_path / "a", [0], PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990, **tags)
    stack(tmp_path / "b", [0], PixelPaddingValue=0, **tags)
    a, b = read_series(tmp_path / "a"), read_series(tmp_path / "b")
    assert a.values(0).tolist() == [[-1024, -1024, 0, 24]] and a.padding(0) == (-2000, -1990)
    assert b.values(0).tolist() == [[-2000, -1995, 0, 24]] and noted(b, "PixelPaddingValue 0 would be tissue")


@pytest.mark.parametrize(
    "raw, dtype, stored, high, expected",
    [
        (0xF801, "u2", 12, 11, 0x801),
        (0xF801, "i2", 12, 11, -0x7FF),
        (0x1234, "u2", 12, 15, 0x123),
        (0xFFFF, "i2", 16, 15, -1),
        (0x81, "i1", 8, 7, -127),
        (0x80000001, "u4", 31, 30, 1),
        (0xFFFF, "u2", 99, 3, 0xFFFF),  # senseless: as allocated
    ],
)
def test_stored_values_are_masked_to_bits_stored_and_sign_extended(
    tmp_path, raw, dtype, stored, high, expected
):
    pixels = np.full((2, 2), raw, dtype.replace("i", "u")).view(dtype)
    stack(tmp_path, [0], pixels=pixels, dtype=dtype, BitsStored=stored, HighBit=high)
    assert read_series(tmp_path).stored(0).tolist() == [[expected] * 2] * 2


@pytest.mark.parametrize(
    "syntax",
    SYNTAXES,
)
@pytest.mark.parametrize("dtype, bits", [("u2", 12), ("i2", 16), ("u1", 8)])
def test_every_lossless_transfer_syntax_gives_the_same_stored_values(tmp_path, syntax, dtype, bits):
    pixels = np.random.default_rng(0).integers(0, 2 ** (bits - 1), (ROWS, COLS)).astype(dtype)
    pixels = pixels - pixels.max() // 2 if dtype == "i2" else pixels
    write(tmp_path / "x", image(pixels=pixels, dtype=dtype, BitsStored=bits, HighBit=bits - 1), syntax)
    series = read_series(tmp_path)
    assert series.stored(0).tolist() == pixels.tolist() and series.transfer_syntax == syntax


def test_jpeg_baseline_and_colour_become_grey(tmp_path):
    grey = np.tile(np.arange(64, dtype="u1") * 4, (64, 1))
    colour = np.zeros((64, 64, 3), "u1")
    colour[..., 0] = 100  # red: 0.299 x 100
    rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    for name, pixels, tags in (("grey", grey, {}), ("jpeg", grey, {}), ("rgb", colour, rgb)):
        ds = image(pixels=pixels, dtype="u1", Rows=64, Columns=64, **tags)
        if name == "jpeg":
            ds.PixelData = encapsulate([cv2.imencode(".jpg", grey)[1].tobytes()])
            ds["PixelData"].is_undefined_length = True
        write(tmp_path / name / "x", ds, JPEGBaseline8Bit if name == "jpeg" else ExplicitVRLittleEndian)
    grey_, jpeg, rgb_ = (read_series(tmp_path / name).stored(0) for name in ("grey", "jpeg", "rgb"))
    assert grey_.tolist() == grey.tolist() and np.abs(jpeg.astype(int) - grey).max() <= 3
    assert (rgb_ == 30).all()
    report = image(pixels=colour, dtype="u1", Rows=64, Columns=64, ImagePositionPatient=None, **rgb)
    write(tmp_path / "report" / "x", report)
    with pytest.raises(ValueError, match="report or screenshot"):
        read_series(tmp_path / "report")


# --- what is broken or hostile


def test_a_missing_decoder_is_named_with_its_package(tmp_path, monkeypatch):
    write(tmp_path / "x", image(), JPEGLSLossless)
    monkeypatch.setattr("dicom_file.get_decoder", lambda uid: type("D", (), {"is_available": False}))
    series = read_series(tmp_path)
    with pytest.raises(
        ValueError, match=r"JPEG-LS Lossless.*1\.2\.840\.10008\.1\.2\.4\.80.*pyjpegls"
    ) as error:
        series.stored(0)
    assert str(tmp_path / "x") in str(error.value)


class PanicException(BaseException):
    """As pylibjpeg-rle raises."""


@pytest.mark.parametrize(
    "raised, expected", [(PanicException, ValueError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_whatever_a_decoder_raises_is_a_reason_but_interrupts_pass(tmp_path, monkeypatch, raised, expected):
    def fail(uid: str) -> None:
        raise raised("index out of bounds")

    write(tmp_path / "x", image(), RLELossless)
    series = read_series(tmp_path)
    series.forget()  # what the look at its values has decoded
    monkeypatch.setattr("dicom_file.get_decoder", fail)
    with pytest.raises(expected, match="index out of bounds"):
        series.stored(0)


def test_bombs_and_absurd_headers_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    write(tmp_path / "huge.dcm", image(Rows=60000, Columns=60000))
    write(tmp_path / "frames.dcm", image(NumberOfFrames=2**31 - 1))
    stream = write(tmp_path / "stream.dcm", image(), JPEG2000Lossless)
    data = stream.read_bytes()
    at = data.index(b"\xff\x4f\xff\x51") + 8
    stream.write_bytes(data[:at] + b"\0\0\xff\xff\0\0\xff\xff" + data[at + 8 :])
    write(tmp_path / "deflated.dcm", image(pixels=np.zeros((1000, 1000))), DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("dicom_file.MAX_UNPACKED_BYTES", 2**20)
    series = read_series(tmp_path)
    reasons = {path.name: reason for path, reason in series.skipped}
    assert "absurd size" in reasons["huge.dcm"] and "absurd size" in reasons["frames.dcm"]
    assert "1 MiB: a decompression bomb" in reasons["deflated.dcm"]
    with pytest.raises(
        ValueError, match=r"\(65535, 65535, 1\) rows, columns, samples; the header says \(36, 40, 1\)"
    ):
        series.stored(0)


def test_stored_values_are_kept_until_forgotten(tmp_path):
    paths = stack(tmp_path, [0, 1])
    series = read_series(tmp_path)
    first = series.stored(0)
    for path in paths:
        path.unlink()
    assert series.stored(0) is first
    series.forget(0)
    with pytest.raises(ValueError, match="I1"):
        series.stored(0)


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """A few bytes changed, most of them in the header; or a piece cut out, doubled, or the end cut off."""
    data = bytearray(data)
    reach = len(data) if rng.random() < 0.3 else min(len(data), 1500)
    start = int(rng.integers(132, reach))
    kind = rng.integers(0, 8)
    if kind < 5:
        for at in rng.integers(132, reach, rng.integers(1, 6)):
            data[at] = rng.choice(
                [0, 1, 0xFF, 0x7F, 0x80, int(rng.integers(256)), data[at] ^ 1 << rng.integers(8)]
            )
    elif kind == 5:
        del data[start : start + int(rng.integers(1, 40))]
    elif kind == 6:
        data[start:start] = data[start : start + int(rng.integers(1, 40))]
    else:
        del data[start:]
    return bytes(data)


def bases(folder: Path) -> list[bytes]:
    """Small valid files of every form, to be mutated."""
    syntaxes = [*SYNTAXES, ExplicitVRLittleEndian]
    nested = Dataset()
    nested.ReferencedImageSequence = [Dataset()]
    nested.ReferencedImageSequence[0].ReferencedSOPInstanceUID = "1.2"
    nested["ReferencedImageSequence"].is_undefined_length = True
    files = []
    for i, syntax in enumerate(syntaxes):
        ds = enhanced([5, 6], [1, 2]) if i == 7 else image(ImagePositionPatient=[-10, -20, 5], EchoTime=3)
        ds.ReferencedStudySequence = [nested]
        ds["ReferencedStudySequence"].is_undefined_length = i % 2 == 0
        files.append(write(folder / f"base{i}", ds, syntax).read_bytes())
    return files


def outcome(read: object, path: Path) -> object:
    try:
        return read(path)
    except ValueError as error:
        return str(error)


def test_the_fast_header_equals_pydicoms_on_mutated_files(tmp_path):
    rng, files, num_fast = np.random.default_rng(1), bases(tmp_path), 0
    slow = one_line_errors(slow_header)
    for i in range(600):
        path = tmp_path / "mutated"
        path.write_bytes(mutated(rng, files[(0, 1, 4)[i % 3]]))
        fast = outcome(fast_header, path)
        if fast is not None:
            num_fast += 1
            assert fast == outcome(slow, path), i
    assert num_fast > 200  # the comparison compares something


def fuzz(job: tuple[Path, int]) -> dict[str, int]:
    """Reads 100 mutated files, each beside two good ones that have to survive. Runs in a worker."""
    folder, seed = job
    rng, files = np.random.default_rng([2, seed]), sorted(folder.glob("base*"))
    path, ends = folder / f"mutated{seed}", {"read": 0, "skipped": 0, "refused": 0}
    for i in range(100):
        path.write_bytes(mutated(rng, files[i % len(files)].read_bytes()))
        series = read_series([folder / "good" / "I1", folder / "good" / "I2", path], "1.2.3")
        ends["skipped"] += bool(series.skipped)
        for j, frame in enumerate(series.frames):
            try:
                values = series.values(j)
                assert values.shape == (frame.rows, frame.cols) and np.isfinite(values).all()
                ends["read"] += frame.path == path
            except ValueError as error:
                assert frame.path == path and "\n" not in str(error)
                ends["refused"] += 1
    return ends


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))


def test_two_thousand_mutated_files_are_read_or_refused(tmp_path):
    bases(tmp_path)
    stack(tmp_path / "good", [0, 1])
    jobs = [(tmp_path, seed) for seed in range(20)]
    ends = {"read": 0, "skipped": 0, "refused": 0}
    with ProcessPoolExecutor(2, initializer=limit_memory) as pool:
        for result in pool.map(fuzz, jobs, timeout=300):
            ends = {end: count + result[end] for end, count in ends.items()}
    assert ends["read"] > 300 and ends["skipped"] > 300, ends


# --- real series


def real(name: str) -> dict:
    return json.loads((REAL / "expected" / f"{name}.json").read_text())


needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
NAMES = sorted(path.stem for path in (REAL / "expected").glob("*.json"))
NO_VOLUME = {"mra_rotating_mip_tiny", "ct_philips_scout", "ct_philips_exam_summary"}


@needs_real
@pytest.mark.parametrize("name", NAMES)
def test_real_series_have_the_expected_geometry_and_values(name):
    expected = real(name)
    if expected["main_group"] is None or name in NO_VOLUME:
        with pytest.raises(ValueError, match=r"tiled in one image|projection|scout"):
            read_series(REAL / name)
        return
    series = read_series(REAL / name)
    shape = (series.frames[0].rows, series.frames[0].cols)
    group = next(
        g for g in expected["groups"]
        if (g["rows"], g["cols"]) == shape and g.get("n_positions") == len(series.frames)
        and np.allclose(g["normal_lps"], series.normal, atol=1e-4)
    )  # fmt: skip
    order = [[str(f.path.relative_to(REAL / name)), f.index] for f in series.frames]
    if group["frames_per_position"] == [1, 1]:
        assert order == [entry[:2] for entry in group["order_along_normal"]]
    np.testing.assert_allclose(
        series.positions_mm, [entry[2] for entry in group["order_along_normal"]], atol=2e-3
    )
    if group.get("affine_exact"):
        theirs = np.array(group["affine_lps_col_row_slice"])[:, [2, 1, 0, 3]]
        corner = [len(series.frames) - 1, shape[0] - 1, shape[1] - 1, 1]
        np.testing.assert_allclose(series.affine @ corner, theirs @ corner, atol=5e-3)
    if "shear_deg" in group and group["shear_deg"] is not None:
        assert noted(series, "tilted") == (np.radians(group["shear_deg"]) > 1e-3)
    for sample in group.get("samples", []):
        if [sample["file"], sample["frame"]] in order:
            i = order.index([sample["file"], sample["frame"]])
            stored, padding = series.stored(i)[sample["row"], sample["col"]], series.padding(i)
            if padding and padding[0] <= stored <= padding[1]:
                continue
            if series.frames[i].header["SamplesPerPixel"] == 3:  # theirs is the mean of the colours
                continue
            value = series.values(i)[sample["row"], sample["col"]]
            assert value == pytest.approx(sample["value"], rel=1e-5, abs=1e-3)
            lps = series.point(series.frames[i].sop_uid, sample["col"], sample["row"], sample["frame"])
            np.testing.assert_allclose(lps, sample["lps"], atol=5e-3)


@needs_real
@pytest.mark.parametrize("name", NAMES)
def test_real_files_decode_to_the_expected_stored_values(name):
    for file in real(name)["files"]:
        path = REAL / name / file["file"]
        if "stored_sha1" not in file or file["modality"] in ("SEG", "NM"):
            continue
        header = read_header(path) | {"Modality": "MR", "ImageType": ""}  # also what is no volume has pixels
        if header["SamplesPerPixel"] == 3:
            continue
        values = np.stack([decode(frame) for frame in make_frames(path, header)]).astype("<i8")
        assert hashlib.sha1(values.tobytes()).hexdigest()[:12] == file["stored_sha1"], path


@needs_real
def test_the_fast_header_equals_pydicoms_on_real_files():
    num_fast, slow = 0, one_line_errors(slow_header)
    for path in (path for name in NAMES for path in sorted((REAL / name).rglob("*")) if path.is_file()):
        fast = outcome(fast_header, path)
        if fast is not None:
            num_fast += 1
            assert fast == outcome(slow, path), path
    assert num_fast > 300
