"""TN-SCUI 2020, thyroid ultrasound: nodules. The masks of the challenge's test images were never published."""

from nnunet_lgms.data.description import GRAY, DatasetDescription, Layout
from nnunet_lgms.data.splits import tnscui_splits

DESCRIPTION = DatasetDescription(
    name="tnscui",
    title="TNSCUI2020",
    layouts=(
        Layout(
            image=r"image/(?P<case>\d+)\.png",
            mask=r"mask/(?P<case>\d+)\.png",
            example_image="TNSCUI2020_train/image/1.PNG",
            example_mask="TNSCUI2020_train/mask/1.PNG",
        ),
    ),
    channel_names=GRAY,
    labels={"background": 0, "nodule": 1},
    published_cases=(3644,),
    reference="Thyroid Nodule Segmentation and Classification challenge, MICCAI 2020, tn-scui2020.grand-challenge.org",
    licence="the challenge's terms",
    identifier="tnscui_{case}",
    paper_splits=tnscui_splits,
)
