"""Series with wrong values or positions: the volume is the healthy head's, worked by hand, or has doubts."""

from pathlib import Path

import numpy as np
import pytest
from test_dicom_reading import PLANES, image, noted, rescale_slice, write

from dicom import Volume, VolumeSettings, make_volume, read_series, to_lps

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = VolumeSettings(base_slices=16, img_size=64)
NUM, SIZE, STEP_MM, PIXEL_MM = 40, 64, 4.0, 3.4
CORNER, TOP = -(SIZE - 1) / 2 * PIXEL_MM, (NUM - 1) * STEP_MM
U12, MR = {"BitsStored": 12, "HighBit": 11}, {"Modality": "MR"}
# (40, 64, 64) radius: below 1 in a head of 144 x 176 mm whose vertex lies at z = 152 mm.
Z_MM = np.clip(np.arange(NUM) - 14, 0, None)[:, None, None] * STEP_MM
Y_MM, X_MM = ((np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5) * PIXEL_MM)[:, None]
RADIUS = np.sqrt((X_MM / 72) ** 2 + (Y_MM / 88) ** 2 + (Z_MM / 98) ** 2)
NOISE = np.random.default_rng(0).normal(0, 8, RADIUS.shape)
PARTS = [RADIUS < 0.3, RADIUS < 0.88, RADIUS < 1]  # vessel, brain, skull
HU = np.maximum(np.rint(np.select(PARTS, [350, 38, 900], -1000) + NOISE), -1024).astype(int)
GREY = np.rint(np.abs(np.select(PARTS, [900, 400, 60], 0) + NOISE)).astype(int)  # magnitudes; a dark skull
GREY_LEVELS = np.rint(255 * np.clip((HU + 160) / 400, 0, 1)).astype(int)  # of a window from -160 to 240 HU
AIR = RADIUS >= 1
CORNERS = np.broadcast_to(np.hypot(*(np.mgrid[:SIZE, :SIZE] - 31.5)) > 31.9, GREY.shape)
INTERCEPT, NONE, SIGN = {"RescaleIntercept": -1024}, {"RescaleIntercept": None}, {"PixelRepresentation": 1}
READINGS = {
    "HU + 1024 with intercept 0": (HU + 1024, {}), "HU - 1024 with intercept 0": (HU - 1024, {}),
    "HU + 1024 without intercept, signed": (HU + 1024, NONE | SIGN),
    "HU + 1024 without intercept, unsigned": (HU + 1024, NONE), "HU with intercept -1024": (HU, INTERCEPT),
    "HU + 1024 with intercept -2048": (HU + 1024, {"RescaleIntercept": -2048}),
    "HU modulo 65536": (HU % 65536, {}), "HU modulo 65536 with intercept -1024": (HU % 65536, INTERCEPT),
    "HU modulo 4096 in 12 bits": (HU % 4096, U12), "HU modulo 4096 in 16 bits": (HU % 4096, {}),
    "HU + 1024 in 12 bits with a sign": (HU + 1024, U12 | SIGN | INTERCEPT),
    "MONOCHROME1": (3071 - HU, U12 | INTERCEPT | {"PhotometricInterpretation": "MONOCHROME1"}),
}  # fmt: skip
ROUND_FIELD = np.hypot(*np.mgrid[-32:32, -32:32]) <= 31
ODD_CTS = {
    "inside the head": (38 + NOISE)[:, 20:44, 20:44], "metal": np.where(RADIUS < 0.1, 3071, HU),
    "no soft tissue": np.where(RADIUS < 1, 900, -1000) + NOISE,
    "noise": np.random.default_rng(1).integers(-1024, -770, (4, SIZE, SIZE)),
    "padding of -3024": np.where(ROUND_FIELD, HU, -3024),
    "lossy padding": np.where(ROUND_FIELD, HU, -2000 + NOISE),
}  # fmt: skip


