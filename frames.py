"""DICOM files -> their images, `Frame`s: header, place, stored pixels, and what their values mean.

`dicom.py` makes series of them. Space is LPS millimetres (x to the left, y to the back, z to the head).
"""

import errno
import io
import itertools
import math
import os
import re
import stat
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import pydicom
from numpy import ndarray
from numpy.linalg import norm
from pydicom import datadict
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"  # transfer syntaxes, PS3.5 A
BIG_ENDIAN, DEFLATED, RLE = "1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
INFLATED = DEFLATED[:-1] + b"7"  # what an unpacked dataset says: pydicom would inflate it again
DECODERS = {  # compressed transfer syntax -> packages that decode it
    RLE: "pylibjpeg pylibjpeg-rle",
    **{f"1.2.840.10008.1.2.4.{n}": "pylibjpeg pylibjpeg-libjpeg" for n in (50, 51, 57, 70)},  # JPEG
    **{f"1.2.840.10008.1.2.4.{n}": "pyjpegls" for n in (80, 81)},  # JPEG-LS
    **{f"1.2.840.10008.1.2.4.{n}": "pylibjpeg pylibjpeg-openjpeg" for n in (90, 91)},  # JPEG 2000
}
MAX_PIXEL_BYTES = 2**31  # of one file, decoded
MAX_FRAME_PIXELS = 2**26  # 8192 x 8192
MAX_UNPACKED_BYTES = 2**29  # of one deflated or gzipped file
MAX_FRAMES = 2**15  # of one file, and fragments of a frame
MAX_HEADER_READS = 2**20  # about 5 s in pydicom; and items of functional groups
GZIP = b"\x1f\x8b"
DATASET_STARTS = (b"\x02\0", b"\x08\0", b"\0\x08")  # of a file without preamble
HEAD_BYTES = 2**20  # find_series reads at most so much of a file, and unpacks at most so much
PIXEL_DATA = 0x7FE00010
UNDEFINED = 0xFFFFFFFF  # length of an element that ends with a delimiter


def tag_table(names: str) -> dict:
    """tag -> (name, VR, whether it has one value) of attributes named as in PS3.6, `A=B` if A counts as B."""
    pairs = [name.split("=") for name in names.split()]
    tags = {datadict.tag_for_keyword(pair[0]): pair[-1] for pair in pairs}
    entries = datadict.DicomDictionary  # tag -> (VR, number of values, ...)
    return {tag: (name, entries[tag][0][:2], entries[tag][1] == "1") for tag, name in tags.items()}


ATTRIBUTES = tag_table(  # what reading uses
    "TransferSyntaxUID ImageType SOPClassUID SOPInstanceUID Modality ComplexImageComponent PatientID "
    "PatientSex PatientAge SliceThickness EchoTime EchoNumbers SpacingBetweenSlices TriggerTime "
    "DiffusionBValue SeriesInstanceUID AcquisitionNumber InstanceNumber AcquisitionTime SliceLocation "
    "ImagePositionPatient ImageOrientationPatient TemporalPositionIdentifier StackID "
    "SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns PixelSpacing "
    "BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit "
    "RescaleIntercept RescaleSlope "
    # in a functional group (PS3.3 C.7.6.16.2) some have another tag
    "FrameType=ImageType EffectiveEchoTime=EchoTime FrameAcquisitionNumber=AcquisitionNumber "
    "TemporalPositionIndex=TemporalPositionIdentifier NominalCardiacTriggerDelayTime=TriggerTime"
)
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230  # sequences of functional groups
FUNCTIONAL_GROUPS = tag_table(
    "MREchoSequence MRDiffusionSequence CardiacSynchronizationSequence MRImageFrameTypeSequence "
    "CTImageFrameTypeSequence FrameContentSequence PlanePositionSequence PlaneOrientationSequence "
    "PixelMeasuresSequence PixelValueTransformationSequence"
)
SEQUENCES = {tag for tag, entry in datadict.DicomDictionary.items() if entry[0] == "SQ"}
BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8"}  # numpy's names
NUMERIC = {*BINARY, "DS", "IS"}
NUMBER = rb" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)? *"
NUMBERS = re.compile(NUMBER + rb"(\\" + NUMBER + rb")*")
SHORT_VRS = set(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS = set(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # two reserved bytes, then a 4-byte length
DELIMITER_GROUP, ITEM, ITEM_END, SEQUENCE_END = 0xFFFE, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# What a code stream begins with: JPEG, JPEG 2000, JP2, RLE (number of segments, first offset).
STREAM_START = re.compile(rb"\xff\xd8\xff|\xff\x4f\xff\x51|\0\0\0\x0cjP|[\1-\x0f]\0\0\0\x40\0\0\0")
# Rows, columns and samples in the frame header of JPEG and JPEG-LS (SOFn), and in SIZ of JPEG 2000.
JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]\0[\x0b\x11].(.{5})", re.DOTALL)
JPEG_2000_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{34})", re.DOTALL)
MODALITIES = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.4": "MR"}  # by SOP class
PROJECTION = re.compile(r"\b(MIP|MINIP|MAXIP|MIN IP|MAX IP|PROJECTION|VOLUME RENDERED|VRT)\b")
SCOUT = re.compile(r"\b(LOCALIZER|SCOUT|TOPOGRAM|SURVIEW)\b")
PHASE_TYPES = {"P", "PHASE", "R", "REAL", "I", "IMAGINARY", "PHASE MAP", "B0", "B0 MAP"}
AIR_HU = (-1100, -900)
TISSUE_HU = (-20, 120)
BONE_HU, HIGHEST_HU = 300, 3200  # but for metal
MOST_FILL = 0.4  # share of an image; a round field of view leaves 0.21 over


