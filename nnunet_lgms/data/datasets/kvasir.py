"""Kvasir-SEG, colonoscopy: polyps. Its masks are JPEG files, so their edges are grey."""

from nnunet_lgms.data.description import RGB, DatasetDescription, Layout

DESCRIPTION = DatasetDescription(
    name="kvasir",
    title="KvasirSEG",
    layouts=(
        Layout(
            image=r"images/(?P<case>[^/]+)\.jpg",
            mask=r"masks/(?P<case>[^/]+)\.jpg",
            example_image="Kvasir-SEG/images/cju0qkwl35piu0993l0dewei2.jpg",
            example_mask="Kvasir-SEG/masks/cju0qkwl35piu0993l0dewei2.jpg",
        ),
    ),
    channel_names=RGB,
    labels={"background": 0, "polyp": 1},
    published_cases=(1000,),
    reference="Jha et al. 2020, Kvasir-SEG: A Segmented Polyp Dataset, arXiv 1911.07069",
    licence="research and education",
)
