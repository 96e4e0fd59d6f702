"""Write a Kaggle-shaped set of real DICOM files: heads with arteries, some with aneurysms, and their labels.

in   nothing: every number is drawn from --seed
     --backgrounds DIR    a tree of CT and MR series of heads without aneurysms, to draw the arteries into;
                          an MR scan of any kind passes as MRA, T2 or T1post by chance
out  --dst DIR    series/<SeriesInstanceUID>/<SOPInstanceUID>.dcm, train.csv, train_localizers.csv
run  python tests/phantom.py --dst dicoms --series 160 --seed 0

A head is a set of shells, ellipsoids and tubes in millimetres, painted straight onto the grid that a scanner
would have acquired. Patients, anatomy, acquisition, noise and aneurysms have generators of their own, so that
only an aneurysm's voxels tell its label: --no-aneurysms-drawn writes the same set without those voxels.
A real scan keeps its face and comes back under many patients: test on other scans.
"""

import shutil
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain, pairwise, product, repeat
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import set_pixel_data
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dicom
import frames
from common import LABELS, LOCATIONS, MODALITIES, make_parser, usable_cores

TABLE = ["SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABELS]  # columns of train.csv
POINTS = ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]  # and of train_localizers.csv
FORMS = {  # transfer syntax, and how often of 20 series
    "explicit": (uids.ExplicitVRLittleEndian, 5), "implicit": (uids.ImplicitVRLittleEndian, 3),
    "big endian": (uids.ExplicitVRBigEndian, 1), "deflated": (uids.DeflatedExplicitVRLittleEndian, 1),
    "RLE": (uids.RLELossless, 2), "JPEG 2000": (uids.JPEG2000Lossless, 2),
    "JPEG-LS": (uids.JPEGLSLossless, 1), "monochrome1": (uids.ExplicitVRLittleEndian, 1),
    "enhanced": (uids.ExplicitVRLittleEndian, 3), "enhanced JPEG 2000": (uids.JPEG2000Lossless, 1),
}  # fmt: skip

