"""Reading: files written with pydicom, expectations worked by hand; 53 real series if ../shared has them."""

import errno
import gzip
import hashlib
import json
import resource
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from dicom import Series, find_series, make_frames, read_series, rescale_values
from frames import decode, fast_header, one_line_errors, read_header, slow_header

pytestmark = pytest.mark.filterwarnings("ignore")
REAL = Path(__file__).resolve().parents[2] / "shared" / "dicom"
EXPECTED = {path.stem: json.loads(path.read_text()) for path in sorted(REAL.glob("expected/*.json"))}
NO_VOLUME = {"mra_rotating_mip_tiny", "ct_philips_scout", "ct_philips_exam_summary"}
PLANES = {"axial": [1, 0, 0, 0, 1, 0], "coronal": [1, 0, 0, 0, 0, -1], "sagittal": [0, 1, 0, 0, 0, -1]}
COMPRESSED = [uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless]
SYNTAXES = [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
SYNTAXES += [uid.DeflatedExplicitVRLittleEndian, *COMPRESSED]
ROWS, COLS, SIZE = 36, 40, 36 * 40
IPP = "ImagePositionPatient"
IN_NATURAL_ORDER = {f"I{i + 1}": 3 * i for i in range(11)}  # I10 follows I9
MONOCHROME1 = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "Modality": "MR"}
PADDING = {"PixelPaddingValue": -2000, "dtype": "i2"}


def items(**tags: object) -> list[Dataset]:
    """A sequence of one item."""
    ds = Dataset()
    ds.update(tags)
    return [ds]


def image(first: int = 0, **tags: object) -> Dataset:
    """A 36 x 40 CT slice whose pixels count up from `first`; a tag given as None is left out."""
    pixels = tags.pop("pixels", first + np.arange(SIZE).reshape(ROWS, COLS))
    pixels = np.asarray(pixels, tags.pop("dtype", "u2"))
    bits = 8 * pixels.itemsize
    defaults = dict(
        SOPClassUID=uid.CTImageStorage, Modality="CT", SeriesInstanceUID="1.2.3", PatientID="p",
        ImageOrientationPatient=PLANES["axial"], ImagePositionPatient=[-10.0, -20.0, 0.0], InstanceNumber=1,
        PixelSpacing=[0.5, 0.25], Rows=pixels.shape[-2], Columns=pixels.shape[-1], SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1,
        PixelRepresentation=int(pixels.dtype.kind == "i"), RescaleSlope=1, RescaleIntercept=-1024,
    )  # fmt: skip
    (ds,) = items(**{name: value for name, value in (defaults | tags).items() if value is not None})
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OW"
    return ds


def write(path: Path, ds: Dataset, syntax: str = uid.ExplicitVRLittleEndian) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.setdefault("SOPInstanceUID", f"1.2.9.{zlib.crc32(str(path).encode())}")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if syntax in COMPRESSED else syntax
    if syntax in COMPRESSED:
        ds.compress(syntax, generate_instance_uid=False)
    if syntax == uid.ExplicitVRBigEndian:  # OW: 16-bit words, also of 8-bit pixels
        ds.PixelData = np.frombuffer(ds.PixelData, "u2").byteswap().tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def stack(folder: Path, positions: list[float], **tags: object) -> list[Path]:
    """One slice per z position, a tuple having a value for each; pixels count up from 100 times the index."""
    paths = []
    for i, z in enumerate(positions):
        values = {k: v[i] if isinstance(v, tuple) else v for k, v in tags.items()}
        values = {"ImagePositionPatient": [-10, -20, z], "InstanceNumber": i + 1} | values
        paths.append(write(folder / f"I{i + 1}", image(100 * i, **values)))
    return paths


def names(series: Series) -> list[str]:
    return [frame.path.name for frame in series.frames]


def folders(series: Series) -> set[str]:
    return {frame.path.parent.name for frame in series.frames}


def offsets(series: Series) -> list[float]:
    """Millimetres along the normal from the first slice."""
    return (series.positions_mm - series.positions_mm[0]).round(2).tolist()


def rescale_slice(series: Series, i: int) -> np.ndarray:
    """(rows, cols) rescaled values of slice `i`; padding is -1024 in CT, 0 in MR."""
    padding = -1024 if series.modality == "CT" else 0
    return np.nan_to_num(rescale_values(series.frames[i], series.stored(i)), nan=padding)


