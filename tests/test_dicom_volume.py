"""make_volume: where every pixel lies in millimetres, what a slab is made of, where the box lies."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import dicom
from dicom import VolumeSettings, line_weights, make_volume, slab_weights, slice_spans, to_lps, to_voxel

SETTINGS = VolumeSettings(base_slices=16, img_size=100, roi_mm=200.0, roi_top_mm=160.0)
L, P, S = np.eye(3)
R, A, I = -L, -P, -S
TURN = cv2.Rodrigues(np.radians([0.0, 14.0, 11.0]))[0]
ORIENTATIONS = {
    "axial": (L, P), "axial, feet up": (R, P), "axial, prone": (R, A),
    "axial, rows and columns swapped": (P, L), "coronal": (L, I), "coronal, from behind": (R, I),
    "sagittal": (P, I), "sagittal, from the right": (A, I), "sagittal, head down": (P, S),
    "oblique axial": (TURN @ L, TURN @ P), "oblique sagittal": (TURN @ P, TURN @ I),
}  # fmt: skip
BLOB_MM = np.array([-21.0, 13.0, 27.0])  # LPS


def scan(values, row_dir, col_dir, shape, spacing_mm, shear=(0, 0, 0), modality="CT", at_mm=None):
    """What make_volume needs of a Series of values(points in LPS mm), slice k at k * spacing (or at_mm[k])
    along the normal, drifting by shear mm per mm. `decoded` collects slices asked for; `broken` raise."""
    normal = np.cross(row_dir, col_dir)
    at_mm = np.arange(shape[0]) * spacing_mm[0] if at_mm is None else np.asarray(at_mm, float)
    rows, columns = ((np.arange(shape[i]) - (shape[i] - 1) / 2) * spacing_mm[i] for i in (1, 2))
    frames, images = [], []
    for mm in at_mm - (at_mm[0] + at_mm[-1]) / 2:
        middle = mm * (normal + np.asarray(shear, float))
        points = middle + rows[:, None, None] * col_dir + columns[None, :, None] * row_dir
        images.append(np.rint(values(points)).astype(np.int16))
        frame = {"row_dir": row_dir, "col_dir": col_dir, "rows": shape[1], "cols": shape[2]}
        frames.append(SimpleNamespace(position=points[0, 0], slope=1.0, intercept=0.0, padding=None, **frame))
    series = SimpleNamespace(frames=frames, normal=normal, spacing_mm=spacing_mm, images=images)
    series.modality, series.doubts, series.broken, series.decoded = modality, [], set(), set()

    def stored(i: int) -> np.ndarray:
        if i in series.broken:
            raise ValueError(f"slice {i} is broken")
        series.decoded.add(i)
        return series.images[i]

    series.stored, series.forget = stored, lambda *_: None
    return series


def head(points: np.ndarray, centre=(0, 0, 0)) -> np.ndarray:
    """An ellipsoid of 40 HU in air, 150 mm wide, 190 mm long, 200 mm high."""
    inside = (((points - np.asarray(centre)) / (75, 95, 100)) ** 2).sum(axis=-1) < 1
    return np.where(inside, 40.0, -1000.0)


def test_a_slice_reaches_to_the_midpoints_but_not_across_a_hole_and_slabs_weigh_slices_by_their_overlap():
    spans = slice_spans(np.array([0.0, 1.0, 2.0, 4.0]), 9.0)
    np.testing.assert_allclose(spans, [[-0.5, 0.5], [0.5, 1.5], [1.5, 2.75], [3.25, 4.5]])
    np.testing.assert_allclose(slice_spans(np.array([7.0]), 3.0), [[5.5, 8.5]])
    spans = np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 4.0]])
    weights, covered = slab_weights(spans, np.array([0.0, 1.5, 3.0, 4.0]))
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3], [0, 0, 1]])
    assert covered.tolist() == [1, 1, 1]
    spans = slice_spans(np.array([0.0, 1.0, 2.0, 6.0, 7.0]), 1.0)  # the slice at 2 reaches to 2.75
    weights, covered = slab_weights(spans, np.array([-0.5, 2.5, 3.5, 4.5, 7.5]))
    assert covered.tolist() == [1.0, 0.25, 0.0, 0.75]
    np.testing.assert_allclose(weights[2], [0, 0, 0.5, 0.5, 0])


def test_resizing_is_linear_between_slices_and_exact_from_the_first_edge_on():
    weights = line_weights(np.array([0.0, 2.0, 4.0]), np.array([-1.0, 0.5, 3.0, 9.0]))
    np.testing.assert_allclose(weights, [[1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1]])
    image = np.array([[0.0, 3.0, 6.0, 9.0, 12.0]] * 4, np.float32)
    shrunk = dicom.resize_exactly(image, np.array([0.5, 2 / 3]), (2, 3))  # 0..3 mm holds 0 and half of 3
    np.testing.assert_allclose(shrunk, [[1.0, 5.0, 10.0]] * 2, rtol=1e-6)
    mixed = dicom.resize_exactly(image, np.array([0.5, 2.0]), (2, 6))  # one axis shrinks, the other grows
    np.testing.assert_allclose(mixed, [[0.0, 0.75, 2.25, 3.75, 5.25, 6.75]] * 2, rtol=1e-6)


@pytest.mark.parametrize("name, tilt", [*((name, 0) for name in ORIENTATIONS), ("axial", -20), ("axial", 14)])
def test_a_blob_lies_where_its_millimetres_say_and_axes_grow_upwards_backwards_and_to_the_left(name, tilt):
    def values(points):
        return head(points) + 600 * np.exp(-((points - BLOB_MM) ** 2).sum(axis=-1) / (2 * 5.0**2))

    shear = np.tan(np.deg2rad(tilt)) * P  # of a gantry
    volume = make_volume(scan(values, *ORIENTATIONS[name], (70, 72, 122), (3.3, 3.3, 1.8), shear), SETTINGS)
    assert volume.voxels.shape == (16, 100, 100) and volume.voxels.dtype == np.uint8
    assert volume.voxels.max() > 150
    bright = np.where(volume.voxels > volume.voxels.max() / 2, volume.voxels, 0).astype(float)
    centre = [(index * bright).sum() / bright.sum() for index in np.indices(bright.shape)]  # of mass
    np.testing.assert_allclose(centre, to_voxel(BLOB_MM, volume.affine)[0], atol=0.5)
    directions = z, y, x = volume.affine[:3, :3].T / np.array(volume.spacing_mm)[:, None]
    assert min(z @ S, y @ P, x @ L) > 0.9
    np.testing.assert_allclose(directions @ directions.T, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(to_voxel(to_lps(BLOB_MM, volume.affine), volume.affine)[0], BLOB_MM, atol=1e-9)
    assert volume.spacing_mm[1:] == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("name", ["axial", "coronal", "sagittal", "oblique sagittal"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_box_starts_at_the_top_of_the_head_and_is_centred_on_it(name, modality):
    centre = np.array([12.0, -18.0, -15.0])

    def values(points):
        return head(points, centre) + (1000 + np.abs(points.sum(axis=-1)) % 9 if modality == "MR" else 0)

    series = scan(values, *ORIENTATIONS[name], (100, 100, 100), (2.6, 2.6, 2.6), modality=modality)
    volume = make_volume(series, SETTINGS)
    middle = to_lps(np.array([15.5, 49.5, 49.5]), volume.affine)[0]  # of the box's upper side
    assert volume.notes == []
    assert volume.spacing_mm[0] == pytest.approx(10.0)  # 160 mm in 16 slabs
    top = centre + S * 100
    if name == "oblique sagittal":
        assert np.linalg.norm(middle - top) < 25  # the axes lean, so does the box
    else:
        assert (np.abs(middle - top) <= [4, 4, 5]).all()


@pytest.mark.parametrize("name", ["axial", "sagittal"])
@pytest.mark.parametrize("rows, is_cut", [(100, True), (40, False)])  # of 2.6 mm: air above the head, or none
def test_the_upper_part_is_left_out_where_the_scan_shows_the_top(name, rows, is_cut):
    shape = (rows, 100, 100) if name == "axial" else (100, rows, 100)
    series = scan(head, *ORIENTATIONS[name], shape, (2.6, 2.6, 2.6))
    full = make_volume(series, SETTINGS)
    lower = make_volume(series, replace(SETTINGS, base_slices=12, roi_skip_mm=40.0))  # still 10 mm thick
    if is_cut:
        np.testing.assert_array_equal(lower.voxels, full.voxels[:12])
        np.testing.assert_allclose(lower.affine, full.affine)
    else:
        assert lower.spacing_mm[0] * 12 == pytest.approx(full.spacing_mm[0] * 16) == pytest.approx(104)


def test_table_headrest_and_shoulders_do_not_move_the_box():
    def values(points):
        x, y, z = np.moveaxis(points, -1, 0)
        table = (np.abs(y - 115) < 3) & (np.abs(x) < 120)  # reaches above the head
        headrest = (np.abs(np.hypot(x, y + 20) - 118) < 4) & (y > 40)
        shoulders = (z < -180) & (((x - 30) / 200) ** 2 + ((y - 40) / 100) ** 2 < 1)
        neck = (z < 0) & (z > -200) & (np.hypot(x, y - 20) < 55)
        return np.select([table | headrest, shoulders | neck], [100.0, 40.0], head(points))

    series = scan(values, L, P, (150, 130, 130), (3.0, 3.4, 3.4))
    assert dicom.find_head(dicom.canonical_grid(series)) == pytest.approx((100, 0, 0), abs=5)


@pytest.mark.parametrize("values, is_empty", [(head, False), (lambda p: np.full(p.shape[:-1], -1000), True)])
def test_the_box_of_a_short_scan_with_or_without_a_head_ends_with_it(values, is_empty):
    volume = make_volume(scan(values, L, P, (32, 64, 64), (2.0, 3.6, 3.6)), SETTINGS)  # 64 mm
    assert volume.spacing_mm[0] * 16 == pytest.approx(64)
    assert (volume.voxels.max(axis=(1, 2)) > 0).all() != is_empty
    assert any("head not found" in note for note in volume.notes) == is_empty


def test_slices_outside_of_the_region_are_not_decoded():
    series = scan(lambda points: head(points, (0, 0, 60)), L, P, (400, 32, 32), (1.0, 7.0, 7.0))  # top at 160
    volume = make_volume(series, SETTINGS)
    inside = {i for i in range(400) if 5 < 160 - (i - 199.5) < 155}
    assert inside <= series.decoded and len(series.decoded - inside) <= 30
    assert volume.spacing_mm[0] == pytest.approx(10)


def stack(images: np.ndarray, modality: str = "CT", at_mm=None, broken=()) -> SimpleNamespace:
    """Axial slices of 2 mm, each of one value (n,), pixels of 2 mm, as large as the box of SETTINGS."""
    grid = (len(images), 100, 100), (2.0, 2.0, 2.0)
    series = scan(head, L, P, *grid, modality=modality, at_mm=at_mm)
    series.images = [np.full((100, 100), value, np.int16) for value in images]
    series.broken = broken
    return series


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_a_slab_is_the_mean_of_its_windowed_slices_in_every_storage_type(dtype):
    series = stack((np.array([0, 310, 600, 2000, -500, 60, 120, 120]) + 500) // 10)
    series.images = [image.astype(dtype) for image in series.images]
    for frame in series.frames:
        frame.slope, frame.intercept = 10.0, -500.0
    volume = make_volume(series, replace(SETTINGS, base_slices=4))
    expected = [155, 600, 30, 120]  # of 0..600, every slice clipped before the mean
    assert np.median(volume.voxels, axis=(1, 2)).tolist() == [int(v / 600 * 255 + 0.5) for v in expected]


@pytest.mark.parametrize("name", ["coronal", "sagittal"])
def test_all_planes_give_the_same_volume(name):
    def values(points):
        waves = np.sin(points[..., 0] / 17) + np.cos(points[..., 1] / 23) + np.sin(points[..., 2] / 19)
        return np.where(head(points) > 0, 300 + 90 * waves, -1000.0)

    grid, settings = ((110, 110, 110), (2.0, 2.0, 2.0)), replace(SETTINGS, img_size=64)
    axial, other = (make_volume(scan(values, *ORIENTATIONS[p], *grid), settings) for p in ("axial", name))
    np.testing.assert_allclose(axial.affine, other.affine, atol=1.5)
    difference = np.abs(axial.voxels.astype(int) - other.voxels)
    assert np.median(difference[axial.voxels > 50]) <= 3
    assert np.mean(difference > 25) < 0.05  # edges, because the boxes differ by a fraction of a voxel


@pytest.mark.parametrize("hole_mm, num_interpolated, is_doubted", [(34, 8, True), (8, 2, False)])
def test_missing_slices_are_filled_by_position_and_noted(hole_mm, num_interpolated, is_doubted):
    at_mm = [0, 2, 4, 6, 8, *(8 + hole_mm + np.arange(0, 10, 2))]
    series = stack(np.array([0] * 5 + [600] * 5), at_mm=at_mm)
    for image in series.images:
        image[:20] = 300  # else the slabs would count as empty
    volume = make_volume(series, replace(SETTINGS, base_slices=12))
    greys = np.median(volume.voxels, axis=(1, 2))
    note = f"of the slabs ({num_interpolated}) are interpolated over missing slices"
    assert any(note in text for text in volume.notes)
    assert ["or interpolated over missing slices" in doubt for doubt in volume.doubts] == [True] * is_doubted
    assert greys[0] == 0 and greys[-1] == 255 and (np.diff(greys) >= 0).all()
    middle_mm = -1 + 6.5 * (18 + hole_mm) / 12  # of slab 6
    assert greys[6] == pytest.approx(255 * (middle_mm - 8) / hole_mm, abs=8)


def test_each_mr_slice_has_its_own_rescale_whose_slope_may_be_negative():
    series = stack(np.array([100, 50, 600, 75, 700, 100]), "MR")
    slopes = [1, 2, 0.5, 4, -1, 5]  # with the intercept of slice 4: 100, 100, 300, 300, 500, 500
    for frame, image, slope in zip(series.frames, series.images, slopes, strict=True):
        frame.slope, frame.intercept = slope, 1200 * (slope < 0)
        image[0, 0] += 1  # else it would count as blank
    volume = make_volume(series, replace(SETTINGS, base_slices=3, mr_percentiles=(0.1, 99.9)))
    assert np.median(volume.voxels, axis=(1, 2)).tolist() == [0, 128, 255]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_padding_is_dark_whatever_its_value_means(modality):
    series = stack(np.array([500] * 8), modality)
    for frame, image in zip(series.frames, series.images, strict=True):
        image[:, :50] = 3000  # as bright as bone, were it not padding
        image[0, 50:] = 100
        frame.padding = (3000, 3000)
    volume = make_volume(series, replace(SETTINGS, base_slices=4))
    middle = round(to_voxel(np.zeros(3), volume.affine)[0, 2])  # padding lies to the patient's right of it
    assert 20 < middle < 60 and (volume.voxels[:, :, : middle - 2] == 0).all()
    assert (volume.voxels[:, 5:90, middle + 2 : middle + 45] > 200).all()


def test_one_slice_is_a_volume_few_broken_are_left_out_and_noted_many_or_an_absurd_spacing_refused():
    for num, broken in ((1, []), (40, [11, 12])):
        volume = make_volume(stack(np.full(num, 310), broken=broken), SETTINGS)
        assert volume.spacing_mm[0] * 16 == pytest.approx(2.0 * num)
        assert (np.median(volume.voxels, axis=(1, 2)) == 132).all()
    assert "2 slices left out, they cannot be decoded: slice 12 is broken" in volume.notes
    for num, broken in ((1, [0]), (40, range(5, 40, 6))):
        with pytest.raises(ValueError, match="is broken"):
            make_volume(stack(np.full(num, 310), broken=broken), SETTINGS)
    with pytest.raises(ValueError, match="PixelSpacing"):
        make_volume(scan(head, L, P, (4, 64, 64), (2.0, 1e-5, 1e-5)), SETTINGS)