# --- anatomy ------------------------------------------------------------------------------------------------
# Millimetres from the vertex in the head's frame: x to the patient's left, y to the back, z up. Only the left
# half and the midline stand here: the right half mirrors the left. Branches share a point with a parent. A
# row has the radius at both ends, then points x, y, z. A midline vessel ends where its mirror image begins.
# fmt: off
VESSELS = """\
artery acom 0.8 0.8  2.5 -23 -89  0 -23.6 -89  -2.5 -23 -89
artery basilar 1.6 1.6  0 12 -127  0 7.5 -117  0 5.5 -108  0 5 -100  0 4 -96
artery ica 2.5 1.9  25 20 -290  26 18 -230  26 12 -165  27 8 -138  22 2 -128  14 -4 -123  11 -7 -116 \
  12 -18 -112  12 -24 -107  12.5 -21 -102  13.5 -16 -99  14.5 -13 -96  15.5 -12 -92
artery m1 1.5 1.35  15.5 -12 -92  24 -14 -90  33 -12 -91
artery m2-superior 1.1 0.7  33 -12 -91  38 -9 -85  41 0 -76  40 12 -68  54 20 -56  60 14 -44
artery m2-inferior 1.1 0.7  33 -12 -91  38 -6 -91  41 4 -87  43 18 -82  54 30 -76  58 44 -66
artery m2-temporal 0.8 0.5  24 -14 -90  30 -20 -96  40 -20 -100  50 -12 -102
artery a1 1.2 1.1  15.5 -12 -92  9 -18 -90  2.5 -23 -89
artery a2 1.1 1.0  2.5 -23 -89  3.5 -30 -83  4.5 -38 -73  4.5 -37 -62
artery pericallosal 0.9 0.6  4.5 -37 -62  4 -28 -51  3.5 -8 -44  3.5 14 -44
artery callosomarginal 0.8 0.5  4.5 -37 -62  5 -44 -52  5 -36 -36  5 -18 -28
artery pcom 0.8 0.8  14.5 -13 -96  13.5 -6 -97  12 1 -96  10 6 -94
artery ophthalmic 0.7 0.5  12.5 -21 -102  14 -28 -103  19 -42 -104
artery choroidal 0.6 0.4  15.5 -12 -92  18 -4 -92  21 6 -89
artery pca 1.2 0.7  0 4 -96  5 4.5 -95  10 6 -94  17 12 -92  21 24 -88  17 42 -84  12 58 -80
artery sca 0.7 0.5  0 5 -100  8 9 -99  18 20 -95  22 34 -94
artery aica 0.6 0.4  0 7.5 -117  11 10 -119  22 14 -121
artery vertebral 1.4 1.4  15 22 -290  15 22 -215  16 23 -178  18 30 -158  14 25 -148  9 19 -139  0 12 -127
artery pica 0.8 0.5  9 19 -139  15 24 -140  16 31 -134  10 38 -131  5 42 -136
vein sagittal-sinus 2.0 4.0  0 -76 -50  0 -56 -26  0 -12 -11  0 40 -22  0 74 -60  0 78 -92
vein straight-sinus 1.8 2.5  0 32 -66  0 54 -78  0 78 -92
vein transverse 3.5 3.5  0 78 -92  25 70 -98  48 46 -104  50 26 -122  32 20 -144  29 24 -200  29 26 -290
vein internal-cerebral 0.9 1.1  2 -8 -66  2 10 -62  0 32 -66
vein middle-cerebral 1.2 1.0  14 -24 -112  34 -26 -100  52 -16 -84  58 -4 -66
"""
SITES = {  # a word of the location: vessel, first and last place in units of its points, the dome's direction
    "Infraclinoid": [("ica", 6, 8.3, (0.8, -0.4, 0.2)), ("ica", 4, 5.5, (0.5, 0.3, 0.8))],
    "Supraclinoid": [("ica", 9.4, 10.4, (-0.7, -0.2, 0.7)), ("ica", 11.8, 12, (0, 0.2, 1))],
    "Middle Cerebral": [("m1", 2, 2, (1, -0.2, -0.1)), ("m1", 1.9, 2, (0.8, -0.6, -0.4)),
                        ("m2-superior", 1, 2.2, (0.8, -0.6, 0.2))],
    "Anterior Communicating": [("acom", 0.3, 1.7, (0, -0.9, 0.5)), ("acom", 0.3, 1.7, (0, -0.4, -0.9))],
    "Anterior Cerebral": [("a2", 2.9, 3, (0.2, -0.8, 0.6)), ("a1", 0.7, 1.3, (0.1, -0.2, 0.9))],
    "Posterior Communicating": [("ica", 11, 11, (0.4, 0.9, -0.4))],
    "Basilar Tip": [("basilar", 4, 4, (0, -0.1, 1))],
    "Other": [("vertebral", 4.9, 5.1, (0.7, 0.1, 0.6)), ("pca", 1.8, 3.2, (0.4, -0.1, 0.9)),
              ("basilar", 0.9, 2.2, (0.6, -0.8, 0)), ("sca", 0.4, 0.8, (0.6, -0.5, 0.5))],
}
INFUNDIBULA = ["pcom", "choroidal", "ophthalmic", "sca", "pica", "m2-temporal", "aica"]  # may begin as cones
PARTS = [  # in order: tissue, centre, half-axes, degrees turned about z; x > 0 stands for both sides
    ("csf", (0, -9, -97), (20, 22, 9), 0), ("csf", (34, -9, -88), (13, 9, 5), 0),  # basal and Sylvian cistern
    ("csf", (0, 14, -108), (11, 8, 22), 0), ("brain", (0, 17, -108), (10, 10, 24), 0),  # brain stem
    ("csf", (10, 4, -56), (6, 32, 8), 8), ("csf", (24, 26, -72), (5, 14, 8), 20),  # lateral ventricles
    ("csf", (0, 2, -74), (2.5, 12, 9), 0), ("csf", (0, 31, -114), (6, 5, 9), 0),  # third, fourth
    ("soft", (0, -15, -111), (9, 8, 5), 0), ("bone", (34, 8, -131), (26, 8, 9), 38),  # pituitary, petrous
    ("bone", (0, -5, -108), (9, 2.5, 7), 0), ("bone", (0, 1, -124), (12, 4, 12), 0),  # dorsum sellae, clivus
    ("bone", (16, -27, -102), (3.5, 5, 2.5), 0), ("bone", (34, -31, -101), (20, 4, 2.5), -8),  # skull base
    ("air", (0, -26, -118), (10, 11, 7), 0), ("air", (9, -78, -92), (8, 4, 8), 0),  # sinuses: middle, front
    ("air", (26, -44, -138), (12, 13, 13), 0), ("air", (6, -48, -125), (5, 20, 13), 0),  # maxillary, nose
    ("fat", (31, -56, -108), (16, 20, 14), 14), ("csf", (31, -65, -108), (11, 11, 11), 0),  # orbit, eye
    ("bone", (0, 24, -185), (17, 15, 26), 0), ("air", (0, -22, -190), (9, 7, 50), 0),  # spine, airway
]
GREY = {  # HU for CT; arbitrary for MR, 1000 near the brightest; noise is a standard deviation
    "CTA": dict(air=-1000, soft=45, bone=900, brain=36, csf=8, fat=-70, artery=360, vein=220, noise=14),
    "MRA": dict(air=0, soft=170, bone=60, brain=230, csf=110, fat=260, artery=720, vein=250, noise=22),
    "MRI T2": dict(air=0, soft=260, bone=60, brain=380, csf=850, fat=520, artery=60, vein=90, noise=22),
    "MRI T1post": dict(air=0, soft=300, bone=70, brain=380, csf=140, fat=620, artery=800, vein=780, noise=20),
}
# fmt: on


def generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """A generator for each patient or series and purpose, so that one more draw moves nothing elsewhere."""
    return np.random.default_rng([seed, number, zlib.crc32(purpose.encode())])


def make_uid(*parts: object) -> str:
    """A UID of 64 characters that depends on `parts` alone."""
    return uids.generate_uid(entropy_srcs=["/".join(map(str, ("phantom", *parts)))])


@dataclass(frozen=True)
class Job:
    """One series of the set, as far as it is known before its voxels are drawn."""

    seed: int
    number: int
    patient: int
    uid: str
    modality: str
    plane: str
    form: str  # how the pixels are stored, one of FORMS
    matrix: int  # pixels across an image
    locations: tuple[str, ...]  # of the aneurysms
    draw_aneurysms: bool
    background: tuple[Path, ...] = ()  # files of the real series to draw into