def noted(series: Series, *words: str) -> bool:
    return any(all(word in note for word in words) for note in series.notes)


def test_files_are_found_by_content_and_others_named(tmp_path):
    a, b, c, d = stack(tmp_path / "deep" / "er", [0, 1, 2, 3])
    b.rename(tmp_path / "deep" / "no ending")
    c.write_bytes(c.read_bytes()[132:])  # without preamble
    d.write_bytes(gzip.compress(d.read_bytes()))
    (tmp_path / "readme.txt").write_text("no DICOM")
    (tmp_path / "short.dcm").write_bytes(a.read_bytes()[:-10])
    directory = image(SOPClassUID=uid.MediaStorageDirectoryStorage, Modality=None)
    del directory.PixelData
    write(tmp_path / "DICOMDIR", directory)
    series = read_series(tmp_path)
    assert offsets(series) == [0, 1, 2, 3]
    assert [series.stored(i)[0, :2].tolist() for i in range(4)] == [[100 * i, 100 * i + 1] for i in range(4)]
    reasons = {path.name: reason for path, reason in series.skipped}
    expected = {"readme.txt": "not DICOM", "short.dcm": "truncated", "DICOMDIR": "not an image"}
    assert all(text in reasons.pop(name) for name, text in expected.items()) and not reasons


def test_of_several_series_the_named_one_else_the_largest_is_read(tmp_path):
    stack(tmp_path / "a", [0, 1, 2], SeriesInstanceUID="1.2.1")
    stack(tmp_path / "b", [10, 11], SeriesInstanceUID="1.2.2")
    largest, named = read_series(tmp_path), read_series(tmp_path, "1.2.2")
    assert offsets(largest) == [0, 1, 2] and noted(largest, "2 images of another series")
    assert offsets(named) == [0, 1] and named.uid == "1.2.2" and noted(named, "3 images of other series")
    renamed = read_series(tmp_path, "9.9")  # a folder renamed after it was written
    assert offsets(renamed) == [0, 1, 2] and renamed.uid == "9.9"


def test_linked_folders_are_followed_once_and_circles_end(tmp_path):
    src, disk = tmp_path / "src", tmp_path / "disk"
    stack(disk / "1.2.3", [0, 1, 2])
    (src / "1.2.5").mkdir(parents=True)
    (src / "1.2.5" / "x").write_text("the folder's name is a series all the same")
    (src / "series").symlink_to(disk)
    (src / "twice").symlink_to(disk)
    (disk / "back").symlink_to(src)
    series, rejected = find_series(src)
    assert {uid: len(files) for uid, files in series.items()} == {"1.2.3": 3, "1.2.5": 1} and rejected == []


def test_a_file_that_the_disk_does_not_give_fails_the_series(tmp_path, monkeypatch):
    stack(tmp_path, list(range(20)))
    stale = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr("frames.fast_header", Mock(side_effect=stale))
    with pytest.raises(ValueError, match="Stale file handle; not the file's fault: check its path and disk"):
        read_series(tmp_path)


