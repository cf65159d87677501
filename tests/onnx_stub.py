"""An exported model without a network worth the name: what is bright is label 1. For tests of what surrounds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nnunet_lgms.runtime.description import Description, Resampling


def threshold_model(path: Path, patch_size=(24, 32, 24), channels: int = 1, **more) -> Path:
    """Two logits for a normalised value x of the first channel: (0, x - 1)."""
    weight = np.zeros((2, channels, *(1,) * len(patch_size)), np.float32)
    weight[1, 0] = 1
    scale = numpy_helper.from_array(weight, "scale")
    shift = numpy_helper.from_array(np.array([0, -1], np.float32), "shift")
    shape = ["batch", channels, *patch_size]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "scale", "shift"], ["logits"])],
        "threshold",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, *patch_size])],
        [scale, shift],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
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
