"""Images against a PIL pipeline written out here, and against damaged and hostile files."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmit.errors import ConfigError, DataError
from mmit.images import ImageSpec, normalize, read_size
from mmit.resize import draft_scale

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SHAPES = [(640, 480), (480, 640), (150, 30), (33, 77), (50, 40), (56, 56), (1, 1), (1, 300), (400, 3)]


def spec(resize="pad", *, exact=True, size=(56, 56), **fields) -> ImageSpec:
    return ImageSpec(size=size, mean=CLIP_MEAN, std=CLIP_STD, resize=resize, tokens_per_tile=16, exact=exact, **fields)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth as a photo is: a coarse random picture, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def llava_pad(image: Image.Image, side: int = 56) -> Image.Image:
    """LLaVA 1.5: expand to a square of the mean colour (rounded down), then resize."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC)


def clip_crop(image: Image.Image, side: int = 56) -> Image.Image:
    """CLIP: shortest edge to ``side``, the other rounded down, then the centre."""
    short, long = sorted(image.size)
    other = int(side * long / short)
    size = (side, other) if image.width <= image.height else (other, side)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


REFERENCE = {
    "pad": llava_pad,
    "crop": clip_crop,
    "squash": lambda image: image.resize((56, 56), Image.Resampling.BICUBIC),
}


@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_route_equals_the_pil_pipeline_bit_for_bit(resize: str, shape: tuple[int, int]) -> None:
    image = photo(*shape)
    made = spec(resize).prepare(encoded(image))
    assert made.shape == (1, 3, 56, 56)
    assert made.dtype == torch.uint8
    assert torch.equal(made[0], pixels(REFERENCE[resize](image)))


@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fast_route_stays_within_a_few_grey_levels(resize: str, shape: tuple[int, int]) -> None:
    image = photo(*shape)
    made = spec(resize, exact=False).prepare(encoded(image))[0].int()
    apart = (made - pixels(REFERENCE[resize](image)).int()).abs()
    # Both routes round to whole levels after each direction: 1 by rounding, 2 to 3 where Pillow swaps the directions.
    assert apart.max() <= 3
    assert apart.float().mean() <= 0.1


def test_the_exact_route_equals_the_pil_processor_of_transformers() -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    theirs = LlavaImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=56, do_pad=True, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    image = photo(64, 40)
    wanted = theirs(image, return_tensors="pt")["pixel_values"]
    made = normalize(spec().prepare(encoded(image)), spec())
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-6)  # the same grey levels; float32 rounding only


def test_normalising_follows_the_formula() -> None:
    levels = torch.tensor([0, 255, 128], dtype=torch.uint8).view(1, 3, 1, 1)
    made = normalize(
        levels, ImageSpec(size=(1, 1), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), resize="pad", tokens_per_tile=1)
    )
    assert made.flatten().tolist() == pytest.approx([-2.0, 2.0, (128 / 255 - 0.5) / 0.25], abs=1e-6)


def test_a_tile_need_not_be_square() -> None:
    white = Image.new("RGB", (40, 40), "white")
    for exact in (True, False):
        tile = spec(exact=exact, size=(10, 20)).prepare(encoded(white))[0]
        assert tile.shape == (3, 10, 20)
        assert tile[:, 5, 0].tolist() == [122, 116, 104]  # padded left and right with the mean colour, rounded down
        assert tile[:, 5, 10].tolist() == [255, 255, 255]


