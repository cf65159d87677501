"""ISIC 2018 task 1, dermoscopy: lesion boundaries of the training set."""

from nnunet_lgms.data.description import RGB, DatasetDescription, Layout
from nnunet_lgms.data.splits import isic2018_splits

DESCRIPTION = DatasetDescription(
    name="isic2018",
    title="ISIC2018",
    layouts=(
        Layout(
            image=r"ISIC2018_Task1-2_Training_Input/(?P<case>ISIC_\d+)\.jpg",
            mask=r"ISIC2018_Task1_Training_GroundTruth/(?P<case>ISIC_\d+)_segmentation\.png",
            example_image="ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg",
            example_mask="ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png",
        ),
    ),
    channel_names=RGB,
    labels={"background": 0, "lesion": 1},
    published_cases=(2594,),
    reference="Codella et al. 2019, Skin Lesion Analysis Toward Melanoma Detection 2018, arXiv 1902.03368",
    licence="the challenge's terms",
    paper_splits=isic2018_splits,
)