def plan(
    series: int, seed: int, matrix: int, modality="", plane="", plain=False, draw_aneurysms=True
) -> list[Job]:
    """Patients with one or two series each, their aneurysms, and how each series is acquired and stored."""

    def deal(purpose: str, cards: list, count: int = series) -> list:
        """Cards from shuffled decks in turn: every card comes up soon, and a longer set starts alike."""
        rng, dealt = generator(seed, 0, purpose), []
        while len(dealt) < count:
            dealt += [cards[i] for i in rng.permutation(len(cards))]
        return dealt

    mixed = ["CTA"] * 4 + ["MRA"] * 3 + ["MRI T2"] * 2 + ["MRI T1post"]
    modalities = deal("modality", [modality] if modality else mixed)
    planes = deal("plane", [plane] if plane else ["axial"] * 6 + ["coronal", "sagittal"] * 2)
    mixed = [form for form, (_, share) in FORMS.items() for _ in range(share)]
    forms = deal("form", ["explicit"] if plain else mixed)
    locations = iter(deal("location", list(LOCATIONS), 2 * series))
    phase = generator(seed, 0, "prevalence").random()
    jobs = []
    for patient in range(series):
        # 45 % of the patients are positive, spread evenly over any range by the golden ratio
        is_positive = (phase + 0.6180339887 * patient) % 1 < 0.45
        has_two = generator(seed, patient, "aneurysms").random() < 0.2
        drawn = tuple(next(locations) for _ in range(is_positive * (1 + has_two)))
        visits = 1 + (generator(seed, patient, "visits").random() < 0.15)  # some are scanned twice
        for n in range(len(jobs), min(len(jobs) + visits, series)):
            acquisition = (make_uid(seed, "series", n), modalities[n], planes[n], forms[n], matrix)
            jobs.append(Job(seed, n, patient, *acquisition, drawn, draw_aneurysms))
    return jobs


def make_head(job: Job) -> tuple[np.ndarray, dict, list, list]:
    """Jittered anatomy of one patient: the skull's scale (3,), vessels {tissue: {(name, side): tube}}, parts
    (tissue, ellipsoid), and domes, ellipsoids that take no part in the other draws. A tube (n, 5) holds x, y,
    z and radius in mm, and the place in units of template points; an ellipsoid its centre (3,), its axes'
    directions in rows (3, 3) and half their mm (3,)."""
    rng = generator(job.seed, job.patient, "anatomy")
    scale = np.clip(rng.normal(1, 0.035, 3), 0.93, 1.07)
    if job.background:
        scale = read_background(job.background)[2]
    rate, phase = rng.normal(0, 1 / 25, (5, 3)), rng.uniform(0, 2 * np.pi, 5)
    height_mm = rng.normal(0, [0.6, 1.4, 1.4], (5, 3))
    size = np.clip(rng.normal(1, 0.08), 0.85, 1.2)

    @cache
    def bend(point: tuple[float, ...]) -> np.ndarray:
        """A template point on five waves, the same for all vessels: branches stay on their parents."""
        waves = np.sin(rate @ np.array(point) + phase) @ height_mm
        return np.array(point) * scale + waves + rng.normal(0, 0.7, 3)

    vessels = {"artery": {}, "vein": {}}
    rows = [row.split() for row in VESSELS.splitlines()]
    for (tissue, tubes), side in product(vessels.items(), (0, 1, -1)):
        for kind, name, first, last, *numbers in rows:
            points = np.reshape(numbers, (-1, 3)).astype(float)
            is_midline = points[0, 0] == -points[-1, 0]
            if kind == tissue and is_midline == (side == 0):
                bent = [bend(tuple(point)) for point in points * [side or 1, 1, 1]]
                tubes[name, side] = grow(np.array(bent), (float(first), float(last)), rng)
                tubes[name, side][:, 3] *= size
    narrow_and_widen(vessels["artery"], rng)
    parts = []
    for tissue, centre, axes, turn in PARTS:
        axes = np.array(axes) * scale * rng.normal(1, 0.06, 3)
        for side in (1, -1) if centre[0] else (1,):
            place = np.array(centre) * scale * [side, 1, 1] + rng.normal(0, 0.6, 3)
            parts.append((tissue, (place, rotation([0, 0, side * turn]).T, axes)))
    return scale, vessels, parts, draw_domes(job, vessels["artery"])


