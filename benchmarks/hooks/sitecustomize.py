"""Notes how long stock nnU-Net's prediction spends in each stage, in all of its processes; see `waits.py`.

Python runs this file at its start where its folder is on PYTHONPATH; nnU-Net starts its workers as new processes, so no
other way reaches them. Does nothing unless WAITS_STAGES names the file to write to.
"""

import functools
import importlib.util
import json
import os
import sys
import time

STAGES = {  # module: name in it, and the stage that it is
    "nnunetv2.imageio.simpleitk_reader_writer": {"SimpleITKIO.read_images": "read", "SimpleITKIO.write_seg": "write"},
    "nnunetv2.imageio.nibabel_reader_writer": {"NibabelIO.read_images": "read", "NibabelIO.write_seg": "write"},
    "nnunetv2.imageio.natural_image_reader_writer": {
        "NaturalImage2DIO.read_images": "read",
        "NaturalImage2DIO.write_seg": "write",
    },
    "nnunetv2.preprocessing.preprocessors.default_preprocessor": {"DefaultPreprocessor.run_case_npy": "preprocess"},
    "nnunetv2.inference.export_prediction": {"export_prediction_from_logits": "export"},  # with `write` in it
    "nnunetv2.inference.predict_from_raw_data": {
        "nnUNetPredictor.predict_logits_from_preprocessed_data": "network",
        "nnUNetPredictor.predict_from_files": "all",
    },
}


def timed(function, stage):
    @functools.wraps(function)
    def call(*args, **kwargs):
        begin = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            line = json.dumps({"stage": stage, "begin": begin, "seconds": time.time() - begin}) + "\n"
            with open(os.environ["WAITS_STAGES"], "a") as file:
                file.write(line)  # a line at once: processes that append do not mix

    return call


class Finder:
    """Finds those modules as others do, and wraps their functions once they are loaded."""

    def find_spec(self, name, path=None, target=None):
        if name not in STAGES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for names, stage in STAGES[name].items():
                *of, last = names.split(".")
                owner = functools.reduce(getattr, of, module)
                setattr(owner, last, timed(getattr(owner, last), stage))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("WAITS_STAGES"):
    sys.meta_path.insert(0, Finder())
