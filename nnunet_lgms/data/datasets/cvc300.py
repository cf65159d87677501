"""CVC-300, the part of EndoScene (CVC-EndoSceneStill) with 300 frames: `bbdd` are images, `gtpolyp` polyp masks."""

from nnunet_lgms.data.datasets.unseen import NOTE, benchmark_layout
from nnunet_lgms.data.description import RGB, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="cvc-300",
    title="CVC300",
    layouts=(
        Layout(
            # EndoScene's other part, CVC-612, is laid out alike beside it
            image=r"(?<!CVC-612/)bbdd/(?P<case>\d+)\.bmp",
            mask=r"(?<!CVC-612/)gtpolyp/(?P<case>\d+)\.bmp",
            example_image="CVC-300/bbdd/1.bmp",
            example_mask="CVC-300/gtpolyp/1.bmp",
        ),
        benchmark_layout("CVC-300"),
    ),
    channel_names=RGB,
    labels={"background": 0, "polyp": 1},
    published_cases=(300, 60),
    reference="Vázquez et al. 2017, A Benchmark for Endoluminal Scene Segmentation, doi 10.1155/2017/4037190",
    licence="research and education",
    identifier="cvc300_{case}",
    note=NOTE,
)
