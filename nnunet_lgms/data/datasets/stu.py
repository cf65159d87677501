"""STU-Hospital, breast ultrasound.

The images are published with 128x128 pixels, nearly all masks with 400x400 to 512x512 and anti-aliased edges. The image
is brought to the size of its mask: nothing of the annotation is lost, and lesions get the size that they have in BUSI.
"""

from nnunet_lgms.data.datasets.unseen import NOTE
from nnunet_lgms.data.description import GRAY, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="stu",
    title="STU",
    layouts=(
        Layout(
            image=r"Test_Image_(?P<case>\d+)\.png",
            mask=r"mask_(?P<case>\d+)\.png",
            example_image="Hospital/Test_Image_1.png",
            example_mask="Hospital/mask_1.png",
        ),
    ),
    channel_names=GRAY,
    labels={"background": 0, "lesion": 1},
    published_cases=(42,),
    reference="Zhuang et al. 2019, An RDAU-NET model for lesion segmentation, PLoS ONE 14(8):e0221535",
    licence="research use",
    identifier="stu_{case}",
    image_follows_mask=True,
    note=NOTE,
)
