"""What the datasets for zero-shot tests have in common."""

from nnunet_lgms.data.description import Layout

NOTE = (
    "The paper tests on four unseen datasets. Which pairs of them it uses is not listed in the text that was at hand "
    "for this converter, so all pairs are converted."
)


def benchmark_layout(folder: str) -> Layout:
    """The test sets of the polyp benchmark of Fan et al. (PraNet, arXiv 2006.11392): FOLDER/{images,masks}/NAME.png.

    They are how these datasets are mostly passed on today; some hold other frames than the publishers' originals.
    """
    return Layout(
        image=rf"{folder}/images/(?P<case>[^/]+)\.png",
        mask=rf"{folder}/masks/(?P<case>[^/]+)\.png",
        example_image=f"{folder}/images/1.png",
        example_mask=f"{folder}/masks/1.png",
    )
