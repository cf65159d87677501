"""The page itself, in Gradio.

Images are medical: the page is served to this machine only unless told otherwise, nothing is sent elsewhere, uploads
are removed once they are read, and masks when their page is closed or the program ends.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

import gradio as gr
import numpy as np

from nnunet_lgms.runtime import Predictor
from nnunet_lgms.runtime.images import Case, read_case, write_labels
from nnunet_lgms.view.slices import AXES, Segmented, colour_of, draw, fullest_slice, to_grey

OPACITY = 0.45


def build_page(predictor: Predictor, folder: Path, image: Path | None = None) -> gr.Blocks:
    """The page for one model.

    Args:
        predictor: the model.
        folder: where masks are written; the caller removes it.
        image: shown when the page opens.
    """
    description = predictor.description
    channels = ", ".join(description.channel_names)

    def segment(files: list[str] | None, session: str, progress: gr.Progress):
        if not files:
            raise gr.Error("Drop an image first.", print_exception=False)
        uploads = [Path(file) for file in sorted(files, key=lambda f: Path(f).name)]
        try:
            return show(read_case(uploads, description), uploads[0].name, session, progress)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            for file in uploads:
                file.unlink(missing_ok=True)

    def show(case: Case, name: str, session: str, progress: gr.Progress):
        picture, spacing = to_grey(case.samples), case.spacing
        labels = predictor.predict_case(case, lambda done, total: progress((done, total), unit="windows"))
        (folder / session).mkdir(exist_ok=True)
        ending = description.file_ending
        mask = Path(mkdtemp(dir=folder / session)) / f"{name.removesuffix(ending)}_mask{ending}"
        write_labels(labels, case, mask)
        segmented = Segmented(picture, labels[None] if case.flat else labels, spacing, case.flat)
        axis = AXES["axial"]
        index = fullest_slice(segmented.labels, axis)
        return (
            segmented,
            draw(segmented, axis, index, OPACITY),
            gr.Slider(maximum=max(segmented.labels.shape[axis] - 1, 1), value=index, visible=not case.flat),
            gr.Radio(value="axial", visible=not case.flat),
            OPACITY,
            gr.DownloadButton(value=str(mask), visible=True),
            legend(segmented),
        )

    def legend(case: Segmented) -> str:
        voxel = float(np.prod(case.spacing[1:] if case.flat else case.spacing))
        unit, scale = ("mm²", 1) if case.flat else ("ml", 1000)
        lines = []
        for name, value in labelled(description).items():
            size = np.count_nonzero(case.labels == value) * voxel / scale
            colour = "#{:02x}{:02x}{:02x}".format(*colour_of(value))
            lines.append(f'<span style="color:{colour}">&#9632;</span> {name} {size:.2f} {unit}')
        return " &nbsp; ".join(lines)

    def redraw(case: Segmented | None, axis: str, index: int, opacity: float):
        return None if case is None else draw(case, AXES[axis], index, opacity)

    def turn(case: Segmented | None, axis: str, opacity: float):
        if case is None:
            return None, gr.Slider()
        index = fullest_slice(case.labels, AXES[axis])
        slider = gr.Slider(maximum=max(case.labels.shape[AXES[axis]] - 1, 1), value=index)
        return draw(case, AXES[axis], index, opacity), slider

    with gr.Blocks(title="LGMSNet", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"## {description.dataset}\n{description.trainer}, {description.configuration}. Not for clinical use."
        )
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1):
                upload = gr.File(
                    label=f"Image ({channels}), {description.file_ending}", file_count="multiple", elem_id="upload"
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
                axis = gr.Radio(list(AXES), value="axial", label="Plane", visible=False, elem_id="plane")
                slider = gr.Slider(0, 1, step=1, label="Slice", visible=False, elem_id="slice")
                opacity = gr.Slider(0, 1, value=OPACITY, step=0.05, label="Opacity", elem_id="opacity")
                download = gr.DownloadButton("Download the mask", visible=False, elem_id="download")
            with gr.Column(scale=2):
                overlay = gr.Image(label="Segmentation", elem_id="overlay", interactive=False, format="png")
                key = gr.HTML(elem_id="legend")
        outputs = [state, overlay, slider, axis, opacity, download, key]

        # Gradio finds the request by its annotation and its progress bar by this default.
        def on_button(files, request: gr.Request, progress=gr.Progress()):  # noqa: B008
            return segment(files, request.session_hash, progress)

        def on_load(request: gr.Request, progress=gr.Progress()):  # noqa: B008
            return show(read_case([image], description), image.name, request.session_hash, progress)

        def on_close(request: gr.Request):
            shutil.rmtree(folder / request.session_hash, ignore_errors=True)

        button.click(on_button, upload, outputs)
        slider.input(redraw, [state, axis, slider, opacity], overlay, show_progress="hidden")
        opacity.input(redraw, [state, axis, slider, opacity], overlay, show_progress="hidden")
        axis.input(turn, [state, axis, opacity], [overlay, slider], show_progress="hidden")
        page.unload(on_close)
        if image is not None:
            page.load(on_load, None, outputs)
    return page


def labelled(description) -> dict[str, int]:
    """Name and written value of every label that the model can give."""
    names = [name for name in description.labels if name not in ("background", "ignore")]
    if description.regions_class_order is not None:
        return dict(zip(names, description.regions_class_order))
    return {name: int(description.labels[name]) for name in names}


def serve(
    model: Path, image: Path | None, folder: Path, *, host: str, port: int | None, megabytes: int, open_browser: bool
) -> None:
    """Serve the page until interrupted; everything that it writes lies in `folder`.

    Raises:
        ValueError: the model or the image is not what it should be.
        OSError: no port is free.
    """
    predictor = Predictor(model)
    if image is not None:
        read_case([image], predictor.description)  # what is wrong with it is said here, not on the page
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    page = build_page(predictor, folder, image)
    try:
        page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            max_file_size=megabytes * 2**20,
            inbrowser=open_browser,
            share=False,
            allowed_paths=[str(folder)],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        if "port" in str(error):  # Gradio names its own ways out, which are not ours
            raise OSError(f"No port from 7860 on is free at {host}: name one with --port.") from error
        raise
