"""BTCV (Synapse), abdominal CT: 13 organs in the 30 training cases 0001–0010 and 0021–0040."""

from nnunet_lgms.data.description import CT, DatasetDescription, Layout
from nnunet_lgms.data.splits import btcv_split

# Images 0061–0080 are test cases without labels.
_TRAINING_CASES = r"00(?:0[1-9]|10|2[1-9]|3\d|40)"

DESCRIPTION = DatasetDescription(
    name="btcv",
    title="BTCV",
    layouts=(
        Layout(
            image=rf"img/img(?P<case>{_TRAINING_CASES})\.nii\.gz",
            mask=rf"label/label(?P<case>{_TRAINING_CASES})\.nii\.gz",
            example_image="RawData/Training/img/img0001.nii.gz",
            example_mask="RawData/Training/label/label0001.nii.gz",
        ),
    ),
    channel_names=CT,
    labels={
        "background": 0,
        "spleen": 1,
        "right kidney": 2,
        "left kidney": 3,
        "gallbladder": 4,
        "esophagus": 5,
        "liver": 6,
        "stomach": 7,
        "aorta": 8,
        "inferior vena cava": 9,
        "portal vein and splenic vein": 10,
        "pancreas": 11,
        "right adrenal gland": 12,
        "left adrenal gland": 13,
    },
    published_cases=(30,),
    reference="Landman et al. 2015, Multi-Atlas Labeling Beyond the Cranial Vault, doi 10.7303/syn3193805",
    licence="the challenge's terms",
    identifier="btcv_{case}",
    kind="volume",
    reader="NibabelIOWithReorient",  # left and right are labels of their own: all cases must face the same way
    paper_splits=btcv_split,
)
