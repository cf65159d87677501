"""ETIS-LaribPolypDB, colonoscopy: N.tif is a frame, `Ground Truth/pN.tif` its mask."""

from nnunet_lgms.data.datasets.unseen import NOTE, benchmark_layout
from nnunet_lgms.data.description import RGB, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="etis",
    title="ETIS",
    layouts=(
        Layout(
            image=r"ETIS-LaribPolypDB/(?P<case>\d+)\.tif",
            mask=r"Ground Truth/p(?P<case>\d+)\.tif",
            example_image="ETIS-LaribPolypDB/1.tif",
            example_mask="Ground Truth/p1.tif",
        ),
        benchmark_layout("ETIS-LaribPolypDB"),
    ),
    channel_names=RGB,
    labels={"background": 0, "polyp": 1},
    published_cases=(196,),
    reference="Silva et al. 2014, Toward embedded detection of polyps, doi 10.1007/s11548-013-0926-3",
    licence="research and education",
    identifier="etis_{case}",
    note=NOTE,
)