@pytest.mark.parametrize("exact", [True, False])
def test_extreme_strips_keep_their_content_and_stay_small(exact: bool) -> None:
    strip = Image.new("RGB", (30_000, 1), (255, 0, 0))
    crop = spec("crop", exact=exact).prepare(encoded(strip))[0]
    assert (crop == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()
    pad = spec("pad", exact=exact).prepare(encoded(strip))[0]
    assert pad.shape == (3, 56, 56)  # a square of 30000 x 30000 was never made: 2.7 GB


# --- what is in the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_exif_rotation_is_applied(exact: bool) -> None:
    image = photo(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    data = encoded(image, exif=exif)
    assert read_size(data) == (20, 40)
    upright = encoded(image.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(spec(exact=exact).prepare(data), spec(exact=exact).prepare(upright))


def test_a_tiff_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(40, 20), "TIFF", exif=exif)
    assert read_size(data) == (20, 40)
    upright = encoded(photo(40, 20).transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(spec().prepare(data), spec().prepare(upright))


def test_broken_exif_leaves_the_image_as_it_is() -> None:
    data = encoded(photo(40, 20), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_size(data) == (40, 20)
    assert spec().prepare(data).shape == (1, 3, 56, 56)


@pytest.mark.parametrize(("alpha", "level"), [("white", 255), ("black", 0), ("mean", 122)])
def test_transparent_pixels_show_the_chosen_colour(alpha: str, level: int) -> None:
    for image in (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), Image.new("LA", (8, 8), (9, 0))):
        assert spec(alpha=alpha).prepare(encoded(image))[0, 0].unique().tolist() == [level]


def test_half_transparent_black_on_white_is_grey() -> None:
    data = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    assert spec().prepare(data).unique().tolist() == [127]  # 255 * (1 - 128 / 255)


def test_a_transparent_palette_colour_is_composited_and_its_opaque_twin_is_kept() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 10, 20, 30])
    image.paste(1, (4, 0, 8, 8))
    tile = spec(size=(8, 8)).prepare(encoded(image, transparency=0))[0]
    assert tile[:, 0, 0].tolist() == [255, 255, 255]
    assert tile[:, 0, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "wanted"),
    [
        ("L", 77, "PNG", [77, 77, 77]),
        ("1", 1, "PNG", [255, 255, 255]),
        ("P", 3, "PNG", [3, 3, 3]),
        ("CMYK", (0, 0, 0, 0), "TIFF", [255, 255, 255]),
        ("I;16", 65_535, "PNG", [255, 255, 255]),
        ("I;16", 25_700, "PNG", [100, 100, 100]),  # 100 * 257; PIL's own conversion would clip it to white
        ("I", 514, "TIFF", [2, 2, 2]),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour, kind: str, wanted: list[int]) -> None:
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    assert spec(size=(8, 8)).prepare(encoded(image, kind))[0, :, 4, 4].tolist() == wanted


# --- files that must be refused ------------------------------------------------------------------------------------


def test_damaged_files_are_refused_with_the_reason() -> None:
    whole = encoded(photo(64, 64), "JPEG")
    for data, reason in [
        (b"", "zero bytes"),
        (b"<html>404 not found</html>", "no image"),
        (whole[: len(whole) // 2], "truncated"),
        (encoded(photo(64, 64))[:-40], "damaged"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "outside 0..65535"),
    ]:
        with pytest.raises(DataError, match=reason):
            spec().prepare(data)


def test_a_bomb_is_refused_from_its_header() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    for side in (9_600, 60_000):  # 92 Mpx, where PIL only warns, and 3600 Mpx
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
        for read in (read_size, spec().prepare):
            with pytest.raises(DataError, match="pixels"):
                read(data)
    small = encoded(Image.new("L", (30, 30)))
    with pytest.raises(DataError, match="30 x 30 = 900 pixels, more than max_pixels = 899"):
        spec(max_pixels=899).prepare(small)


def test_the_size_comes_from_the_header_alone() -> None:
    whole = encoded(photo(640, 480), "JPEG")
    assert read_size(whole[:1000]) == (640, 480)  # what follows the header is not even there


# --- draft ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
@pytest.mark.parametrize(("turned", "shape"), [(1, (640, 480)), (6, (480, 640)), (3, (560, 224)), (1, (1807, 1356))])
def test_a_draft_is_the_same_picture_in_the_same_place(resize, turned: int, shape) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    smooth = photo(shape[0] // 5, shape[1] // 5).resize(shape, Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=90, exif=exif)
    whole = spec(resize, exact=False).prepare(data)
    draft = spec(resize, exact=False, draft=True).prepare(data)
    assert draft.shape == whole.shape
    assert not torch.equal(draft, whole)  # it was taken
    # The decoder's filter and the resize's differ by 0.6 here, the allowed shift of 1/8 pixel makes 2 of it (1/4: 5).
    exact_place = shape[0] % 8 == 0 and shape[1] % 8 == 0
    assert (draft.int() - whole.int()).abs().float().mean() < (0.7 if exact_place else 2.0)


def test_a_draft_is_as_small_as_size_and_place_in_the_tile_allow() -> None:
    assert draft_scale(640, 480, [((224, 224), "pad")]) == 2  # 320 x 240 for 224 x 168
    assert draft_scale(640, 480, [((336, 336), "pad")]) == 1  # 320 is less than 336
    assert draft_scale(2560, 1920, [((336, 336), "squash")]) == 4
    assert draft_scale(4000, 3000, [((336, 336), "squash")]) == 8
    assert draft_scale(4000, 3000, [((336, 336), "pad")]) == 4  # 500 x 375: 62.5 rows of padding above it
    assert draft_scale(641, 481, [((224, 224), "pad")]) == 1  # 321 x 241 stand for 642 x 482: a third of a pixel
    assert draft_scale(4000, 3000, [((336, 336), "crop")]) == 8
    assert draft_scale(2560, 1920, [((336, 336), "squash"), ((1024, 1024), "squash")]) == 1  # the second needs it
    assert draft_scale(800, 300, [((336, 336), "crop")]) == 1  # its height is enlarged


def test_a_draft_is_for_jpegs_and_not_for_exact_resizing() -> None:
    data = encoded(photo(480, 360), "PNG")
    assert torch.equal(spec(exact=False, draft=True).prepare(data), spec(exact=False).prepare(data))
    assert spec(exact=False, draft=True).fingerprint() != spec(exact=False).fingerprint()
    with pytest.raises(ConfigError, match="draft decodes a JPEG to other pixels"):
        spec(exact=True, draft=True)


# --- the spec ------------------------------------------------------------------------------------------------------


def test_a_spec_survives_json_and_its_fingerprint_tells_specs_apart() -> None:
    one = spec("squash", alpha="black")
    assert ImageSpec.from_dict(one.to_dict()) == one
    assert ImageSpec.from_dict(one.to_dict()).fingerprint() == one.fingerprint()
    assert spec("pad", alpha="black").fingerprint() != one.fingerprint()
    assert hash(one) == hash(ImageSpec.from_dict(one.to_dict()))


def test_the_plan_needs_the_size_only() -> None:
    plan = spec().plan(640, 480)
    assert (plan.tiles, plan.tokens) == (1, 16)
    with pytest.raises(DataError, match="no content"):
        spec().plan(0, 5)


@pytest.mark.parametrize(
    "wrong",
    [{"resize": "stretch"}, {"alpha": "pink"}, {"size": (0, 3)}, {"max_pixels": 10**9}],
)
def test_a_wrong_spec_is_a_config_error(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        ImageSpec.from_dict({**spec().to_dict(), **wrong})
    with pytest.raises(ConfigError, match="unknown keys"):
        ImageSpec.from_dict({**spec().to_dict(), "sise": 3})
