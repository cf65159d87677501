"""What a mask means, how image and mask lie on each other, and that neither is guessed."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dataset_replicas import REPLICAS, disc, grey, picture, save, volume
from PIL import Image, PngImagePlugin

from nnunet_lgms.data.convert import convert
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.data.find import find_cases
from nnunet_lgms.data.masks import read_mask
from nnunet_lgms.data.pictures import open_picture
from nnunet_lgms.image_files import says_to_turn

MASK = disc(3)
ZERO = np.zeros_like(MASK, np.uint8)


def _coloured(*colour: int) -> np.ndarray:
    return (MASK[..., None] * np.array(colour)).astype(np.uint8)


def _palette(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(MASK.astype(np.uint8)).convert("P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def _soft(full: int) -> Image.Image:
    large = Image.fromarray(grey(disc(3, 160, 224)) // 255 * np.uint8(full))
    return large.resize(MASK.shape[::-1], Image.Resampling.BOX)


UNDERSTOOD = {
    "white": Image.fromarray(grey(MASK)),
    "one": Image.fromarray(MASK.astype(np.uint8)),
    "1-bit": Image.fromarray(MASK),
    "one grey on another": Image.fromarray(np.where(MASK, 255, 1).astype(np.uint8)),
    "float": Image.fromarray(MASK.astype(np.float32)),
    **{f"grey {value}": Image.fromarray(MASK.astype(np.uint8) * value) for value in (2, 38, 100, 127, 128, 254)},
    "16-bit one": Image.fromarray(MASK.astype(np.uint16)),
    "16-bit white": Image.fromarray(MASK.astype(np.uint16) * 65535),
    **{
        f"colour {colour}": Image.fromarray(_coloured(*colour))
        for colour in ((255, 0, 0), (0, 0, 255), (128, 0, 0), (0, 128, 0), (224, 224, 192), (1, 0, 0))
    },
    "palette of VOC": _palette((0, 0, 0), (128, 0, 0)),
    "palette in another order": _palette((0, 0, 0), (0, 0, 9)),
    "opacity of black": Image.fromarray(np.dstack([ZERO] * 3 + [grey(MASK)])),
    "opacity of red": Image.fromarray(np.dstack([ZERO + 255, ZERO, ZERO, grey(MASK)])),
    "red on transparent black": Image.fromarray(np.dstack([_coloured(255, 0, 0), grey(MASK)])),
    "red on transparent white": Image.fromarray(
        np.dstack([np.where(MASK[..., None], (255, 0, 0), 255).astype(np.uint8), grey(MASK)])
    ),
    "white, opaque": Image.fromarray(np.dstack([grey(MASK)] * 3 + [ZERO + 255])),
}
JPEGS = {
    "white": grey(MASK),
    "grey 100": grey(MASK) // 255 * np.uint8(100),
    "red": _coloured(255, 0, 0),
    "blue": _coloured(0, 0, 255),
    "VOC": _coloured(128, 0, 0),
    "green": _coloured(0, 255, 0),
}
LEFT = MASK & (np.arange(MASK.shape[1]) < MASK.shape[1] // 2)
CUP = disc(3) & (np.hypot(*(np.mgrid[: MASK.shape[0], : MASK.shape[1]] - np.argwhere(MASK).mean(0)[:, None, None])) < 3)
REFUSED = {
    "two colours": (
        Image.fromarray(np.where(LEFT[..., None], _coloured(0, 128, 0), _coloured(128, 0, 0))),
        r"has several colours, such as \(\d+, \d+, 0\) and \(\d+, \d+, 0\)",
    ),
    "label map": (Image.fromarray(MASK.astype(np.uint8) + LEFT), "has the values 0, 1, 2, which are several classes"),
    "label map in steps": (Image.fromarray(grey(MASK) - 155 * LEFT.astype(np.uint8)), "has grey 100 beside 0 and 255"),
    "label and ignored edge": (
        Image.fromarray(np.where(MASK, np.where(LEFT, 1, 255), 0).astype(np.uint8)),
        "has grey 1 beside 0 and 255",
    ),
    "three palette colours": (
        Image.fromarray(np.where(LEFT, 2, MASK).astype(np.uint8)).convert("P"),
        "several classes",
    ),
    "one dark grey everywhere": (Image.fromarray(ZERO + 100), "has the grey 100 everywhere"),
    "palette without colours": (_palette((7, 7, 7), (7, 7, 7)), "has the grey 7 everywhere"),
    "red on white": (
        Image.fromarray(np.where(MASK[..., None], (255, 0, 0), 255).astype(np.uint8)),
        "several colours|no black background",
    ),
    "black on white": (Image.fromarray(grey(~MASK)), "marks all four edges"),
    "two light greys": (Image.fromarray(ZERO + 150 + 50 * MASK.astype(np.uint8)), "has no black background"),
    "black shape on transparent white": (
        Image.fromarray(np.dstack([grey(~MASK)] * 3 + [grey(MASK)])),
        "one thing by colour and another by transparency",
    ),
    "colours under transparency": (
        Image.fromarray(np.dstack([grey(MASK)] * 3 + [ZERO])),
        "is transparent everywhere",
    ),
    "drawn by matplotlib": (
        Image.fromarray(np.where(MASK[..., None], (253, 231, 36), (68, 1, 84)).astype(np.uint8)),
        "has no black background|several colours",
    ),
    "labels without a background": (Image.fromarray(ZERO + 1 + MASK.astype(np.uint8)), "has no black background"),
    "photograph": (Image.fromarray(picture(3, 3)), "expected one on black"),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_whatever_the_mask_is_drawn_with(kind: str, tmp_path: Path):
    path = tmp_path / ("mask.tif" if UNDERSTOOD[kind].mode == "F" else "mask.png")
    UNDERSTOOD[kind].save(path)
    np.testing.assert_array_equal(read_mask(path), MASK)


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize("kind", JPEGS)
def test_masks_that_lost_their_edges_in_jpeg(kind: str, quality: int, tmp_path: Path):
    Image.fromarray(JPEGS[kind]).save(tmp_path / "mask.jpg", quality=quality)
    assert np.count_nonzero(read_mask(tmp_path / "mask.jpg") ^ MASK) <= 0.06 * np.count_nonzero(MASK)


@pytest.mark.parametrize("full", [255, 100])
def test_soft_edges_are_no_class(full: int, tmp_path: Path):
    _soft(full).save(tmp_path / "mask.png")
    assert np.count_nonzero(read_mask(tmp_path / "mask.png") ^ MASK) <= 0.1 * np.count_nonzero(MASK)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_of_more_than_one_meaning_is_refused_by_name(kind: str, tmp_path: Path):
    image, said = REFUSED[kind]
    image.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=rf"^the mask .*mask\.png ({said}|.*({said}))"):
        read_mask(tmp_path / "mask.png")


def test_empty_masks_stay_empty(tmp_path: Path):
    for i, image in enumerate(
        (Image.fromarray(ZERO), Image.fromarray(np.dstack([ZERO] * 4)), Image.fromarray(ZERO.astype(bool)))
    ):
        image.save(tmp_path / f"{i}.png")
        assert not read_mask(tmp_path / f"{i}.png").any()


def _kvasir(folder: Path, **saved_as) -> Path:
    """Two pairs; the second image is stored as `saved_as` says: `turn` applied to the samples, and other metadata."""
    turn = saved_as.pop("turn", None)
    for number in (1, 2):
        shown = np.where(disc(number, 48, 48)[..., None], 230, 40).astype(np.uint8).repeat(3, -1)
        stored = Image.fromarray(shown)
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        options = {"quality": 95}
        if number == 2 and turn is not None:
            stored, options = stored.transpose(turn), options | saved_as
        stored.save(folder / f"images/a{number}.jpg", **options)
        Image.fromarray(grey(disc(number, 48, 48))).save(folder / f"masks/a{number}.jpg", quality=95)
    return folder


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.usefixtures("verify_in_threads")
@pytest.mark.parametrize(
    "orientation, stored",
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_a_photo_that_says_turn_me_is_turned(orientation: int, stored, tmp_path: Path):
    """Annotators see the turned photo; its samples are stored otherwise."""
    source = _kvasir(tmp_path / "kvasir", turn=stored, exif=_exif(orientation))
    result = convert(DESCRIPTIONS["kvasir"], source, 7, raw=tmp_path / "raw", workers=1)
    assert any(remark.startswith("1 case(s) say that they are to be turned") for remark in result.remarks)
    for case in ("a1", "a2"):
        image = np.asarray(Image.open(result.folder / f"imagesTr/{case}_0000.png"))[..., 0]
        label = np.asarray(Image.open(result.folder / f"labelsTr/{case}.png"))
        assert np.median(image[label == 1]) > 220 and np.median(image[label == 0]) < 50


def test_a_png_and_a_tiff_that_say_turn_me_are_turned(tmp_path: Path):
    shown = Image.fromarray(grey(MASK))
    stored = shown.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "exif.png", exif=_exif(6))
    stored.save(tmp_path / "tag.tif", tiffinfo={0x0112: 6})
    stored.save(tmp_path / "tag_compressed.tif", tiffinfo={0x0112: 6}, compression="tiff_lzw")
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>')
    stored.save(tmp_path / "xmp.png", pnginfo=text)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(np.asarray(open_picture(path)), np.asarray(shown), err_msg=path.name)
        assert says_to_turn(path)


def test_a_photo_whose_mask_was_not_turned_is_refused(tmp_path: Path, capsys):
    REPLICAS["kvasir", "published"][0](tmp_path)
    photo = Image.open(tmp_path / "Kvasir-SEG/images/cju2.jpg")
    photo.save(tmp_path / "Kvasir-SEG/images/cju2.jpg", exif=_exif(6))
    with pytest.raises(ValueError, match=r"^1 case\(s\)"):
        convert(DESCRIPTIONS["kvasir"], tmp_path, 7, raw=tmp_path / "raw", workers=1)
    assert "the image has 40x56 pixels as its orientation turns it, the mask" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda image, path: image.save(path, save_all=True, append_images=[image]), "has 2 pages"),
        (lambda image, path: image.convert("RGBA").putalpha(9) or _half_transparent(image, path), "is transparent in"),
        (lambda image, path: _sixteen_bits(path), "has 16 bits a channel"),
    ],
)
def test_images_of_which_a_part_would_be_dropped_are_refused(spoil, said: str, tmp_path: Path, capsys):
    REPLICAS["etis", "published"][0](tmp_path)
    path = tmp_path / "ETIS-LaribPolypDB/ETIS-LaribPolypDB/2.tif"
    spoil(Image.open(path).copy(), path)
    with pytest.raises(ValueError, match=r"^1 case\(s\)"):
        convert(DESCRIPTIONS["etis"], tmp_path, 7, raw=tmp_path / "raw", workers=1)
    assert f"2.tif {said}" in capsys.readouterr().err


def _half_transparent(image: Image.Image, path: Path) -> None:
    image.putalpha(Image.fromarray(grey(MASK)))
    image.save(path)


def _sixteen_bits(path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, picture(2, 3).astype(np.uint16) * 16, photometric="rgb")


RAS = np.diag([1.0, 1.0, 2.0, 1.0])
LPS = np.diag([-1.0, -1.0, 2.0, 1.0])


def _moved(affine: np.ndarray, by: float) -> np.ndarray:
    moved = affine.copy()
    moved[0, 3] += by
    return moved


def _tilted(affine: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ affine


@pytest.mark.usefixtures("verify_in_threads")
@pytest.mark.parametrize(
    "affine, said",
    [
        (RAS, "places in space"),  # written without the image's orientation
        (_moved(LPS, 3), "places in space"),
        (_tilted(LPS, 3), "places in space"),
        (np.diag([-1.0, -1.0, 2.5, 1.0]), "spacings"),
        (_moved(LPS, 1e-3), ""),  # rounded
    ],
)
def test_image_and_label_lie_on_each_other_in_space(affine: np.ndarray, said: str, tmp_path: Path, capsys):
    """BTCV is read by nibabel, which reorients: a label that says otherwise would be mirrored against its image."""
    for number in (1, 2, 3):
        rng = np.random.default_rng(number)
        training = tmp_path / "Training"
        volume(training / f"img/img000{number}.nii.gz", rng.integers(-9, 9, (12, 10, 8), np.int16), LPS)
        label = rng.integers(0, 14, (12, 10, 8), np.uint8)
        volume(training / f"label/label000{number}.nii.gz", label, affine if number != 3 else LPS)
    if not said:
        assert len(convert(DESCRIPTIONS["btcv"], tmp_path, 7, raw=tmp_path / "raw", workers=1).identifiers) == 3
        return
    with pytest.raises(ValueError, match=r"^2 case\(s\)"):
        convert(DESCRIPTIONS["btcv"], tmp_path, 7, raw=tmp_path / "raw", workers=1)
    listed = capsys.readouterr().err
    assert all(f"btcv_000{n}: image and label" in listed and f"have different {said}" in listed for n in (1, 2))
    assert "btcv_0003" not in listed and not (tmp_path / "raw").exists()


@pytest.mark.usefixtures("verify_in_threads")
def test_a_label_in_another_order_of_axes_but_in_place_is_taken(tmp_path: Path):
    """nnU-Net's reader turns both the same way."""
    for number in (1, 2):
        rng = np.random.default_rng(number)
        training = tmp_path / "Training"
        volume(training / f"img/img000{number}.nii.gz", rng.integers(-9, 9, (12, 10, 8), np.int16), RAS)
        label = nib.Nifti1Image(rng.integers(0, 14, (12, 10, 8), np.uint8), RAS)
        turned = label.as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
        volume(training / f"label/label000{number}.nii.gz", np.asanyarray(turned.dataobj), turned.affine)
    assert len(convert(DESCRIPTIONS["btcv"], tmp_path, 7, raw=tmp_path / "raw", workers=1).identifiers) == 2


