"""An exported model without a network worth the name: what is bright is label 1. For tests of what surrounds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nnunet_lgms.export.onnx_file import INPUT, OPSET, OUTPUT
from nnunet_lgms.runtime.description import Description, Resampling


def threshold_model(path: Path, patch_size=(24, 32, 24), **more) -> Path:
    """Logits (0, x - 1) for a normalised value of x."""
    scale = numpy_helper.from_array(np.array([0, 1], np.float32).reshape(2, 1, *(1,) * len(patch_size)), "scale")
    shift = numpy_helper.from_array(np.array([0, -1], np.float32), "shift")
    shape = ["batch", 1, *patch_size]
    graph = helper.make_graph(
        [helper.make_node("Conv", [INPUT, "scale", "shift"], [OUTPUT])],
        "threshold",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 2, *patch_size])],
        [scale, shift],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)
    resampling = Resampling("resample_data_or_seg_to_shape", order=1)
    fields = {
        "trainer": "nnUNetTrainerLGMSNet",
        "dataset": "Dataset999_Bright",
        "plans": "nnUNetPlans",
        "configuration": "3d_fullres",
        "folds": ("0",),
        "precision": "fp32",
        "reader": "SimpleITKIO",
        "file_ending": ".nii.gz",
        "channel_names": ("MRI",),
        "transpose_forward": (0, 1, 2),
        "transpose_backward": (0, 1, 2),
        "spacing": (1.0, 1.0, 1.0),
        "normalization_schemes": ("ZScoreNormalization",),
        "use_mask_for_norm": (False,),
        "intensity_properties": ({},),
        "resampling_data": resampling,
        "resampling_probabilities": resampling,
        "patch_size": tuple(patch_size),
        "steps": (0,) * len(patch_size),
        "mirror_axes": (),
        "labels": {"background": 0, "bright": 1},
    }
    path.with_suffix(".json").write_text(Description(**fields | more).to_json())
    return path