def test_scouts_other_orientations_and_sizes_are_left_out(tmp_path):
    stack(tmp_path / "a", [0, 1, 2])
    stack(tmp_path / "b", [0, 1, 2, 3], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    stack(tmp_path / "c", [0, 1], ImageOrientationPatient=PLANES["sagittal"])
    stack(tmp_path / "d", [0, 1], pixels=np.zeros((5, 5)))
    stack(tmp_path / "e", [0, 1], PixelSpacing=[0.5, 0.26])
    stack(tmp_path / "f", [3], ImageOrientationPatient=[1, 0.0005, 0, -0.0005, 1, 0])  # within 1e-3
    series = read_series(tmp_path)
    assert offsets(series) == [0, 1, 2, 3]
    for words in ("4 images left out: scout", "5 x 5", "0.26 mm", "normal [-1.  0.  0.]"):
        assert noted(series, words), words


@pytest.mark.parametrize("tags, reason", [
    ({"Modality": "CR"}, "Modality CR"), ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "tiled"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
    ({"SamplesPerPixel": 3, "Rows": ROWS // 3}, "report or screenshot"),
])  # fmt: skip
def test_what_is_no_volume_is_refused_with_the_reason(tmp_path, tags, reason):
    stack(tmp_path, [0], **{IPP: None} | tags)
    with pytest.raises(ValueError, match=reason) as error:
        read_series(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("plane", [*PLANES, "oblique"])
def test_slices_are_sorted_along_the_normal_and_the_affine_maps_voxels_to_lps(tmp_path, plane):
    turn = cv2.Rodrigues(np.array([0.5, 0.3, 0.2]))[0]
    row_dir, col_dir = directions = turn[:2] if plane == "oblique" else np.reshape(PLANES[plane], (2, 3))
    normal, origin = np.cross(row_dir, col_dir), np.array([5.0, -7.0, 11.0])
    shuffled = [4.0, 0.0, 6.0, 2.0]  # mm, in the order of files
    points = tuple((origin + mm * normal).round(9).tolist() for mm in shuffled)
    iop = directions.ravel().round(12).tolist()
    series = read_series(stack(tmp_path, shuffled, ImageOrientationPatient=iop, ImagePositionPatient=points))
    assert names(series) == ["I2", "I4", "I1", "I3"]
    voxel = np.array([2, 3, 5, 1])  # (z, y, x, 1): spacing 2 mm, row 0.5, column 0.25
    expected = origin + 2 * 2.0 * normal + 3 * 0.5 * col_dir + 5 * 0.25 * row_dir
    np.testing.assert_allclose((series.affine @ voxel)[:3], expected, atol=1e-6)
    np.testing.assert_allclose(series.point(series.frames[2].sop_uid, 5, 3), expected, atol=1e-6)
    assert offsets(series) == [0, 2, 4, 6]
    assert series.spacing_mm == pytest.approx((2.0, 0.5, 0.25)) and not series.notes
    assert series.plane == ("axial" if plane == "oblique" else plane)


@pytest.mark.parametrize("positions, tags, places, note", [
    ([0, 2, 4, 9], {}, {"I1": 0, "I2": 2, "I3": 4, "I4": 9}, "5.000 mm after slice 2"),
    ([7], {}, {"I1": 0}, "single slice: 3 mm"),
    ([5] * 3, {"InstanceNumber": (7, 3, 5)}, {"I2": 0}, "1 images"),
    ([0, 2, 4], {IPP: ([0, 0, 0], None, [0, 0, 4])}, {"I1": 0, "I2": 2, "I3": 4}, "1 of 3"),
    ([0] * 3, {"SliceLocation": (3, 1, 2)}, {"I2": 0, "I3": 1, "I1": 2}, "SliceLocation"),
    ([0] * 3, {IPP: None, "SliceLocation": (9, 5, 7)}, {"I2": 0, "I3": 2, "I1": 4}, "SliceLocation"),
    ([0] * 3, {IPP: None, "InstanceNumber": (3, 1, 2)}, {"I2": 0, "I3": 3, "I1": 6}, "InstanceNumber"),
    ([0] * 11, {IPP: None, "InstanceNumber": None}, IN_NATURAL_ORDER, "file names"),
    ([0] * 11, {"InstanceNumber": None}, IN_NATURAL_ORDER, "file names"),
])  # fmt: skip
def test_slices_lie_where_the_best_of_their_tags_says(tmp_path, positions, tags, places, note):
    series = read_series(stack(tmp_path, positions, SliceThickness=3, **tags)[::-1])
    assert dict(zip(names(series), offsets(series), strict=True)) == places and noted(series, note)


def test_gantry_tilt_shears_the_affine(tmp_path):
    c, s = np.cos(np.radians(15)), np.sin(np.radians(15))
    tilted = [1, 0, 0, 0, round(c, 12), round(s, 12)]  # the table still moves along z
    series = read_series(stack(tmp_path, [0, 3, 6], ImageOrientationPatient=tilted))
    np.testing.assert_allclose(series.affine[:3, 0], [0, 0, 3], atol=1e-9)
    np.testing.assert_allclose(series.positions_mm, np.array([0, 3, 6]) * c + 20 * s, atol=1e-6)
    assert noted(series, "tilted", f"{np.tan(np.radians(15)):.4f}")


@pytest.mark.parametrize("key, values, expected", [
    ("EchoTime", (20, 90), "a"), ("TemporalPositionIdentifier", (2, 1), "b"),
    ("AcquisitionNumber", (8, 7), "b"), ("DiffusionBValue", (1000.0, None), "b"),
    ("ImageType", (["ORIGINAL", "PRIMARY", "P"], ["ORIGINAL", "PRIMARY", "M"]), "b"),
    ("PatientAge", ("050Y", "050Y"), "a"),  # nothing but the order tells: the lower InstanceNumber
])  # fmt: skip
def test_of_several_volumes_a_complete_one_is_read(tmp_path, key, values, expected):
    stack(tmp_path / "a", [0, 2, 4], InstanceNumber=(1, 3, 5), **{key: values[0]})
    stack(tmp_path / "b", [0, 2, 4], InstanceNumber=(2, 4, 6), **{key: values[1]})
    series = read_series(tmp_path)
    assert folders(series) == {expected} and offsets(series) == [0, 2, 4]
    assert noted(series, "volumes by", "3 images")
    assert len(series.geometry) == 6  # points on the other volume's images still have a place


def test_an_echo_with_a_missing_slice_is_not_mixed_with_the_other(tmp_path):
    stack(tmp_path / "a", list(range(12)), EchoTime=20)[7].unlink()
    stack(tmp_path / "b", list(range(12)), EchoTime=90)[3].unlink()
    series = read_series(tmp_path)
    assert folders(series) == {"a"} and len(series.frames) == 11


def test_copies_of_an_image_are_left_out_and_a_uid_of_several_slices_places_no_point(tmp_path):
    paths = stack(tmp_path / "a", [0, 1])
    (tmp_path / "a" / "copy").write_bytes(paths[0].read_bytes())
    series = read_series(tmp_path / "a")
    assert offsets(series) == [0, 1] and noted(series, "1 copies")
    uids = ("1.2.5", "1.2.5", "1.2.6")
    series = read_series(stack(tmp_path / "uid", [0, 1, 2], SOPInstanceUID=uids))
    assert offsets(series) == [0, 1, 2] and series.point("1.2.6", 0, 0).tolist() == [-10, -20, 2]
    with pytest.raises(ValueError, match=r"no image 1\.2\.5"):  # which of the two is meant?
        series.point("1.2.5", 0, 0)


def enhanced(positions: list, slopes: list[float], orientations: list | None = None, **tags) -> Dataset:
    """An enhanced file: position [x, y, z], rescale and orientation by frame, spacing shared."""
    pixels = np.arange(len(positions) * SIZE).reshape(len(positions), ROWS, COLS)
    ds = image(NumberOfFrames=len(positions), **{"pixels": pixels, "SliceThickness": 2} | tags)
    measures = items(PixelSpacing=[0.5, 0.25], SliceThickness=ds.SliceThickness)
    ds.SharedFunctionalGroupsSequence = items(PixelMeasuresSequence=measures)
    orientations, frames = orientations or [PLANES["axial"]] * len(positions), []
    for position, slope, orientation in zip(positions, slopes, orientations, strict=True):
        (frame,) = items(PlanePositionSequence=items(ImagePositionPatient=position))
        frame.PlaneOrientationSequence = items(ImageOrientationPatient=orientation)
        frame.PixelValueTransformationSequence = items(RescaleSlope=slope, RescaleIntercept=0)
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    del ds.RescaleSlope, ds.RescaleIntercept
    return ds


def test_enhanced_frames_have_their_own_geometry_and_rescale(tmp_path):
    series = read_series(write(tmp_path / "x", enhanced([[0, 0, 4], [0, 0, 0], [0, 0, 2]], [1, 2, 3])))
    assert [frame.index for frame in series.frames] == [1, 2, 0] and offsets(series) == [0, 2, 4]
    assert [rescale_slice(series, i)[0, 1] for i in range(3)] == [2 * (SIZE + 1), 3 * (2 * SIZE + 1), 1]
    sop_uid = series.frames[0].sop_uid
    with pytest.raises(ValueError, match="several frames, and no frame is named"):
        series.point(sop_uid, 4, 2)
    # column 4 of 0.25 mm, row 2 of 0.5 mm, z of frame 2
    assert series.point(sop_uid, 4, 2, f=2).tolist() == [1, 1, 2]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_frames_of_a_stripped_multi_frame_file_are_counted_from_its_pixel_data(tmp_path, syntax):
    pixels = np.arange(3 * SIZE).reshape(3, ROWS, COLS)
    path = write(tmp_path / "m.dcm", image(pixels=pixels, NumberOfFrames=3, SpacingBetweenSlices=1.5), syntax)
    ds = pydicom.dcmread(path)
    del ds.NumberOfFrames, ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.SeriesInstanceUID
    ds.save_as(path)
    series = read_series(tmp_path)
    assert [series.stored(i)[0, 0] for i in range(3)] == [0, SIZE, 2 * SIZE]
    assert offsets(series) == [0, 1.5, 3] and noted(series, "1.5 mm", "SpacingBetweenSlices")
    assert "axial assumed" in series.doubts[0]


def test_missing_and_unreadable_attributes_are_assumed_and_noted(tmp_path):
    path = stack(tmp_path / "a", [0, 1, 2])[1]
    path.write_bytes(path.read_bytes().replace(b"-10.0\\-20.0\\1", b"-10.0\\-2O.0\\1"))
    series = read_series(tmp_path / "a")
    assert offsets(series) == [0, 1, 2] and noted(series, "(0020,0032) ImagePositionPatient does not parse")
    tags = {"ImageOrientationPatient": [0] * 6, "PixelSpacing": None, "RescaleIntercept": None}
    series = read_series(stack(tmp_path / "b", [0, 1], **tags))
    assert series.spacing_mm == (1, 1, 1) and series.plane == "axial"
    assert noted(series, "ImageOrientationPatient in 2 of 2 images: axial by their positions")
    assert noted(series, "RescaleIntercept: -1024 assumed (2 of 2 images)")
    assert series.doubts == ["no valid (0028,0030) PixelSpacing: 1 mm assumed (2 of 2 images)"]


@pytest.mark.parametrize("stored, tags, expected, note", [
    ([4095, 95, 95, 4095], MONOCHROME1, [0, 4000, 4000, 0], "inverted"),
    ([0, 95, 95, 0], MONOCHROME1, [0, 95, 95, 0], ""),
    ([0, 24, 95, 0], {"RescaleSlope": (1, 2), "Modality": "MR"}, [0, 48, 190, 0], ""),
    ([-2000, -1995, 0, 24], PADDING | {"PixelPaddingRangeLimit": -1990}, [-1024, -1024, 0, 24], ""),
    ([-2000, -1995, 0, 24], PADDING | {"PixelPaddingValue": 0}, [-2000, -1995, 0, 24], "would be tissue"),
])  # fmt: skip
def test_values_are_rescaled_by_slice_inverted_and_padded(tmp_path, stored, tags, expected, note):
    series = read_series(stack(tmp_path, [0, 1], pixels=[stored], RescaleIntercept=0, **tags))
    assert rescale_slice(series, 1).tolist() == [expected]
    assert noted(series, note) if note else not series.notes


@pytest.mark.parametrize("raw, dtype, bits, high, expected", [
    (0xF801, "u2", 12, 11, 0x801), (0xF801, "i2", 12, 11, -0x7FF), (0x1234, "u2", 12, 15, 0x123),
    (0x81, "i1", 8, 7, -127), (0x80000001, "u4", 31, 30, 1),
    (0xFFFF, "u2", 99, 3, 0xFFFF),  # senseless: as allocated
])  # fmt: skip
def test_stored_values_are_masked_and_sign_extended(tmp_path, raw, dtype, bits, high, expected):
    pixels = np.full((2, 2), raw, dtype.replace("i", "u")).view(dtype)
    ds = image(pixels=pixels, dtype=dtype, BitsStored=bits, HighBit=high)
    series = read_series(write(tmp_path / "x", ds))
    assert series.stored(0).tolist() == [[expected] * 2] * 2


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("dtype, lowest, bits", [("u2", 0, 12), ("i2", -(2**15), 16), ("u1", 0, 8)])
def test_every_lossless_transfer_syntax_gives_the_same_stored_values(tmp_path, syntax, dtype, lowest, bits):
    pixels = np.random.default_rng(0).integers(lowest, 2 ** (bits - 1), (ROWS, COLS)).astype(dtype)
    ds = image(pixels=pixels, dtype=dtype, BitsStored=bits, HighBit=bits - 1)
    series = read_series(write(tmp_path / "x", ds, syntax))
    assert series.stored(0).tolist() == pixels.tolist()
    assert series.frames[0].header["TransferSyntaxUID"] == syntax


def test_jpeg_baseline_and_colour_become_grey(tmp_path):
    grey = np.tile(np.arange(64, dtype="u1") * 4, (64, 1))
    ds = image(pixels=grey, dtype="u1")
    ds.PixelData = encapsulate([cv2.imencode(".jpg", grey)[1].tobytes()])
    ds["PixelData"].is_undefined_length = True
    write(tmp_path / "jpeg" / "x", ds, uid.JPEGBaseline8Bit)
    assert np.abs(read_series(tmp_path / "jpeg").stored(0).astype(int) - grey).max() <= 3
    red = np.tile(np.array([100, 0, 0], "u1"), (64, 64, 1))
    tags = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Rows": 64, "Columns": 64}
    write(tmp_path / "rgb" / "x", image(pixels=red, dtype="u1", SamplesPerPixel=3, **tags))
    assert (read_series(tmp_path / "rgb").stored(0) == 30).all()  # 0.299 x 100


@pytest.mark.parametrize("raised", [None, BaseException("out of bounds"), KeyboardInterrupt("passes")])
def test_a_failing_decoder_is_a_reason_but_interrupts_pass(tmp_path, monkeypatch, raised):
    series = read_series(write(tmp_path / "x", image(), uid.JPEGLSLossless))
    series.forget()  # what the look at its values has decoded
    plugins = {"failing": Mock(side_effect=raised)} if raised else {}  # pylibjpeg-rle: BaseException
    monkeypatch.setattr(get_decoder(uid.JPEGLSLossless), "_available", plugins)
    expected = str(raised) if raised else r"JPEG-LS Lossless.*1\.2\.840\.10008\.1\.2\.4\.80.*pyjpegls"
    is_interrupt = isinstance(raised, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if is_interrupt else ValueError, match=expected):
        series.stored(0)


def test_a_code_stream_of_another_size_is_refused_before_it_takes_memory(tmp_path):
    path = write(tmp_path / "x", image(), uid.JPEG2000Lossless)
    data = path.read_bytes()
    start = data.index(b"\xff\x4f\xff\x51") + 8
    path.write_bytes(data[:start] + b"\0\0\xff\xff\0\0\xff\xff" + data[start + 8 :])
    with pytest.raises(ValueError, match=r"holds \(65535, 65535, 1\).*the header says \(36, 40, 1\)"):
        read_series(tmp_path).stored(0)


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """A few bytes changed, most of them in the header; or a piece cut out, doubled, or the end cut off."""
    data = bytearray(data)
    reach = len(data) if rng.random() < 0.3 else min(len(data), 1500)
    start, length = int(rng.integers(132, reach)), int(rng.integers(1, 40))
    kind = rng.integers(0, 8)
    if kind < 5:
        for i in rng.integers(132, reach, rng.integers(1, 6)):
            data[i] = rng.choice([0, 1, 0xFF, 0x7F, 0x80, rng.integers(256), data[i] ^ 1 << rng.integers(8)])
    else:
        piece = data[start : start + length]
        data[start : None if kind == 7 else start + length] = 2 * piece if kind == 6 else b""
    return bytes(data)


def equal_headers(path: Path) -> bool:
    """Whether the fast header takes the file; what it then says, or refuses, has to be what pydicom says."""
    headers = []
    for read in (fast_header, one_line_errors(slow_header)):
        try:
            headers.append(read(path))
        except ValueError as error:
            headers.append(str(error))
    assert headers[0] in (None, headers[1]), path
    return headers[0] is not None


def fuzz(folder: Path, seed: int) -> Counter:
    """Reads 100 mutated files, each beside two good ones that have to survive. Runs in a worker."""
    rng, files = np.random.default_rng([2, seed]), sorted(folder.glob("base*"))
    path, ends = folder / f"mutated{seed}", Counter()
    for i in range(100):
        path.write_bytes(mutated(rng, files[i % len(files)].read_bytes()))
        series = read_series([folder / "good" / "I1", folder / "good" / "I2", path], "1.2.3")
        ends["skipped"] += bool(series.skipped)
        ends["fast"] += equal_headers(path)
        for j, frame in enumerate(series.frames):
            try:
                values = rescale_slice(series, j)
                assert values.shape == (frame.rows, frame.cols) and np.isfinite(values).all()
                ends["read"] += frame.path == path
            except ValueError as error:
                assert frame.path == path and "\n" not in str(error)
    return ends


def test_two_thousand_mutated_files_are_read_or_refused_and_the_fast_header_equals_pydicoms(tmp_path):
    (nested,) = items(ReferencedImageSequence=items(ReferencedSOPInstanceUID="1.2"))
    nested["ReferencedImageSequence"].is_undefined_length = True
    two = [[-10, -20, 5], [-10, -20, 6]]
    for i, syntax in enumerate([*SYNTAXES, uid.ExplicitVRLittleEndian]):  # small valid files of every form
        ds = enhanced(two, [1, 2]) if i == 7 else image(EchoTime=3, ImagePositionPatient=two[0])
        ds.ReferencedStudySequence = [nested]
        ds["ReferencedStudySequence"].is_undefined_length = i % 2 == 0
        write(tmp_path / f"base{i}", ds, syntax)
    stack(tmp_path / "good", [0, 1])
    limit = (resource.RLIMIT_AS, (2**32, 2**32))
    with ProcessPoolExecutor(2, initializer=resource.setrlimit, initargs=limit) as pool:
        ends = sum(pool.map(fuzz, [tmp_path] * 20, range(20), timeout=300), Counter())
    assert min(ends["read"], ends["skipped"], ends["fast"]) > 300, ends


@pytest.mark.parametrize("name, expected", EXPECTED.items(), ids=EXPECTED)
def test_real_series_have_the_expected_geometry_and_values(name, expected):
    if expected["main_group"] is None or name in NO_VOLUME:
        with pytest.raises(ValueError, match=r"tiled in one image|projection|scout"):
            read_series(REAL / name)
        return
    series = read_series(REAL / name)
    first, num = series.frames[0], len(series.frames)
    facts = (first.rows, first.cols, num)
    groups = [g for g in expected["groups"] if (g["rows"], g["cols"], g.get("n_positions")) == facts]
    group = next(g for g in groups if np.allclose(g["normal_lps"], series.normal, atol=1e-4))
    order = [[str(f.path.relative_to(REAL / name)), f.index] for f in series.frames]
    if group["frames_per_position"] == [1, 1]:
        assert order == [entry[:2] for entry in group["order_along_normal"]]
    np.testing.assert_allclose(series.positions_mm, [e[2] for e in group["order_along_normal"]], atol=2e-3)
    if group.get("affine_exact"):
        theirs = np.array(group["affine_lps_col_row_slice"])[:, [2, 1, 0, 3]]
        corner = [num - 1, first.rows - 1, first.cols - 1, 1]
        np.testing.assert_allclose(series.affine @ corner, theirs @ corner, atol=5e-3)
    if group.get("shear_deg") is not None:
        assert noted(series, "tilted") == (np.radians(group["shear_deg"]) > 1e-3)
    for sample in group.get("samples", []):
        if [sample["file"], sample["frame"]] not in order:
            continue
        i, row, col = order.index([sample["file"], sample["frame"]]), sample["row"], sample["col"]
        frame, low, high = series.frames[i], *(series.frames[i].padding or (1, 0))
        is_colour = frame.header["SamplesPerPixel"] == 3  # theirs is the mean of the colours
        if not is_colour and not low <= series.stored(i)[row, col] <= high:
            assert rescale_slice(series, i)[row, col] == pytest.approx(sample["value"], rel=1e-5, abs=1e-3)
            lps = series.point(frame.sop_uid, col, row, sample["frame"])
            np.testing.assert_allclose(lps, sample["lps"], atol=5e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_real_files_decode_to_the_expected_stored_values(name):
    for file in EXPECTED[name]["files"]:
        path = REAL / name / file["file"]
        if "stored_sha1" not in file or file["modality"] in ("SEG", "NM"):
            continue
        header = read_header(path) | {"Modality": "MR", "ImageType": ""}  # mosaics and others have pixels too
        if header["SamplesPerPixel"] == 1:
            values = np.stack([decode(frame) for frame in make_frames(path, header)]).astype("<i8")
            assert hashlib.sha1(values.tobytes()).hexdigest()[:12] == file["stored_sha1"], path


@pytest.mark.skipif(not EXPECTED, reason=f"{REAL} is not there")
def test_the_fast_header_equals_pydicoms_on_real_files():
    paths = [path for name in EXPECTED for path in sorted((REAL / name).rglob("*")) if path.is_file()]
    assert sum(equal_headers(path) for path in paths) > 300