def test_a_scaled_label_is_what_nnunet_reads(tmp_path: Path, capsys):
    """Stored 0 and 1 with a slope of 20 are labels 0 and 20, which BTCV does not have."""
    REPLICAS["btcv", "published"][0](tmp_path)
    path = tmp_path / "RawData/Training/label/label0002.nii.gz"
    label = nib.Nifti1Image(np.ones((12, 10, 8), np.uint8), nib.load(path).affine)
    label.header.set_slope_inter(20, 0)
    nib.save(label, path)
    with pytest.raises(ValueError, match=r"^1 case\(s\)"):
        convert(DESCRIPTIONS["btcv"], tmp_path, 7, raw=tmp_path / "raw", workers=1)
    assert "has the value(s) 20" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_that_leads_back_ends(tmp_path: Path):
    REPLICAS["bus", "published"][0](tmp_path)
    (tmp_path / "BUS/again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "BUS/GT/up").symlink_to(tmp_path / "BUS", target_is_directory=True)
    (tmp_path / "BUS/broken").symlink_to(tmp_path / "nowhere")
    assert len(find_cases(DESCRIPTIONS["bus"], tmp_path).cases) == 3


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_files_behind_a_link_are_found(tmp_path: Path):
    REPLICAS["bus", "published"][0](tmp_path / "elsewhere")
    (tmp_path / "source/BUS").mkdir(parents=True)
    for name in ("original", "GT"):
        (tmp_path / "source/BUS" / name).symlink_to(tmp_path / "elsewhere/BUS" / name, target_is_directory=True)
    assert len(find_cases(DESCRIPTIONS["bus"], tmp_path / "source").cases) == 3


@pytest.mark.usefixtures("verify_in_threads")
def test_names_are_names(tmp_path: Path):
    """Brackets are no pattern, neither in a case's name nor in a folder's."""
    folder = tmp_path / "set [1]/Kvasir-SEG"
    for name in ("scan[1]", "scan[2]", "a*b"):
        save(folder / f"images/{name}.jpg", picture(len(name), 3) + np.uint8(len(name) + ord(name[-2])))
        save(folder / f"masks/{name}.jpg", grey(disc(1)))
    result = convert(DESCRIPTIONS["kvasir"], tmp_path / "set [1]", 7, raw=tmp_path / "raw [x]", workers=1)
    assert result.identifiers == ("a_b", "scan_1", "scan_2")
