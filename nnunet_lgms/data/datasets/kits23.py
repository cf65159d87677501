"""KiTS23, contrast-enhanced CT: kidney, tumour and cyst, evaluated as three nested regions.

The regions and the order in which they overwrite each other are those of nnU-Net's own KiTS2023 conversion. Files are
stored slices first, which is why nnU-Net reads them with the reader that reorients.
"""

from nnunet_lgms.data.description import CT, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="kits23",
    title="KiTS23",
    layouts=(
        Layout(
            image=r"(?P<case>case_\d{5})/imaging\.nii\.gz",
            mask=r"(?P<case>case_\d{5})/segmentation\.nii\.gz",
            example_image="dataset/case_00000/imaging.nii.gz",
            example_mask="dataset/case_00000/segmentation.nii.gz",
        ),
    ),
    channel_names=CT,
    labels={"background": 0, "kidney": (1, 2, 3), "masses": (2, 3), "tumor": (2,)},
    published_cases=(489,),
    reference="Heller et al. 2023, The KiTS21 Challenge, arXiv 2307.01984; kits-challenge.org/kits23",
    licence="CC BY-NC-SA 4.0",
    kind="volume",
    regions_class_order=(1, 3, 2),
    reader="NibabelIOWithReorient",
)