def write_scan(folder: Path, voxels: np.ndarray, plane="axial", positions=None, **tags) -> None:
    """A file per slice of (z, y, x) voxels; `positions` replaces some: slice -> (x, y, z) mm."""
    axis = list(PLANES).index(plane)
    spacing = [PIXEL_MM if axis == 0 else STEP_MM, PIXEL_MM]
    tags = {"PixelSpacing": spacing, "SliceThickness": PIXEL_MM, "RescaleIntercept": 0} | tags
    tags["ImageOrientationPatient"] = PLANES[plane]
    for i, pixels in enumerate(np.moveaxis(voxels, axis, 0)):
        position = [CORNER, CORNER, TOP]  # rows run from head to feet
        position[2 - axis] = i * STEP_MM if axis == 0 else CORNER + i * PIXEL_MM
        tags["pixels"] = pixels if axis == 0 else pixels[::-1]
        tags["dtype"] = "i2" if pixels.min() < 0 else "u2"
        tags["ImagePositionPatient"] = (positions or {}).get(i, position)
        write(folder / f"{i:03d}.dcm", image(InstanceNumber=i + 1, **tags))


def volume_of(folder: Path, voxels: np.ndarray, *args, **tags) -> Volume:
    write_scan(folder, voxels, *args, **tags)
    return make_volume(read_series(folder), SETTINGS)


def is_equal(volume: Volume, healthy: Volume, share: float = 0.001) -> bool:
    """Less than that share of the voxels differ by more than 20 grey levels."""
    return np.mean(np.abs(volume.voxels.astype(int) - healthy.voxels) > 20) < share


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> dict[str, Volume]:
    """The volume of the sound CT (by plane) and MR."""
    root = tmp_path_factory.mktemp("healthy")
    volumes = {plane: volume_of(root / plane, HU, plane) for plane in PLANES}
    volumes["MR"] = volume_of(root / "MR", GREY, **MR)
    return volumes


def test_the_sound_heads_have_no_notes_and_no_doubts(healthy):
    for volume in healthy.values():
        assert volume.notes == volume.doubts == []
    top = to_lps(np.array([15.5, 31.5, 31.5]), healthy["axial"].affine)[0]
    np.testing.assert_allclose(top, [0, 0, 150], atol=5)  # below the vertex by the 1000 mm2 of a head


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_ct_is_read_so_that_air_and_tissue_lie_where_hu_says(tmp_path, healthy, reading, plane):
    stored, tags = READINGS[reading]
    volume = volume_of(tmp_path / "ct", stored, plane, **tags)
    assert is_equal(volume, healthy[plane]) and volume.doubts == []
    series = read_series(tmp_path / "ct")
    as_stated = "MONOCHROME1", "HU + 1024 without intercept, unsigned", "HU + 1024 in 12 bits with a sign"
    assert noted(series, "stored values are HU only with") != (reading in as_stated)
    pixels = rescale_slice(series, 20 if plane == "axial" else 32)
    assert np.median(pixels[14:18, 24:28]) == pytest.approx(38, abs=5)


@pytest.mark.parametrize("stored, tags, doubt", [
    (HU + 8192, {}, "neither air near -1000 HU nor soft tissue"),
    (GREY_LEVELS, {}, "as in an image made for a screen"),
    (GREY_LEVELS, {"RescaleIntercept": -160, "RescaleSlope": 400 / 255}, "as in an image made for a screen"),
])  # fmt: skip
def test_a_ct_that_no_reading_makes_plausible_is_doubted(tmp_path, stored, tags, doubt):
    assert doubt in volume_of(tmp_path, stored, **tags).doubts[0]


@pytest.mark.parametrize("name", ODD_CTS)
def test_a_ct_without_air_or_tissue_is_neither_changed_nor_doubted(tmp_path, name):
    hu = np.rint(ODD_CTS[name]).astype(int)
    write_scan(tmp_path, hu)
    series = read_series(tmp_path)
    np.testing.assert_array_equal(rescale_slice(series, 2), hu[2])
    assert series.doubts == []


@pytest.mark.parametrize("is_fill", [CORNERS, AIR], ids=["corners", "all air"])
@pytest.mark.parametrize("fill", [-2048, 63488, 32767])
def test_a_fill_takes_neither_the_percentiles_nor_the_box_of_an_mr(tmp_path, healthy, fill, is_fill):
    assert is_fill.mean() > 0.2
    volume = volume_of(tmp_path / "mr", np.where(is_fill, fill, GREY), **MR)
    assert is_equal(volume, healthy["MR"]) and volume.doubts == []