def one_line_errors(function: Callable) -> Callable:
    """Makes any failure inside, even a decoder's BaseException, a ValueError of one line; interrupts pass."""

    @wraps(function)
    def wrapped(*args: object) -> object:
        try:
            return function(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(kind + " ".join(str(error).split())[:300]) from error

    return wrapped


# --- the header ---------------------------------------------------------------------------------------------
@one_line_errors
def read_header(path: Path) -> dict:
    """What one file says of its images. ValueError with the reason if it is not a DICOM image, or is damaged.
    The values of ATTRIBUTES by name (absent where missing, empty or unreadable), and
      spans        for each frame the (offset, length) pieces of its pixel data
      pixel_data   (VR, offset, length) of the element; length UNDEFINED if it is encapsulated
      order        of bytes: < little, > big endian
      packed       offsets count in the unpacked file (`open_unpacked`)
      groups       for each frame the attributes and remarks of its functional groups; empty without any
      remarks      what did not parse or was assumed"""
    check_is_regular(path)
    return fast_header(path) or slow_header(path)


def check_is_regular(path: Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")


def fast_header(path: Path) -> dict | None:
    """`read_header` in 0.1 ms for plain little-endian files; None at the slightest doubt, for pydicom."""
    with open(path, "rb", buffering=0) as file:
        for limit in (2**14, 2**18, 2**22):
            file.seek(0)
            try:
                header = parse_header(file.read(limit))
            except ValueError:
                return None
            except struct.error:  # the header is longer
                continue
            header["spans"] = locate_frames(header, file)
            return header
    return None


def parse_header(head: bytes) -> dict:
    """The ATTRIBUTES before the pixel data. ValueError on doubt, struct.error where `head` ends too early."""
    if head[128:140] != b"DICM\x02\0\0\0UL\x04\0":
        raise ValueError("no file meta group length")
    position, last_tag, explicit = 144, 0x00020000, True
    meta_end = 144 + int.from_bytes(head[140:144], "little")
    header = {"order": "<", "packed": False, "groups": [], "remarks": []}
    while True:
        if position == meta_end:
            syntax = header.get("TransferSyntaxUID")
            explicit = syntax != IMPLICIT
            vr = head[position + 4 : position + 6]
            if syntax not in (IMPLICIT, EXPLICIT, *DECODERS) or explicit != (vr.isalpha() and vr.isupper()):
                raise ValueError("another transfer syntax, or VRs that do not fit it")
        tag, vr, length, start = parse_element(head, position, explicit)
        group = tag >> 16
        if tag <= last_tag or group == SHARED_GROUPS >> 16 or (group == 2) != (position < meta_end):
            raise ValueError("tags out of order, or functional groups")
        last_tag = tag
        if tag >= PIXEL_DATA - 2:
            if tag != PIXEL_DATA or vr not in (b"OB", b"OW", b""):
                raise ValueError("odd pixel data")
            header["pixel_data"] = (vr.decode() or "OW", start, length)
            return header
        if length == UNDEFINED:
            if vr != b"SQ" and (explicit or tag not in SEQUENCES):
                raise ValueError("undefined length outside of a sequence")
            position = skip_sequence(head, start, explicit)
            continue
        position = start + length
        if group == 2 and position > meta_end:
            raise ValueError("the file meta group is longer than it says")
        if position > len(head):
            raise struct.error("the head ends inside of a value")
        if tag in ATTRIBUTES:
            value = parse_value(tag, vr.decode(), head[start:position], "<")
            if value is not None:
                header[ATTRIBUTES[tag][0]] = value


def parse_element(head: bytes, position: int, explicit: bool) -> tuple:
    """(tag, VR, length, start of the value) of the little-endian element at `position`."""
    if explicit:
        group, element, vr, length = struct.unpack_from("<HH2sH", head, position)
        if vr in SHORT_VRS:
            return group << 16 | element, vr, length, position + 8
        if vr in LONG_VRS and length == 0:
            (length,) = struct.unpack_from("<I", head, position + 8)
            return group << 16 | element, vr, length, position + 12
        if group != DELIMITER_GROUP:  # these have no VR
            raise ValueError("odd VR")
    group, element, length = struct.unpack_from("<HHI", head, position)
    return group << 16 | element, b"", length, position + 8


def skip_sequence(head: bytes, position: int, explicit: bool, depth: int = 0) -> int:
    """End of the undefined-length sequence whose first item starts at `position`."""
    while True:
        tag, _, length, position = parse_element(head, position, explicit=False)
        if tag == SEQUENCE_END and length == 0:
            return position
        if tag != ITEM or depth > 8:
            raise ValueError("odd sequence")
        end = position + length  # of the item; far away where the length is undefined
        while position != end:
            tag, vr, inner, position = parse_element(head, position, explicit)
            if tag == ITEM_END and inner == 0 and length == UNDEFINED:
                break
            if tag >> 16 == DELIMITER_GROUP or position > end or (inner == UNDEFINED and vr != b"SQ"):
                raise ValueError("odd item")
            if inner == UNDEFINED:
                position = skip_sequence(head, position, explicit, depth + 1)
            else:
                position += inner


@lru_cache(maxsize=64)  # most values are those of the slice before
def parse_value(tag: int, vr: str | None, raw: bytes, order: str) -> object:
    """Text unpadded; numbers as a tuple, or single; None if empty. `vr` is what the file says, if any."""
    _, expected, is_single = ATTRIBUTES[tag]
    if expected not in NUMERIC:
        return raw.decode("latin-1").strip(" \0") or None
    if vr in (None, "", "UN"):
        vr = expected
    if vr in BINARY:
        values = np.frombuffer(raw, order + BINARY[vr]).tolist()
    else:
        text = raw.strip(b" \0")
        if text and not NUMBERS.fullmatch(text):
            raise ValueError(f"{text[:40]!r} is not a number")
        values = [float(number) for number in text.split(b"\\") if text]
    if not sum(map(abs, values)) < 1e12:  # NaN too
        raise ValueError(f"{values[:6]} is out of range")
    values = tuple(values if expected in ("DS", "FD") else map(int, values))
    return values[0] if is_single and values else values or None


class BoundedFile:
    """A file that is read in a bounded number of pieces: tiny elements would keep pydicom busy for hours."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.num_reads = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.num_reads += 1
        if self.num_reads > MAX_HEADER_READS or size > MAX_UNPACKED_BYTES:
            raise ValueError(f"absurd header: more than {MAX_HEADER_READS} elements, or one of {size} bytes")
        return self.file.read(size)


def slow_header(path: Path) -> dict:
    """`read_header` of any file, through pydicom."""
    with open_unpacked(path) as file:
        start = file.read(132)
        if not start.strip(b"\0"):
            raise ValueError("damaged: empty, or zeros where a file starts")
        if start[128:] != b"DICM" and not start.startswith(DATASET_STARTS):
            raise ValueError("not DICOM: no DICM after 128 bytes, and group 0002 or 0008 does not come first")
        file.seek(0)
        tags = [*ATTRIBUTES, SHARED_GROUPS, FRAME_GROUPS]
        dataset = pydicom.dcmread(BoundedFile(file), stop_before_pixels=True, force=True, specific_tags=tags)
        position = file.tell()
        implicit, little = dataset.original_encoding
        order = "<" if little else ">"
        implied = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
        header = parse_dataset(dataset, order, {})
        syntax = str(dataset.file_meta.get("TransferSyntaxUID") or implied)
        element = file.read(12).ljust(12, b"\0")
        explicit = not implicit and element[4:6] in LONG_VRS
        group, number, length = struct.unpack(order + ("HH4xI" if explicit else "HHI4x"), element)
        if group << 16 | number != PIXEL_DATA:
            sop_class = header.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", "")
            modality = header.get("Modality", "no (0008,0060) Modality")
            what = "truncated" if modality == modality_of({"SOPClassUID": sop_class}) else "not an image"
            raise ValueError(f"{what} ({modality}): no (7FE0,0010) PixelData")
        vr = element[4:6].decode() if explicit else "OW"
        header |= {
            "TransferSyntaxUID": syntax.replace(INFLATED.decode(), DEFLATED.decode()),
            "order": order,
            "packed": isinstance(file, io.BytesIO),
            "pixel_data": (vr, position + (12 if explicit else 8), length),
            "groups": parse_groups(dataset, order),
        }
        header["spans"] = locate_frames(header, file)
        return header


def parse_dataset(dataset: pydicom.Dataset, order: str, given: dict) -> dict:
    """`given` overlaid with the attributes and remarks of a dataset, or of an item of functional groups."""
    header = given | {"remarks": [*given.get("remarks", [])]}
    for tag, element in dataset.items():
        if tag in FUNCTIONAL_GROUPS and dataset[tag].value:
            header = parse_dataset(dataset[tag].value[0], order, header)
        if tag not in ATTRIBUTES:
            continue
        name, kind, _ = ATTRIBUTES[tag]
        raw = element.value or b""
        if kind == "DS" and b"," in raw:
            header["remarks"].append(f"{name}: decimal commas read as points")
            raw = raw.replace(b",", b".")
        try:
            value = parse_value(tag, element.VR, raw, order)
        except (ValueError, TypeError, AttributeError):
            header["remarks"].append(f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {name} does not parse")
            continue
        if value is not None:
            header[name] = value
    return header


def parse_groups(dataset: pydicom.Dataset, order: str) -> list:
    """For each frame of an enhanced file what its and the shared functional groups say (or one item)."""
    groups = []
    for tag in (SHARED_GROUPS, FRAME_GROUPS):
        if tag in dataset:
            raw = dataset.get_item(tag).value
            if isinstance(raw, bytes) and raw.count(b"\xfe\xff\x00\xe0") > MAX_HEADER_READS:
                raise ValueError(f"absurd header: more than {MAX_HEADER_READS} items in functional groups")
            shared = groups[0] if groups else {}
            groups = [parse_dataset(item, order, shared) for item in dataset[tag].value] or groups
    return groups


@contextmanager
def open_unpacked(path: Path) -> Iterator:
    """`path` open for reading; a gzipped or deflated file is unpacked in memory."""
    with open(path, "rb") as file:
        head = file.read(2**16)
        file.seek(0)
        if head[:2] == GZIP or DEFLATED in head:
            unpacked = unpack(file.read(MAX_UNPACKED_BYTES), MAX_UNPACKED_BYTES + 1)
            if len(unpacked) > MAX_UNPACKED_BYTES:
                raise ValueError(f"a bomb? unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
            file = io.BytesIO(unpacked)
        yield file


def unpack(data: bytes, limit: int) -> bytes:
    """What a gzipped or deflated file holds, at most `limit` bytes of it; `data` may end early."""

    def inflate(packed: bytes, window_bits: int) -> bytes:
        try:
            return zlib.decompressobj(window_bits).decompress(packed, limit)
        except zlib.error as error:
            raise ValueError(f"damaged: {error}") from error

    if data[:2] == GZIP:
        data = inflate(data, 31)
    if data[128:132] == b"DICM" and DEFLATED in data[: 2**16]:
        end = 144 + int.from_bytes(data[140:144], "little")  # of the file meta group, PS3.10 7.1
        data = data[:end].replace(DEFLATED, INFLATED) + inflate(data[end:], -15)
    return data


# --- which series -------------------------------------------------------------------------------------------
@one_line_errors
def read_identity(path: Path) -> tuple | None:
    """((0020,000E) SeriesInstanceUID, (0010,0020) PatientID) of an image, "" where absent; None if it is too
    damaged to tell, empty or blank. ValueError if it is not an image. At most HEAD_BYTES are unpacked."""
    try:
        check_is_regular(path)
        with open(path, "rb", buffering=0) as file:
            for limit in (2**14, HEAD_BYTES):
                file.seek(0)
                head = file.read(limit)
                with suppress(ValueError):
                    head = unpack(head, HEAD_BYTES)
                if not head.strip(b"\0"):
                    return None
                is_dicom = head[128:132] == b"DICM"
                if not is_dicom and not head.startswith(DATASET_STARTS):
                    raise ValueError("not DICOM")
                header = parse_head(head)
                if "Rows" in header:
                    break
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise ValueError("a link to nothing") from error
        return None
    kind = header.get("SOPClassUID", "")
    name = pydicom.uid.UID_dictionary.get(kind, ("",))[0]
    if name and "Image Storage" not in name:
        raise ValueError(f"not an image: {name}")
    if "Rows" in header:
        return header.get("SeriesInstanceUID", ""), header.get("PatientID", "")
    if name or (is_dicom and not kind):
        return None
    raise ValueError(f"not an image: no (0028,0010) Rows, (0008,0016) SOPClassUID {kind or 'missing'}")


def parse_head(head: bytes) -> dict:
    """What `read_identity` asks for, as far as the first bytes of a file tell."""
    with suppress(ValueError, struct.error):  # unusual, longer, or cut short
        return parse_header(head)
    tags = list(tag_table("SOPClassUID SeriesInstanceUID PatientID Rows"))
    try:
        dataset = pydicom.filereader.read_partial(
            io.BytesIO(head), lambda tag, vr, length: tag > tags[-1], force=True, specific_tags=tags
        )
    except Exception:  # pydicom raises many kinds on damaged bytes
        return {}
    sop_class = dataset.file_meta.get("MediaStorageSOPClassUID", "")
    return parse_dataset(dataset, "<", {"SOPClassUID": sop_class})


def modality_of(header: dict) -> str:
    """(0008,0060) Modality, else CT or MR where (0008,0016) SOPClassUID is one of their images, else ""."""
    stem = ".".join(header.get("SOPClassUID", "").split(".")[:10])
    return header.get("Modality") or MODALITIES.get(stem, "")


# --- frames -------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Frame:
    """One image: where it lies (LPS mm), what its stored values mean, and where its pixels are."""

    path: Path
    index: int  # in the file, from 0
    header: dict  # of the file (`read_header`), overlaid with the frame's own attributes
    sop_uid: str
    position: ndarray  # (3,) centre of the pixel in row 0, column 0; NaN where unknown
    row_dir: ndarray  # (3,) direction of a growing column index; NaN before `orient_frames`
    col_dir: ndarray  # (3,) direction of a growing row index
    spacing_mm: tuple  # between rows, between columns
    rows: int
    cols: int
    slope: float  # value = slope * stored + intercept
    intercept: float
    padding: tuple | None  # first and last of the stored values that are not tissue
    remarks: list  # what was assumed for it

    @cached_property
    def stored(self) -> ndarray:
        """(rows, cols) stored values, kept once decoded."""
        return decode(self)

    @property
    def is_ct(self) -> bool:
        return modality_of(self.header) == "CT"

    @property
    def normal(self) -> ndarray:
        """(3,) unit direction across the slice"""
        normal = np.cross(self.row_dir, self.col_dir)
        return normal / norm(normal)


Frames = list  # of Frame


def image_types(header: dict) -> list:
    return [value.strip() for value in header.get("ImageType", "").upper().split("\\")]


def image_kind(header: dict) -> str:
    """slice, scout or projection, by the words of (0008,0008) ImageType."""
    words = re.sub("[^A-Z0-9]+", " ", header.get("ImageType", "").upper())
    return "projection" if PROJECTION.search(words) else "scout" if SCOUT.search(words) else "slice"


def image_number(frame: Frame) -> int:
    return frame.header.get("InstanceNumber", 0) + frame.index


def key_value(frame: Frame, name: str) -> tuple:
    """An attribute's value for sorting: absent first; of ImageType magnitude first, phase last."""
    if name != "ImageType":
        return name in frame.header, frame.header.get(name, "")
    types = [*image_types(frame.header), frame.header.get("ComplexImageComponent", "").upper()]
    is_magnitude = any(word in ("M", "MAGNITUDE") or word.startswith("M_") for word in types)
    is_phase = not PHASE_TYPES.isdisjoint(types)
    return not is_magnitude, not is_magnitude and is_phase, "DERIVED" in types, tuple(types)


def check_is_slice(header: dict) -> None:
    """ValueError with the reason if a file's images are not slices of a CT or MR scan."""
    types, modality = image_types(header), modality_of(header)
    if modality not in ("CT", "MR"):
        raise ValueError(f"(0008,0060) Modality {modality or 'missing'}: not CT or MR")
    if "MOSAIC" in types or ("VFRAME" in types and "ImagePositionPatient" not in header):
        raise ValueError(f"a volume tiled in one image: (0008,0008) ImageType {header['ImageType']}")
    photometric = header.get("PhotometricInterpretation", "RGB")
    is_placed = header["groups"] or "ImagePositionPatient" in header
    if photometric == "PALETTE COLOR" or (header.get("SamplesPerPixel", 1) == 3 and not is_placed):
        raise ValueError(f"(0028,0004) PhotometricInterpretation {photometric}: a report or screenshot")


def make_frames(path: Path, header: dict) -> Frames:
    """The images of a file, if they are CT or MR slices; without positions by `slice_step` along +normal."""
    check_is_slice(header)
    frames, count = [], len(header["spans"])
    groups = header["groups"]
    if len(groups) == 1:
        groups = groups * count
    has_positions = any("ImagePositionPatient" in group for group in groups)
    for index in range(count):
        group = groups[index] if index < len(groups) else {}
        tags, remarks = header | group, header["remarks"] + group.get("remarks", [])
        directions = unit_directions(tags.get("ImageOrientationPatient", ()))
        spacing = pixel_spacing(tags, remarks)
        position = image_position(tags, remarks)
        if count > 1 and not has_positions:
            step, source = slice_step(tags, spacing[0])
            remarks.append(f"frames without position placed {step:.4g} mm apart along +normal ({source})")
            position = np.nan_to_num(position) + index * step * np.cross(*directions)
        uid, rows, cols = header.get("SOPInstanceUID", ""), tags["Rows"], tags["Columns"]
        meaning = *rescale_of(tags, remarks), padding_range(tags), remarks
        frames.append(Frame(path, index, tags, uid, position, *directions, spacing, rows, cols, *meaning))
    return frames


@lru_cache(maxsize=256)
def unit_directions(orientation: tuple) -> ndarray:
    """(2, 3) unit row and column directions; NaN if they are missing, zero or not orthogonal."""
    if len(orientation) == 6:
        directions = np.array(orientation).reshape(2, 3)
        lengths = norm(directions, axis=1, keepdims=True)
        if lengths.min() > 1e-3 and abs(directions[0] @ directions[1]) < 0.02 * lengths.prod():
            return directions / lengths
    return np.full((2, 3), np.nan)


def image_position(tags: dict, remarks: list) -> ndarray:
    """(3,) mm of the first pixel's centre; NaN where it is missing."""
    position = np.array(tags.get("ImagePositionPatient", ()))
    if position.shape == (3,) and np.abs(position).max() < 1e5:
        return position
    remarks.append("no valid (0020,0032) ImagePositionPatient")
    return np.full(3, np.nan)


def pixel_spacing(tags: dict, remarks: list) -> tuple:
    """(between rows, between columns) mm; 1 mm where it is missing."""
    spacing = tags.get("PixelSpacing", ())
    if len(spacing) == 2 and all(1e-3 < value < 1e3 for value in spacing):
        return spacing
    remarks.append("no valid (0028,0030) PixelSpacing: 1 mm assumed")
    return 1.0, 1.0


def rescale_of(tags: dict, remarks: list) -> tuple:
    """(slope, intercept). Unsigned CT values without an intercept start at -1024 HU."""
    slope = tags.get("RescaleSlope", 1.0)
    if slope == 0:
        remarks.append("(0028,1053) RescaleSlope is 0: 1 assumed")
        slope = 1.0
    if "RescaleIntercept" in tags or modality_of(tags) != "CT" or is_signed(tags):
        return slope, tags.get("RescaleIntercept", 0.0)
    remarks.append("no (0028,1052) RescaleIntercept: -1024 assumed")
    return slope, -1024.0


def slice_step(tags: dict, row_mm: float) -> tuple:
    """(mm from slice to slice, the attribute that says so) where positions do not tell."""
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        step = abs(tags.get(name, 0.0))
        if 1e-3 < step < 1e3:
            return step, name
    return row_mm, "the row spacing"


def is_signed(header: dict) -> bool:
    return header.get("PixelRepresentation") == 1


def padding_range(tags: dict) -> tuple | None:
    """(0028,0120) PixelPaddingValue to (0028,0121) PixelPaddingRangeLimit, in the sign of stored values."""
    if "PixelPaddingValue" not in tags:
        return None
    first, bits = tags["PixelPaddingValue"], tags["BitsAllocated"]
    ends = [first, tags.get("PixelPaddingRangeLimit", first)]
    if is_signed(tags):
        ends = [end - 2**bits if end >= 2 ** (bits - 1) else end for end in ends]
    return min(ends), max(ends)


# --- pixels -------------------------------------------------------------------------------------------------
def locate_frames(header: dict, file: BinaryIO) -> list:
    """The `spans` of `read_header`. ValueError if that is absurd or the file too short. Without
    (0028,0008) NumberOfFrames the pixel data's length, or code streams, tell."""
    rows, cols, bits = (header.get(name, 0) for name in ("Rows", "Columns", "BitsAllocated"))
    samples, stated = header.get("SamplesPerPixel", 1), header.get("NumberOfFrames", 0)
    _, offset, length = header["pixel_data"]
    size = file.seek(0, os.SEEK_END)
    image = f"{max(stated, 1)} frames of {rows} x {cols} pixels of {samples} x {bits} bits"
    if rows < 1 or cols < 1 or samples not in (1, 3) or bits not in (8, 16, 32) or stated < 0:
        raise ValueError(f"unreadable image: {image}; expected 1 or 3 samples of 8, 16 or 32 bits")
    frame_bytes = rows * cols * samples * bits // 8
    if length == UNDEFINED:
        if header["TransferSyntaxUID"] not in DECODERS:
            raise ValueError(f"compressed, but TransferSyntaxUID is {header['TransferSyntaxUID']}")
        frames = group_fragments(stated, offset, size, file)
        count = len(frames)
    else:
        has_full_frames = length % frame_bytes <= 1  # the pixel data may end with a padding byte
        count = stated or max(1, has_full_frames * (length // frame_bytes))
    if rows * cols > MAX_FRAME_PIXELS or count > MAX_FRAMES or frame_bytes * count > MAX_PIXEL_BYTES:
        raise ValueError(f"absurd size: {image}; limits: {MAX_FRAMES} frames, {MAX_PIXEL_BYTES >> 20} MiB")
    if length == UNDEFINED:
        return frames
    available = max(0, min(length, size - offset))
    if available < count * frame_bytes:
        raise ValueError(f"truncated: {available} of {count * frame_bytes} bytes of pixel data ({image})")
    if length > count * frame_bytes + 1:
        header["remarks"].append(f"(7FE0,0010) PixelData of {length} bytes is longer than {image}")
    return [[(offset + i * frame_bytes, frame_bytes)] for i in range(count)]


def group_fragments(stated: int, offset: int, size: int, file: BinaryIO) -> list:
    """Fragments of encapsulated pixel data by frame, which starts where a code stream does (PS3.5 A.4)."""
    frames = []
    num_fragments = 0
    while offset + 8 <= size and num_fragments <= 2 * MAX_FRAMES:
        file.seek(offset)
        item = file.read(16)
        tag, _, length, start = parse_element(item, 0, explicit=False)
        start += offset
        if tag == SEQUENCE_END:
            break
        if tag != ITEM:
            raise ValueError("damaged: no item where the next fragment of compressed pixel data should be")
        offset = start + length
        if offset > size:
            raise ValueError(f"truncated: {size - start} bytes left for a fragment of {length}")
        if num_fragments > 0:  # the first is the offset table
            if STREAM_START.match(item, 8) or not frames:
                frames.append([])
            frames[-1].append((start, length))
        num_fragments += 1
    if not frames or stated not in (0, len(frames)):
        raise ValueError(f"damaged: {len(frames)} code streams of {stated or 'some'} frames")
    return frames


@one_line_errors
def decode(frame: Frame) -> ndarray:
    """(rows, cols) stored values of a frame: decompressed, colour as luminance, masked to BitsStored."""
    header, pieces = frame.header, frame.header["spans"][frame.index]
    vr, _, element_length = header["pixel_data"]
    if header["packed"]:
        unpacked = read_unpacked(frame.path, os.stat(frame.path).st_mtime_ns)
        parts = [unpacked[offset : offset + length] for offset, length in pieces]
    else:
        with open(frame.path, "rb", buffering=0) as file:
            parts = [os.pread(file.fileno(), length, offset) for offset, length in pieces]
    data = b"".join(parts)
    if len(data) != sum(length for _, length in pieces):
        raise ValueError("the file became shorter while it was read")
    if vr == "OW" and header["order"] == ">" and header["BitsAllocated"] == 8:
        data = np.frombuffer(data, "u2").byteswap().tobytes()  # big-endian words of two 8-bit pixels
    if element_length == UNDEFINED or header.get("SamplesPerPixel", 1) == 3:
        return mask_stored(decode_with_pydicom(frame, data), header)
    dtype = np.dtype(f"{header['order']}u{header['BitsAllocated'] // 8}")
    stored = np.frombuffer(data, dtype).reshape(frame.rows, frame.cols)
    return mask_stored(stored.astype(dtype.newbyteorder("="), copy=False), header, header.get("HighBit", -1))


@lru_cache(maxsize=1)
def read_unpacked(path: Path, _changed: int) -> memoryview:
    """A packed file's unpacked bytes, remembered for its other frames."""
    with open_unpacked(path) as file:
        return file.getbuffer()


def mask_stored(array: ndarray, header: dict, high_bit: int = -1) -> ndarray:
    """BitsStored bits up to `high_bit` (or the lowest, if that makes no sense), sign-extended if signed."""
    size = array.dtype.itemsize * 8
    array = array.view(f"{'i' if is_signed(header) else 'u'}{size // 8}")
    bits = header.get("BitsStored", size)
    if not 0 < bits < size:
        return array
    high_bit = high_bit if bits - 1 <= high_bit < size else bits - 1
    array = np.left_shift(array, size - 1 - high_bit)
    return np.right_shift(array, size - bits, out=array)


def decode_with_pydicom(frame: Frame, data: bytes) -> ndarray:
    """(rows, cols) of compressed or colour pixel data through pydicom and its plug-ins."""
    header, is_native = frame.header, frame.header["pixel_data"][2] != UNDEFINED
    uid = pydicom.uid.UID(EXPLICIT if is_native else header["TransferSyntaxUID"])
    samples = header.get("SamplesPerPixel", 1)
    decoder = get_decoder(uid)
    if not decoder.is_available:
        raise ValueError(f"transfer syntax {uid.name} ({uid}) needs a decoder: pip install {DECODERS[uid]}")
    if not is_native and uid != RLE:
        check_code_stream(data, (frame.rows, frame.cols, samples))
    bits = header["BitsAllocated"]
    array, _ = decoder.as_array(
        data if is_native else encapsulate([data]),
        pixel_keyword="PixelData",
        rows=frame.rows,
        columns=frame.cols,
        number_of_frames=1,
        samples_per_pixel=samples,
        bits_allocated=bits,
        bits_stored=header.get("BitsStored", bits),
        pixel_representation=header.get("PixelRepresentation", 0),
        photometric_interpretation=header.get("PhotometricInterpretation", "MONOCHROME2"),
        planar_configuration=header.get("PlanarConfiguration", 0),
    )
    if array.ndim == 3:
        array = (array @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(array.dtype)  # ITU-R BT.601
    if array.shape != (frame.rows, frame.cols):
        raise ValueError(f"decoded to {array.shape}, expected {(frame.rows, frame.cols)}")
    return array


def check_code_stream(data: bytes, expected: tuple) -> None:
    """Refuses a code stream of another size than stated: 600 bytes can ask a decoder for gigabytes."""
    size = None
    if match := JPEG_2000_SIZE.search(data, 0, 4096):
        width, height, left, top, samples = struct.unpack(">4I16xH", match[1])
        size = (height - top, width - left, samples)
    elif match := JPEG_SIZE.search(data, 0, 2**16):
        size = struct.unpack(">HHB", match[1])
    if size != expected:
        raise ValueError(f"the code stream holds {size} rows, columns, samples; the header says {expected}")


# --- what the values mean -----------------------------------------------------------------------------------
@dataclass
class Stack:
    """Images on their way to one volume, and what is to be said of them."""

    frames: Frames
    where: str  # for errors
    notes: list
    doubts: list

    def leave_out(self, is_out: list | ndarray, what: str) -> None:
        """Drop the frames marked, if any, with a note on what they are."""
        if any(is_out):
            self.notes.append(f"{sum(is_out)} {what}")
            self.frames = list(itertools.compress(self.frames, np.logical_not(is_out)))


def is_between(values: ndarray, limits: tuple | None) -> ndarray:
    low, high = limits or (1, 0)
    return (values >= low) & (values <= high)


def rescale_values(frame: Frame, stored: ndarray) -> ndarray:
    """float32 rescaled values of an image or a part of it, NaN where it is padding."""
    values = np.multiply(stored, frame.slope, dtype=np.float32)
    values += frame.intercept
    if frame.padding:
        values[is_between(stored, frame.padding)] = np.nan
    return values


@lru_cache(maxsize=64)
def thumbnail(frame: Frame) -> ndarray:
    """(32, 32) block means, in CT of 0..1500 HU; zeros if the frame does not decode."""
    try:
        values = decode(frame) * np.float32(frame.slope) + np.float32(frame.intercept)
    except ValueError:
        return np.zeros((32, 32), np.float32)
    image = cv2.resize(values, (32, 32), interpolation=cv2.INTER_AREA)
    return np.clip(image, 0, 1500) if frame.is_ct else image


def image_difference(a: Frame, b: Frame) -> float:
    return np.abs(thumbnail(a) - thumbnail(b)).sum()


class Samples(NamedTuple):
    """Some stored values of a few slices."""

    stored: ndarray  # (n,)
    slopes: ndarray  # (n,)
    corners: ndarray  # (m,) in the corners of the slices, where no head reaches


def repair_values(stack: Stack) -> None:
    """Put right values that the pixels contradict, in groups of the same sign, and in CT intercept."""
    groups = defaultdict(list)
    for frame in stack.frames:
        groups[is_signed(frame.header), frame.is_ct and frame.intercept].append(frame)
    largest = max(groups.values(), key=len)
    for frames in groups.values():
        doubts = stack.doubts if frames is largest else []  # a few slices may be air, or blank
        repair_group(Stack(frames, stack.where, stack.notes, doubts))


def repair_group(stack: Stack) -> None:
    """`repair_values` of a group, by the pixels of five of its frames."""
    first, probes = stack.frames[0], []
    for i in {len(stack.frames) * k // 6 for k in range(1, 6)}:
        frame = stack.frames[i]
        with suppress(ValueError):  # told when the slice is used
            frame.stored = decode(frame)
            probes.append(frame)
    if not probes:
        return
    samples = sample_pixels(probes)
    is_inverse = first.header.get("PhotometricInterpretation") == "MONOCHROME1"
    if is_inverse:
        invert_if_bright(stack, samples)
    if first.is_ct:
        choose_reading(stack, sample_pixels(probes))
    elif not is_inverse:
        choose_sign(stack, samples)
    for frame in probes:
        frame.stored = mask_stored(frame.stored, frame.header)  # in the bits and sign chosen
    samples = sample_pixels(probes)
    drop_padding(stack, samples)
    if not first.padding:
        pad_fill(stack, samples)


def sample_pixels(frames: Frames) -> Samples:
    stride = 1 + math.isqrt(frames[0].stored.size // 16_000)
    pixels = np.stack([frame.stored[::stride, ::stride] for frame in frames])
    slopes = np.repeat([frame.slope for frame in frames], pixels[0].size)
    corners = pixels[:, [0, -1]][..., [0, -1]]
    return Samples(pixels.ravel(), slopes, corners.ravel())


def invert_if_bright(stack: Stack, samples: Samples) -> None:
    """MONOCHROME1 images with a bright background are complemented within BitsStored."""
    if np.median(samples.corners) < np.percentile(samples.stored, (1, 99)).mean():
        return
    stack.notes.append("(0028,0004) MONOCHROME1 with a bright background: inverted")
    header = stack.frames[0].header
    ends = -1 if is_signed(header) else 2 ** header.get("BitsStored", 16) - 1  # lowest plus highest value
    for frame in stack.frames:
        frame.intercept += frame.slope * ends
        frame.slope = -frame.slope


def choose_reading(stack: Stack, samples: Samples) -> None:
    """CT frames read so that air and soft tissue lie where HU says. Files are known to need another sign than
    (0028,0103) PixelRepresentation says, 12 signed bits where 16 are stated, or an intercept that is missing,
    was applied already, or counts twice. The stated reading stands unless clearly worse than one with both
    air and soft tissue: a scan inside the head has no air."""
    first = stack.frames[0]
    signs = [{}, {"PixelRepresentation": 1 - is_signed(first.header)}]
    if not is_signed(first.header) and samples.stored.max() < 4096:
        signs.append({"PixelRepresentation": 1, "BitsStored": 12, "HighBit": 11})
    stated = first.header.get("RescaleIntercept", first.intercept)
    best = judge_reading(first, samples, {}, 0.0)
    intercepts = [stated] if best.is_clear else [stated, stated / 2, 0.0, -1024.0, -2048.0, 1024.0]
    for tags, intercept in itertools.product(signs, intercepts):
        if best.score > 0.097:
            break
        judged = judge_reading(first, samples, tags, intercept - stated)
        if judged.is_clear and judged.score > best.score + 0.003:
            best = judged
    if max(best.air, best.tissue) < 0.02:
        stack.doubts.append("CT values: neither air near -1000 HU nor soft tissue near 0 to 100 HU")
    stored = samples.stored
    is_cut = max((stored == stored.min()).mean(), (stored == stored.max()).mean()) > 0.01
    if is_cut and best.bone < 0.002:
        stack.doubts.append(f"CT values end below {BONE_HU} HU, as in an image made for a screen")
    if best.tags or best.shift:
        changes = [f"{name} {value}" for name, value in best.tags.items()]
        changes.append(f"RescaleIntercept {stated + best.shift:g}")
        stack.notes.append(
            f"stored values are HU only with {', '.join(changes)}: used, air and tissue say so"
        )
        change_tags(stack, best.tags, best.shift)


def change_tags(stack: Stack, tags: dict, shift: float = 0.0) -> None:
    for frame in stack.frames:
        frame.header = frame.header | tags
        frame.intercept += shift
        if tags:
            frame.padding = None


class Reading(NamedTuple):
    """How CT values could be meant, and the shares of the pixels then, padding aside."""

    tags: dict  # other than the header's
    shift: float  # of the intercept
    air: float
    tissue: float
    bone: float
    is_clear: bool  # shows both air and soft tissue
    score: float  # at most 0.1: a twentieth of air and of soft tissue each is as good as more


def judge_reading(first: Frame, samples: Samples, tags: dict, shift: float) -> Reading:
    """The reading with other tags and intercept. A fill of the corners is neither air nor tissue."""
    stored = samples.stored
    hu = mask_stored(stored, first.header | tags) * samples.slopes + first.intercept + shift
    values, counts = np.unique(samples.corners, return_counts=True)
    is_fill = stored == values[counts.argmax()]
    is_image = ~is_between(stored, first.padding)
    is_inside = is_image if is_fill.mean() > MOST_FILL else is_image & ~is_fill
    is_beyond = (hu > HIGHEST_HU) | ((hu < AIR_HU[0]) & ~is_fill)
    is_air = is_inside & is_between(hu, AIR_HU)
    is_tissue = is_inside & is_between(hu, TISSUE_HU)
    masks = np.stack([is_air, is_tissue, hu > BONE_HU, is_beyond]) & is_image
    air, tissue, bone, beyond = masks.sum(axis=1) / max(is_image.sum(), 1)
    is_clear = min(air, tissue) >= 0.05
    score = min(air, 0.05) + min(tissue, 0.05) - beyond
    return Reading(tags, shift, air, tissue, bone, is_clear, score)


def choose_sign(stack: Stack, samples: Samples) -> None:
    """MR frames in the sign that (0028,0103) PixelRepresentation denies, if values lie much closer then."""
    header = stack.frames[0].header
    sign = 1 - is_signed(header)
    tags = {"PixelRepresentation": sign}
    stated_low, stated_high = np.percentile(samples.stored, (1, 99))
    low, high = np.percentile(mask_stored(samples.stored, header | tags), (1, 99))
    if high - low < 0.5 * (stated_high - stated_low) and high >= -0.25 * low:
        stack.notes.append(f"(0028,0103) PixelRepresentation {sign} used: values lie closer")
        change_tags(stack, tags)


def drop_padding(stack: Stack, samples: Samples) -> None:
    """(0028,0120) PixelPaddingValue is not used where it would be tissue: among others and in no corner."""
    padding = stack.frames[0].padding
    if not padding:
        return
    others = samples.stored[~is_between(samples.stored, padding)]
    if others.size:
        is_among = padding[0] < others.max() and padding[1] > np.percentile(others, 5)
        if not is_among or is_between(samples.corners, padding).mean() > 0.25:
            return
    stack.notes.append(f"(0028,0120) PixelPaddingValue {padding[1]} would be tissue: not used")
    for frame in stack.frames:
        frame.padding = None


def pad_fill(stack: Stack, samples: Samples) -> None:
    """The lowest or highest value is padding if it fills corners and lies far from all others. In MR such a
    fill (-2048, for example) would take the percentiles and the head's threshold. One of more than MOST_FILL
    may be air, and lies farther away, unless it alone is negative. In CT only a bright fill matters."""
    first, pixels = stack.frames[0], samples.stored
    for end in (np.min, np.max):
        fill = int(end(pixels))
        others = pixels[pixels != fill]
        share = (pixels == fill).mean()
        is_outside = (samples.corners == fill).mean() > 0.25 or share > MOST_FILL
        if not is_outside or share < 0.01 or others.size == 0:
            continue
        low, high = np.percentile(others, (5, 99))
        gap = max(low - fill, fill - high)
        value = fill * first.slope + first.intercept
        if first.is_ct:
            is_far = fill > high and value > 1500
        else:
            least_gap = 0.5 if share < MOST_FILL else 2.0
            is_negative = value < 0 <= low * first.slope + first.intercept
            is_far = gap > least_gap * (high - low) > 0 or is_negative
        if is_far:
            stack.notes.append(f"the stored value {fill} fills corners, far from all others: it is padding")
            padding = (-(2**31), int(fill + gap / 2)) if fill < low else (int(fill - gap / 8), 2**31)
            for frame in stack.frames:
                frame.padding = padding
            pixels = others
