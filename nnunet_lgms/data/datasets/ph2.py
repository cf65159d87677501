"""PH2, dermoscopy: 200 lesions, one folder each."""

from nnunet_lgms.data.datasets.unseen import NOTE
from nnunet_lgms.data.description import RGB, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="ph2",
    title="PH2",
    layouts=(
        Layout(
            image=r"IMD\d+_Dermoscopic_Image/(?P<case>IMD\d+)\.bmp",
            mask=r"IMD\d+_lesion/(?P<case>IMD\d+)_lesion\.bmp",
            example_image="PH2 Dataset images/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp",
            example_mask="PH2 Dataset images/IMD002/IMD002_lesion/IMD002_lesion.bmp",
        ),
    ),
    channel_names=RGB,
    labels={"background": 0, "lesion": 1},
    published_cases=(200,),
    reference="Mendonça et al. 2013, PH2 - A dermoscopic image database, doi 10.1109/EMBC.2013.6610779",
    licence="research and education",
    note=NOTE,
)
