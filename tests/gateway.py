"""A stand-in for the challenge's gateway, as strict as the real one is described to be.

in   $GATEWAY_DATA  a folder per series, as below `series/`, of which it keeps the 25 tags of the hidden test
out  $GATEWAY_OUT   CSV: SeriesInstanceUID and the 14 probabilities that the script under test answered
run  as kaggle_evaluation/rsna_inference_server.py in a folder on PYTHONPATH: python infer.py --serve

`predict` is called from another thread, as by a gRPC server. ValueError or TimeoutError on a wrong answer, a
late start, or a KAGGLE_SHARED left full.
"""

import os
import shutil
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pydicom

from common import LABELS, UID

STARTED, START_LIMIT_S, CALL_LIMIT_S = time.monotonic(), 15 * 60, 30 * 60
TAGS = """BitsAllocated BitsStored Columns FrameOfReferenceUID HighBit ImageOrientationPatient PixelData
    ImagePositionPatient InstanceNumber Modality PatientID PhotometricInterpretation PixelRepresentation
    PixelSpacing PlanarConfiguration RescaleIntercept RescaleSlope RescaleType Rows SOPClassUID SOPInstanceUID
    SamplesPerPixel SliceThickness SpacingBetweenSlices StudyInstanceUID TransferSyntaxUID"""


def strip_tags(source: Path, target: Path) -> None:
    """Copy a DICOM file with the tags of the hidden test alone, and its pixels."""
    dataset = pydicom.dcmread(source)
    for element in list(dataset):
        if element.keyword not in TAGS.split():
            del dataset[element.tag]
    dataset.save_as(target)


class RSNAInferenceServer:
    def __init__(self, predict: Callable):
        if not isinstance(predict, types.FunctionType) or predict.__name__ != "predict":
            raise ValueError(f"the endpoint is {predict!r}; expected a plain function named predict")
        self.predict = predict

    def run_local_gateway(self) -> None:
        """Send every series, one at a time, and write the answers."""
        shared, rows = Path(os.environ["KAGGLE_SHARED"]), []
        if time.monotonic() - STARTED > START_LIMIT_S:
            raise TimeoutError(f"the server was not up within {START_LIMIT_S} s")
        with ThreadPoolExecutor(1) as thread:
            for folder in sorted(Path(os.environ["GATEWAY_DATA"]).iterdir()):
                shutil.copytree(folder, shared / folder.name, copy_function=strip_tags)
                limit_s = CALL_LIMIT_S if rows else None  # the first call may take longer
                answer = thread.submit(self.predict, str(shared / folder.name)).result(timeout=limit_s)
                is_row = isinstance(answer, pd.DataFrame) and list(answer.columns) == list(LABELS)
                if not is_row or len(answer) != 1 or not answer.iloc[0].between(0, 1).all():
                    raise ValueError(f"predict returned {answer!r}; expected a row of the 14 probabilities")
                rows.append([folder.name, *answer.iloc[0]])
                if not shared.is_dir() or list(shared.iterdir()):
                    raise ValueError(f"{shared} was not emptied and made again after {folder.name}")
        pd.DataFrame(rows, columns=[UID, *LABELS]).to_csv(os.environ["GATEWAY_OUT"], index=False)

    serve = run_local_gateway  # the real one waits for another container
