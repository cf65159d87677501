"""CVC-ColonDB, colonoscopy: N.bmp is a frame, pN.bmp its polyp mask (cN and sN are contours and other regions)."""

from nnunet_lgms.data.datasets.unseen import NOTE, benchmark_layout
from nnunet_lgms.data.description import RGB, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="cvc-colondb",
    title="CVCColonDB",
    layouts=(
        Layout(
            image=r"(?P<case>\d+)\.(?:bmp|tiff?)",
            mask=r"p(?P<case>\d+)\.(?:bmp|tiff?)",
            example_image="CVC-ColonDB/1.bmp",
            example_mask="CVC-ColonDB/p1.bmp",
        ),
        benchmark_layout("CVC-ColonDB"),
    ),
    channel_names=RGB,
    labels={"background": 0, "polyp": 1},
    published_cases=(300, 380),
    reference="Bernal et al. 2012, Towards automatic polyp detection, doi 10.1016/j.patcog.2012.03.002",
    licence="research and education",
    identifier="colondb_{case}",
    note=NOTE,
)