def grow(points: np.ndarray, radius: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A tube through points (n, 3), sampled every 2 mm or so: a Catmull-Rom curve, its radius wobbling."""
    num = len(points)
    lengths_mm = np.linalg.norm(np.diff(points, axis=0), axis=1)
    counts = np.maximum(1, np.rint(lengths_mm / 2)).astype(int)
    steps = np.append(np.concatenate([i + np.arange(n) / n for i, n in enumerate(counts)]), num - 1)
    index = np.minimum(steps.astype(int), num - 2)
    t = (steps - index)[:, None]
    padded = np.pad(points, ((1, 1), (0, 0)), "reflect", reflect_type="odd")
    a, b, c, d = (padded[index + i] for i in range(4))
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    wobble = np.interp(steps, np.arange(num), rng.normal(0, 0.08, num))
    radii = np.interp(steps, [0, num - 1], radius) * (1 + wobble)
    if rng.random() < 0.4:  # a bend between two template points that may pass for an aneurysm
        bump = np.sin(np.pi * steps) ** 2 * (steps.astype(int) == rng.integers(num - 1))
        curve = curve + bump[:, None] ** 2 * rng.normal(0, 2.5, 3)
    return np.column_stack([curve, radii, steps])


def narrow_and_widen(arteries: dict[tuple[str, int], np.ndarray], rng: np.random.Generator) -> None:
    """Hypoplastic arteries, and infundibula: cones under 3 mm where a branch leaves; changes the tubes."""
    for side in (1, -1):
        for name in ("a1", "pcom", "vertebral"):
            arteries[name, side][:, 3] *= rng.choice([1, 0.6], p=[0.8, 0.2])
        for name in INFUNDIBULA:
            width, length, tube = rng.uniform(1.0, 1.45), rng.uniform(2.0, 4.0), arteries[name, side]
            if rng.random() < 0.25:
                along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(tube[:, :3], axis=0), axis=1))]
                tube[:, 3] = np.maximum(tube[:, 3], width * (1 - along / (2 * length)))


def draw_domes(job: Job, arteries: dict[tuple[str, int], np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """Aneurysms of 3-9 mm, median 6, on the walls of the arteries that their locations cover."""
    rng, domes = generator(job.seed, job.patient, "aneurysms"), []
    rng.random()  # plan() draws their number from it
    for location in job.locations:
        side = 1 if location.startswith("Left ") else -1 if location.startswith("Right ") else 0
        sites = next(sites for word, sites in SITES.items() if word in location)
        vessel, first, last, direction = sites[rng.integers(len(sites))]
        if (vessel, side) not in arteries:
            side = int(rng.choice([-1, 1]))
        direction = np.array(direction) / np.linalg.norm(direction) + rng.normal(0, 0.25, 3)
        direction = direction / np.linalg.norm(direction) * [side or 1, 1, 1]
        half = np.clip(6.0 * np.exp(rng.normal(0, 0.3)), 3, 9) / 2  # of the width
        place, aspect = rng.uniform(first, last), rng.uniform(0.9, 1.35)
        tube = arteries[vessel, side]
        *centre, radius, _ = (np.interp(place, tube[:, 4], column) for column in tube.T)
        centre = np.array(centre) + direction * (0.7 * radius + 0.75 * half * aspect)
        directions = np.linalg.svd(direction[None])[2]  # its first row is the direction
        domes.append((centre, directions, np.array([half * aspect, half, half])))
    return domes


@dataclass
class Scan:
    """Geometry and contrast of one acquisition; affine maps voxels (z, y, x, 1) to LPS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    thickness_mm: float
    pose: np.ndarray  # (4, 4), the head's frame to LPS
    grey: dict[str, float]


def rotation(degrees: np.ndarray) -> np.ndarray:  # (3, 3) about x, then y, then z
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def make_scan(job: Job) -> Scan:
    """Field of view, spacing, coverage and obliqueness as scanners of that modality have them."""
    rng = generator(job.seed, job.number, "scan")
    if job.background:
        scan, turn = read_background(job.background)[1], np.eye(4)
        turn[:3] = np.column_stack([rotation(rng.normal(0, 2, 3)), rng.normal(0, 2, 3)])
        grey = {"artery": GREY[job.modality]["artery"] * rng.uniform(0.8, 1.2)}
        return replace(scan, pose=scan.pose @ turn, grey=grey)
    is_ct, is_axial = job.modality == "CTA", job.plane == "axial"
    pose = np.eye(4)
    pose[:3, :3] = rotation(np.clip(rng.normal(0, 3.5, 3), -8, 8))
    pose[:3, 3] = rng.uniform(-60, 60, 3)
    pose[2, 3] += rng.choice([0.0, 900.0, -1400.0])  # the table's zero
    # in the plane: MR may have a narrow field of view, and pixels taller than wide
    fov_mm, is_narrow = rng.uniform(212, 245), rng.random() < 0.5
    ratio = rng.choice([1.0, 1.2], p=[0.85, 0.15])
    pixel_mm = fov_mm / job.matrix
    row_mm = pixel_mm * (1.0 if is_ct else ratio)
    rows, cols = round(fov_mm / row_mm), job.matrix
    if is_narrow and not is_ct and job.plane != "sagittal":
        cols = round(0.84 * job.matrix)
    # along the normal: a small matrix gets wider spacing, but thick slices stay as they are
    low, high = {"CTA": (0.6, 1.25), "MRA": (0.5, 1.0), "MRI T2": (3, 5), "MRI T1post": (1, 3)}[job.modality]
    spacing_mm = rng.uniform(low, high) * (max(1.0, pixel_mm / 0.75) if high < 2 else 1)
    thickness_mm = spacing_mm * rng.choice([0.8, 0.9, 1.0] if job.modality == "MRI T2" else [1.0, 1.0, 1.3])
    has_neck, neck_mm, is_slab = rng.random() < 0.3, rng.uniform(-270, -215), rng.random() < 0.4
    bottom_mm, top_mm = rng.uniform(-178, -162), rng.uniform(6, 14)
    if is_axial:
        row, col, centre = (1, 0, 0), (0, 1, 0), (0, 0, 0)
        bottom_mm = neck_mm if is_ct and has_neck else bottom_mm
        if job.modality == "MRA" and is_slab:  # time of flight of the arteries alone
            top_mm = -45
    else:
        row, top_mm = ((1, 0, 0), 104) if job.plane == "coronal" else ((0, 1, 0), 84)
        col, centre, bottom_mm = (0, 0, -1), (0, 0, -95), -top_mm
    turn = rotation(np.clip(rng.normal(0, 5, 3), -9, 9) * (not (is_ct and is_axial)))
    tilt = rotation([rng.choice([0, 10, -12], p=[0.9, 0.05, 0.05]) * (is_ct and is_axial), 0, 0])
    row, col = turn @ row, turn @ col
    step = np.cross(row, col) * rng.choice([1 if is_axial else -1, 1]) * spacing_mm
    col = tilt @ col  # a tilted gantry: the slices lean, the table still moves along z
    offset = np.array([*rng.uniform(-4, 4, 2), 0]) + centre
    first = (pose @ [*offset, 1])[:3] + step / spacing_mm * bottom_mm
    affine = np.eye(4)
    affine[:3, :3] = np.stack([step, col * row_mm, row * pixel_mm], axis=1)
    affine[:3, 3] = first - affine[:3, 1] * (rows - 1) / 2 - affine[:3, 2] * (cols - 1) / 2
    shape = (int((top_mm - bottom_mm) / spacing_mm) + 1, rows, cols)
    grey = dict(GREY[job.modality])
    for name, factor in zip(("artery", "vein", "noise"), rng.uniform(0.85, 1.15, 3), strict=True):
        grey[name] *= factor
    return Scan(shape, affine, thickness_mm, pose, grey)


# --- real heads ---------------------------------------------------------------------------------------------
@lru_cache(4)
def read_background(files: tuple[Path, ...]) -> tuple[np.ndarray, Scan, np.ndarray, str, str]:
    """Values (z, y, x) of a real series, HU or 700 near the brightest; geometry with the head's pose; its
    scale (x, y, z) by the template; modality, plane. ValueError if it shows no head down to the arteries."""
    series = dicom.read_series(list(files))
    grid = dicom.canonical_grid(series)
    head, sides_mm = dicom.find_head(grid), np.ptp(grid.extents_mm, axis=1)
    if head is None or min(*sides_mm, head[0] - grid.extents_mm[0, 0]) < 120:
        raise ValueError(f"{series.uid}: no head of 120 mm in each direction; left out")
    images = [frames.rescale_values(frame, series.stored(i)) for i, frame in enumerate(series.frames)]
    values = np.nan_to_num(np.array(images, np.float32), nan=-1000 if series.modality == "CT" else 0)
    if series.modality != "CT":
        values *= 700 / np.percentile(values, 99.5)
    pose = np.eye(4)
    pose[:3, :3] = grid.directions[::-1].T
    pose[:3, 3] = pose[:3, :3] @ head[::-1]
    steps = [-(-size // 64) for size in values.shape]
    part = values[tuple(slice(None, None, step) for step in steps)]
    voxels = np.indices(part.shape).reshape(3, -1).T * steps
    z, y, x = grid.directions @ dicom.to_lps(voxels, series.affine).T
    threshold = -300 if series.modality == "CT" else dicom.choose_threshold([part])
    is_head = (part.ravel() > threshold) & (abs(z + 70 - head[0]) < 15)
    # 5 and 95 % of an ellipse lie at 0.806 of its half axes; the template's are 75 and 95 mm
    width, length = (np.ptp(np.percentile(side[is_head], (5, 95))) / 1.612 for side in (x, y))
    scale = np.clip([width / 75, length / 95, (width / 75 + length / 95) / 2], 0.85, 1.2)
    scan = Scan(values.shape, series.affine, series.spacing_mm[0], pose, {})
    return values, scan, scale, series.modality, series.plane


def find_backgrounds(root: Path) -> list[tuple]:
    """(files, modality, plane) of the series that show a head; the others are named on stderr."""
    backgrounds = []
    for files in map(tuple, dicom.find_series(root)[0].values()):
        try:
            backgrounds.append((files, *read_background(files)[3:]))
            print(f"phantom.py: draws into {files[0].parent}", file=sys.stderr)
        except ValueError as error:
            print(f"phantom.py: {files[0].parent}: {error}", file=sys.stderr)
    if not backgrounds:
        sys.exit(f"phantom.py: {root}: no series of a head; expected CT or MR, 120 mm in each direction")
    return backgrounds


def draw_into(job: Job, backgrounds: list[tuple]) -> Job:
    """The job in one of the real heads, the same one for all series of a patient."""
    number = generator(job.seed, job.patient, "background").integers(len(backgrounds))
    files, modality, plane = backgrounds[number]
    of_mr = job.modality if job.modality != "CTA" else "MRA"
    return replace(job, background=files, modality="CTA" if modality == "CT" else of_mr, plane=plane)


# --- painting -----------------------------------------------------------------------------------------------
def coordinates(affine: np.ndarray, box: tuple[slice, ...]) -> list[np.ndarray]:
    """x, y and z in mm of every voxel in a box, each of the box's shape."""
    k, j, i = (np.arange(s.start, s.stop, dtype=np.float32) for s in box)
    a = affine.astype(np.float32)
    return [(a[r, 0] * k + a[r, 3])[:, None, None] + (a[r, 1] * j)[:, None] + a[r, 2] * i for r in range(3)]


@dataclass
class Canvas:
    """A volume of grey values, painted with soft edges one voxel wide; affine maps it to the head's frame."""

    values: np.ndarray
    affine: np.ndarray
    width_mm: float  # of a voxel, the mean of its sides

    def box(self, points: np.ndarray, reach_mm: float) -> tuple[tuple[slice, ...], list[np.ndarray]]:
        """Voxels within `reach_mm` of the points (n, 3), and their x, y and z in mm from the first point."""
        inverse = np.linalg.inv(self.affine)
        voxels = points @ inverse[:3, :3].T + inverse[:3, 3]
        reach = reach_mm * np.linalg.norm(inverse[:3, :3], axis=1)
        low = np.clip(np.floor(voxels.min(0) - reach).astype(int), 0, self.values.shape)
        high = np.clip(np.ceil(voxels.max(0) + reach).astype(int) + 1, 0, self.values.shape)
        box = tuple(map(slice, low, high))
        places = zip(coordinates(self.affine, box), points[0].astype(np.float32), strict=True)
        return box, [place - centre for place, centre in places]

    def paint_ellipsoid(self, value: float, ellipsoid: tuple[np.ndarray, ...]) -> None:
        """Paint an ellipsoid over what is there."""
        centre, directions, axes = ellipsoid
        box, (x, y, z) = self.box(centre[None], axes.max() + self.width_mm)
        u = (directions / axes[:, None]).astype(np.float32)
        radius = np.sqrt(sum((u[r, 0] * x + u[r, 1] * y + u[r, 2] * z) ** 2 for r in range(3)))
        alpha = np.clip(0.5 - (radius - 1) * np.float32(axes.min() / self.width_mm), 0, 1)
        self.values[box] += alpha * (np.float32(value) - self.values[box])

    def paint_tubes(self, value: float, tubes: Iterable[np.ndarray]) -> None:
        """Paint the union of tubes: each voxel's share is that of the segment that fills it most."""
        share, width = np.zeros_like(self.values), np.float32(self.width_mm)
        for tube in tubes:
            for (*a, ra, _), (*b, rb, _) in pairwise(tube):
                box, (x, y, z) = self.box(np.array([a, b]), max(ra, rb) + self.width_mm)
                d = np.subtract(b, a).astype(np.float32)
                t = np.clip((x * d[0] + y * d[1] + z * d[2]) / (d @ d + np.float32(1e-6)), 0, 1)
                gap = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)
                # a vessel narrower than a voxel fills it in part
                fill = min(1.0, np.pi * (0.5 * (ra + rb) / self.width_mm) ** 2)
                alpha = np.clip(0.5 - (gap - (ra + t * np.float32(rb - ra))) / width, 0, fill)
                np.maximum(share[box], alpha, out=share[box])
        self.values += share * (np.float32(value) - self.values)


def cut_cloud(field: np.ndarray, place: float, shape: tuple[int, int]) -> np.ndarray:
    """An image through a smooth random field, given as a small array, at a place from 0 to 1 along it."""
    place *= len(field) - 1
    i = min(int(place), len(field) - 2)
    mixed = field[i] + (field[i + 1] - field[i]) * np.float32(place - i)
    return cv2.resize(mixed, shape[::-1])


def paint_skull(canvas: Canvas, scale: np.ndarray, grey: dict[str, float], clouds: list[np.ndarray]) -> None:
    """Scalp, skull, skull base, brain with sulci, face and neck, as shells of the depth below the skin."""
    w, to_unit = canvas.width_mm, np.diag([*1 / scale, 1]) @ canvas.affine
    count, rows, cols = canvas.values.shape

    def shells(depth: np.ndarray, *layers: tuple[float, str]) -> np.ndarray:
        """Grey by depth below the skin in mm: each layer from its depth to the next one's."""
        knots = [start + edge for start, _ in layers for edge in (-w / 2, w / 2)]
        values = [grey[tissue] for _, tissue in layers for _ in range(2)]
        return np.interp(depth, knots, [grey["air"], *values[:-1]]).astype(np.float32)

    for k in range(count):
        x, y, z = (c[0] for c in coordinates(to_unit, (slice(k, k + 1), slice(0, rows), slice(0, cols))))
        dz = (z + 80) / np.where(z > -80, np.float32(80), np.float32(120))
        skull = (1 - np.sqrt((x / 75) ** 2 + (y / 95) ** 2 + dz**2)) * 82
        neck = np.minimum((1 - np.sqrt((x / 56) ** 2 + ((y - 20) / 60) ** 2)) * 58, -110 - z)
        base = -147 + 24 / (1 + np.exp((y - 10) / 4)) + 22 / (1 + np.exp((y + 28) / 3)) + 3 * np.sin(x / 9)
        upper = np.clip((z - base) / w, 0, 1)
        above = shells(skull, (0, "soft"), (2.5, "fat"), (6, "bone"), (11.5, "csf"), (13.5, "brain"))
        floor = shells(skull, (0, "soft"), (2.5, "fat"), (7, "bone"))
        below = shells(np.maximum(skull, neck), (0, "soft"), (2.5, "fat"), (7, "soft"))
        values = below + np.clip((z - base + 7) / w, 0, 1) * (floor - below)
        values += upper * (above - values)
        coarse, fine = (cut_cloud(c, k / max(1, count - 1), (rows, cols)) for c in clouds)
        sulci = np.clip(1.5 * fine - 1.2, 0, 1) * np.clip((34 - skull) / 8, 0, 1)
        values += sulci * np.clip((skull - 12.5) / w, 0, 1) * upper * (grey["csf"] - values)
        canvas.values[k] = values + 0.12 * (coarse + 0.6 * fine) * np.maximum(values, 0)


def render(job: Job) -> np.ndarray:
    """Grey values (z, y, x) float32 of the scan: HU for CT. Thick slices are the mean of thinner ones."""
    scan, (scale, vessels, parts, domes) = make_scan(job), make_head(job)
    count = max(1, round(scan.thickness_mm / (1.6 * np.linalg.norm(scan.affine[:3, 2]))))
    rng = generator(job.seed, job.number, "texture")
    shapes = ((10, 12, 12), (30, 34, 34), (4, 4, 4))
    *clouds, bias = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    flow = generator(job.seed, job.number, "flow").uniform(0.88, 1.0, len(domes))  # slower in a dome
    total = np.zeros(scan.shape, np.float32)
    for layer in range(count):
        shift = np.eye(4)
        shift_mm = ((layer + 0.5) / count - 0.5) * scan.thickness_mm
        shift[0, 3] = shift_mm / np.linalg.norm(scan.affine[:3, 0])
        to_head = np.linalg.inv(scan.pose) @ scan.affine @ shift
        width_mm = sum(np.linalg.norm(to_head[:3, i]) for i in (1, 2)) + scan.thickness_mm / count
        canvas = Canvas(np.zeros(scan.shape, np.float32), to_head, width_mm / 3)
        if job.background:
            canvas.values += read_background(job.background)[0]
        else:
            paint_skull(canvas, scale, scan.grey, clouds)
            for tissue, part in parts:
                canvas.paint_ellipsoid(scan.grey[tissue], part)
            canvas.paint_tubes(scan.grey["vein"], vessels["vein"].values())
        canvas.paint_tubes(scan.grey["artery"], vessels["artery"].values())
        if job.draw_aneurysms:
            for share, dome in zip(flow, domes, strict=True):
                canvas.paint_ellipsoid(scan.grey["artery"] * share, dome)
        total += canvas.values / count
    if job.background:
        return total  # with its own noise
    noise = generator(job.seed, job.number, "noise")
    for k, image in enumerate(total):
        first = noise.standard_normal(image.shape, dtype=np.float32) * scan.grey["noise"]
        if job.modality == "CTA":
            image += first
        else:  # the magnitude of a complex signal: Rician, not zero in air
            second = noise.standard_normal(image.shape, dtype=np.float32) * scan.grey["noise"]
            image *= np.exp(0.18 * cut_cloud(bias, k / max(1, len(total) - 1), image.shape))
            np.hypot(image + first, second, out=image)
    return total


# --- DICOM --------------------------------------------------------------------------------------------------
def make_dataset(**values: object) -> Dataset:
    d = Dataset()
    d.update(values)
    return d


def make_header(job: Job, scan: Scan, rescale: dict) -> Dataset:
    """What all slices of a series share. Enhanced CT and MR have it in functional groups (PS3.3 C.7.6.16)."""
    rng, is_ct = generator(job.seed, job.patient, "person"), job.modality == "CTA"
    kind, is_enhanced = "CT" if is_ct else "MR", job.form.startswith("enhanced")
    spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    along = scan.affine[:3, :3] / spacing_mm
    d = make_dataset(
        SOPClassUID=getattr(uids, f"{'Enhanced' * is_enhanced}{kind}ImageStorage"),
        Modality=kind,
        Manufacturer="Phantom",
        SeriesDescription=f"{job.modality} {job.plane}",
        PatientID=f"PHANTOM-{job.seed}-{job.patient:05d}",
        PatientAge=f"{rng.integers(25, 88):03d}Y",
        PatientSex=str(rng.choice(["F", "M"])),
        PatientPosition="HFS",
        StudyInstanceUID=make_uid(job.seed, "study", job.number),
        SeriesInstanceUID=job.uid,
        FrameOfReferenceUID=make_uid(job.seed, "frame of reference", job.number),
        SeriesNumber=job.number + 1,
    )
    # type 2 of the patient, study and image modules: present, may be empty (PS3.3 A.3.3, A.4.3)
    d.PatientName = d.PatientBirthDate = d.StudyDate = d.StudyTime = d.StudyID = d.AccessionNumber = ""
    pixel_mm = np.round(spacing_mm[1:], 6).tolist()
    pixels = {"PixelSpacing": pixel_mm, "SliceThickness": round(scan.thickness_mm, 4)}
    if is_ct:
        d.KVP = 100
    else:
        pixels["SpacingBetweenSlices"] = round(spacing_mm[0], 4)
        d.ScanningSequence, d.SequenceVariant, d.ScanOptions = "GR", "NONE", ""
        d.MRAcquisitionType, d.EchoTime, d.RepetitionTime, d.EchoTrainLength = "3D", 4, 25, 1
    orientation = {"ImageOrientationPatient": [round(v, 8) for v in (*along[:, 2], *along[:, 1])]}
    if not is_enhanced:
        d.update(pixels | orientation | rescale)
        return d
    shared = make_dataset(PixelMeasuresSequence=[make_dataset(**pixels)])
    shared.PlaneOrientationSequence = [make_dataset(**orientation)]
    if rescale:
        shared.PixelValueTransformationSequence = [make_dataset(**rescale)]
    d.SharedFunctionalGroupsSequence = [shared]
    return d


def to_stored(values: np.ndarray, job: Job) -> tuple[np.ndarray, dict]:
    """Stored integers (z, y, x) of grey values, in one of four ways, and the tags that undo it."""
    way = generator(job.seed, job.number, "storage").choice(["shifted", "as is", "signed", "scaled"])
    if job.form == "monochrome1":
        way = "shifted"
    is_ct, slope, intercept, rescale = job.modality == "CTA", 1, 0, {}
    if way != "as is":
        slope, intercept = (1, -1024) if is_ct else (0.43 if way == "scaled" else 1, 0)
        rescale = dict(RescaleIntercept=intercept, RescaleSlope=slope, RescaleType="HU" if is_ct else "US")
    stored = np.rint((values - intercept) / slope)
    if way in ("as is", "signed"):
        return np.clip(stored, -32768, 32767).astype(np.int16), rescale
    stored = np.clip(stored, 0, 4095).astype(np.uint16)
    return 4095 - stored if job.form == "monochrome1" else stored, rescale


def save(d: Dataset, stored: np.ndarray, form: str, path: Path) -> None:
    """Write one file: `stored` is (rows, cols), or (frames, rows, cols) for a multi-frame one."""
    syntax, bits = FORMS[form][0], 12 if stored.dtype == np.uint16 else 16
    photometric = "MONOCHROME1" if form == "monochrome1" else "MONOCHROME2"
    d.file_meta = FileMetaDataset()
    set_pixel_data(d, stored, photometric, bits, generate_instance_uid=False)
    if syntax.is_compressed:
        d.compress(syntax, generate_instance_uid=False)
    d.file_meta.TransferSyntaxUID = syntax
    if not syntax.is_little_endian:
        d.PixelData = stored.byteswap().tobytes()
    d.save_as(path, enforce_file_format=True)


def write_frames(d: Dataset, stored: np.ndarray, scan: Scan, job: Job, folder: Path) -> list[tuple[str, int]]:
    """Write the files of a series. Returns SOPInstanceUID and frame of each slice."""
    is_reversed = generator(job.seed, job.number, "order").random() < 0.5
    order = list(range(len(stored)))[:: -1 if is_reversed else 1]  # the slice of each instance or frame
    positions = [[round(v, 6) for v in (scan.affine @ [k, 0, 0, 1])[:3]] for k in range(len(stored))]
    if job.form.startswith("enhanced"):
        d.SOPInstanceUID, d.InstanceNumber = make_uid(job.seed, "instance", job.number), 1
        groups = []
        for number, k in enumerate(order, start=1):
            place = make_dataset(ImagePositionPatient=positions[k])
            content = make_dataset(StackID="1", InStackPositionNumber=number)
            groups.append(make_dataset(PlanePositionSequence=[place], FrameContentSequence=[content]))
        d.PerFrameFunctionalGroupsSequence = groups
        save(d, stored[order], job.form, folder / f"{d.SOPInstanceUID}.dcm")
        return [(d.SOPInstanceUID, frame) for frame in order]  # a reversal is its own inverse
    # sorting the names does not sort the slices
    names = [make_uid(job.seed, "instance", job.number, k) for k in range(len(stored))]
    for number, k in enumerate(order, start=1):
        d.SOPInstanceUID, d.InstanceNumber, d.ImagePositionPatient = names[k], number, positions[k]
        save(d, stored[k], job.form, folder / f"{names[k]}.dcm")
    return [(name, 0) for name in names]


def list_truth(job: Job) -> list[tuple[str, np.ndarray, float]]:
    """(location, centre in LPS mm (3,), half of the width in mm) of every aneurysm of a series."""
    pose, (*_, domes) = make_scan(job).pose, make_head(job)
    places = zip(job.locations, domes, strict=True)
    return [(name, (pose @ [*centre, 1])[:3], axes[1]) for name, (centre, _, axes) in places]


def write_series(job: Job, root: Path) -> tuple[list, list[list]]:
    """Draw and write one series below `root`; returns its rows of train.csv and train_localizers.csv."""
    scan = make_scan(job)
    stored, rescale = to_stored(render(job), job)
    d = make_header(job, scan, rescale)
    folder = root / "series" / job.uid
    shutil.rmtree(folder, ignore_errors=True)  # the same series, drawn before with other options
    folder.mkdir(parents=True)
    names = write_frames(d, stored, scan, job, folder)
    labels = [int(name in job.locations) for name in LOCATIONS]
    points = []
    for location, centre, _ in list_truth(job):
        z, y, x = (np.linalg.inv(scan.affine) @ [*centre, 1])[:3].tolist()
        name, frame = names[min(max(round(z), 0), len(names) - 1)]
        point = {"x": round(x, 3), "y": round(y, 3)} | ({"f": frame} if "NumberOfFrames" in d else {})
        points.append([job.uid, name, str(point), location])
    person = (int(d.PatientAge[:3]), "Female" if d.PatientSex == "F" else "Male")
    return [job.uid, *person, job.modality, *labels, max(labels)], points


def make_set(dst: Path, series: int, seed: int, workers: int = 1, backgrounds=None, **options) -> None:
    """Write the set that is planned with these options; the bytes do not depend on `workers`."""
    jobs = plan(series, seed, **options)
    if backgrounds:
        jobs = list(map(draw_into, jobs, repeat(find_backgrounds(backgrounds))))
    if {path.name for path in (dst / "series").glob("*")} - {job.uid for job in jobs}:
        sys.exit(f"phantom.py: {dst}: holds series of another set; expected none. Remove it first.")
    with ProcessPoolExecutor(workers) as pool:
        written = (pool.map if workers > 1 else map)(write_series, jobs, repeat(dst))
        rows, points = zip(*tqdm(written, "phantoms", len(jobs), mininterval=10), strict=True)
    pd.DataFrame(rows, columns=TABLE).to_csv(dst / "train.csv", index=False)
    pd.DataFrame(chain(*points), columns=POINTS).to_csv(dst / "train_localizers.csv", index=False)


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--dst", type=Path, required=True, help="folder to write; made if need be")
    add("--series", type=int, default=160, help="number of series (160)")
    add("--seed", type=int, default=0, help="of everything (0)")
    add("--matrix", type=int, default=256, help="pixels across an image (256)")
    add("--modality", choices=MODALITIES, help="this one only (all of them)")
    add("--plane", choices=["axial", "coronal", "sagittal"], help="this one only (all of them)")
    add("--backgrounds", type=Path, metavar="DIR", help="real CT and MR heads to draw the arteries into")
    add("--plain", action="store_true", help="single-frame, uncompressed little endian only")
    add("--no-aneurysms-drawn", action="store_false", dest="draw_aneurysms", help="same labels, no aneurysm")
    make_set(workers=usable_cores(), **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
