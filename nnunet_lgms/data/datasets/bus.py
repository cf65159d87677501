"""BUS (UDIAT, "dataset B"), breast ultrasound: 163 images with one lesion each."""

from nnunet_lgms.data.datasets.unseen import NOTE
from nnunet_lgms.data.description import GRAY, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="bus",
    title="BUS",
    layouts=(
        Layout(
            image=r"original/(?P<case>\w+)\.png",
            mask=r"GT/(?P<case>\w+)\.png",
            example_image="BUS/original/000001.png",
            example_mask="BUS/GT/000001.png",
        ),
    ),
    channel_names=GRAY,
    labels={"background": 0, "lesion": 1},
    published_cases=(163,),
    reference="Yap et al. 2018, Automated Breast Ultrasound Lesions Detection, doi 10.1109/JBHI.2017.2731873",
    licence="research use, under the publisher's release agreement",
    identifier="bus_{case}",
    note=NOTE,
)