def test_a_bright_fill_takes_no_vessel_and_a_far_background_no_grey_levels_with_it(tmp_path):
    grey = np.where((RADIUS > 0.1) & (RADIUS < 0.3), 400, GREY)  # a small vessel of 900
    healthy = volume_of(tmp_path / "a", grey, **MR)
    assert is_equal(volume_of(tmp_path / "b", np.where(CORNERS, 1200, grey), **MR), healthy)
    volume = volume_of(tmp_path / "mr", np.where(AIR, 0, 1800 + GREY), **MR)
    inside = volume.voxels[np.abs(volume.voxels.astype(int) - 128) < 110]
    assert np.mean(volume.voxels > 230) < 0.2 and np.ptp(inside) > 100  # today 1800 would be 170 of 255


def test_small_negative_mr_values_without_sign_are_black_and_padding_among_tissue_is_not(tmp_path, healthy):
    assert is_equal(volume_of(tmp_path / "mr", (GREY - np.where(AIR, 9, 0)) % 65536, **MR), healthy["MR"])
    for padding in (0, 400):
        folder = tmp_path / f"{padding}"
        assert is_equal(volume_of(folder, GREY, PixelPaddingValue=padding, **MR), healthy["MR"])
        assert noted(read_series(folder), "would be tissue") == (padding == 400)


@pytest.mark.parametrize("z", [-200.0, 200.0, 400.0, 9000.0])
@pytest.mark.parametrize("modality, voxels, sound", [("CT", HU, "axial"), ("MR", GREY, "MR")])
def test_a_stray_slice_does_not_move_the_box(tmp_path, healthy, z, modality, voxels, sound):
    stray = np.concatenate([voxels, voxels[20:21]])
    volume = volume_of(tmp_path, stray, "axial", {NUM: [CORNER, CORNER, z]}, Modality=modality)
    assert is_equal(volume, healthy[sound])


@pytest.mark.parametrize("plane, position", [
    ("axial", [CORNER, CORNER, 9000.0]), ("axial", [9000.0, CORNER, 20 * STEP_MM]),
    ("sagittal", [9000.0, CORNER, TOP]), ("sagittal", [CORNER + 20 * PIXEL_MM, CORNER, 9000.0]),
])  # fmt: skip
def test_one_corrupt_coordinate_costs_one_slice(tmp_path, healthy, plane, position):
    """A slice beside the head's middle, so that its neighbours look nearly the same."""
    volume = volume_of(tmp_path, HU, plane, {20: position})
    np.testing.assert_allclose(volume.affine, healthy[plane].affine, atol=0.1)
    assert is_equal(volume, healthy[plane], 0.02)


@pytest.mark.parametrize("value", [-1024, 0, 1000])
@pytest.mark.parametrize("plane, is_blank", [("axial", np.s_[8:24]), ("sagittal", np.s_[:, :, 24:42])])
def test_many_blank_images_are_doubted_unless_above_the_vertex(tmp_path, healthy, plane, is_blank, value):
    volume = volume_of(tmp_path / "above", np.concatenate([HU, np.full((10, SIZE, SIZE), value)]))
    assert is_equal(volume, healthy["axial"]) and volume.doubts == []
    voxels = HU.copy()
    voxels[is_blank] = value
    volume = volume_of(tmp_path / "a", voxels, plane)
    assert "is of one value, or interpolated over missing slices" in volume.doubts[0]
    assert noted(volume, "slices left out, they are blank")
    assert volume.affine[2, 3] == pytest.approx(healthy[plane].affine[2, 3], abs=1)


def test_a_hollow_head_with_a_bone_defect_has_the_box_of_the_sound_one(tmp_path, healthy):
    y, x = np.mgrid[:SIZE, :SIZE] - 31.5
    is_hollow = (RADIUS < 0.88) | ((RADIUS < 1) & (x > 0) & (np.abs(y) < 8))
    volume = volume_of(tmp_path, np.where(is_hollow, -1000, HU))
    np.testing.assert_allclose(volume.affine, healthy["axial"].affine, atol=PIXEL_MM + 0.1)
    assert volume.doubts == []


@pytest.mark.parametrize(
    "part", [np.s_[12:27], np.s_[::5], np.s_[:, :, 25:], np.s_[:18], np.s_[:, 16:48, 16:48]]
)
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_partial_and_thick_scans_are_not_doubted(tmp_path, modality, part):
    """A slab of 60 mm, slices 20 mm apart, half of the head outside, no vertex, a field of view inside it."""
    voxels = (HU if modality == "CT" else GREY)[part]
    assert volume_of(tmp_path, voxels, Modality=modality).doubts == []
