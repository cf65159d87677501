"""CVC-ClinicDB (CVC-612), colonoscopy: 612 frames with polyps."""

from nnunet_lgms.data.datasets.unseen import NOTE, benchmark_layout
from nnunet_lgms.data.description import RGB, DatasetDescription, Layout


def _layout(ending: str) -> Layout:
    return Layout(
        image=rf"Original/(?P<case>\d+)\.{ending}",
        mask=rf"Ground Truth/(?P<case>\d+)\.{ending}",
        example_image=f"CVC-ClinicDB/Original/1.{ending}",
        example_mask=f"CVC-ClinicDB/Ground Truth/1.{ending}",
    )


DESCRIPTION = DatasetDescription(
    name="cvc-clinicdb",
    title="CVCClinicDB",
    # one widespread copy holds the publisher's TIFF files and PNG copies of them: the first layout wins
    layouts=(_layout("tif"), _layout("png"), benchmark_layout("CVC-ClinicDB")),
    channel_names=RGB,
    labels={"background": 0, "polyp": 1},
    published_cases=(612, 62),
    reference="Bernal et al. 2015, WM-DOVA maps, doi 10.1016/j.compmedimag.2015.02.007",
    licence="research and education, no commercial use",
    identifier="clinicdb_{case}",
    note=NOTE,
)
