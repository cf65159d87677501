"""BUSI, breast ultrasound: lesions are marked in one or several mask files an image."""

from nnunet_lgms.data.description import GRAY, DatasetDescription, Layout
from nnunet_lgms.data.splits import busi_splits

DESCRIPTION = DatasetDescription(
    name="busi",
    title="BUSI",
    layouts=(
        Layout(
            image=r"(?:benign|malignant|normal)/(?P<case>(?:benign|malignant|normal) \(\d+\))\.png",
            mask=r"(?:benign|malignant|normal)/(?P<case>(?:benign|malignant|normal) \(\d+\))_mask(?:_\d+)?\.png",
            example_image="Dataset_BUSI_with_GT/benign/benign (1).png",
            example_mask="Dataset_BUSI_with_GT/benign/benign (1)_mask.png",
        ),
        # copies with merged masks, resized or not, are often passed on in this form
        Layout(
            image=r"images/(?P<case>(?:benign|malignant|normal) \(\d+\))\.png",
            mask=r"masks/(?P<case>(?:benign|malignant|normal) \(\d+\))\.png",
            example_image="images/benign (1).png",
            example_mask="masks/benign (1).png",
        ),
    ),
    channel_names=GRAY,
    labels={"background": 0, "lesion": 1},
    published_cases=(647, 780),
    reference="Al-Dhabyani et al. 2020, Dataset of breast ultrasound images, Data in Brief 28:104863",
    licence="research use",
    left_out={"normal": "normal"},  # the paper trains and tests on the 647 images with a lesion
    known_duplicates=(frozenset({"benign_433", "malignant_145"}),),
    paper_splits=busi_splits,
)
