"""What data.pictures promises: the pixels of every picture that has them, upright and in sRGB, or a reason."""

import io
import struct
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.pictures import CONVERTED, IGNORED, read, read_picture
from data.shapes import draw
from data.sources import Item, Unusable

SHAPE = (64, 64, 3)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes, shape: tuple[int, int, int] = SHAPE, notes: Counter | None = None) -> np.ndarray:
    return read_picture(data, shape, Counter() if notes is None else notes)


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)


def flat(colour, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (64, 64), colour)


def icc(space: bytes, kind: bytes, **tags: bytes) -> bytes:
    """A colour profile (ICC.1:2001-04, sections 6.1 and 6.2)."""
    at = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name.encode(), at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    connection = b"Lab " if kind == b"prtr" else b"XYZ "
    head = struct.pack(">I4sI4s4s4s12x4s28x", at + len(body), b"", 0x02400000, kind, space, connection, b"acsp")
    return (head + number(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


def number(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def point(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + number(*values)


def curve(gamma: float) -> bytes:
    return struct.pack(">4s4xIH", b"curv", 1, round(gamma * 256))


WHITE = point(0.9642, 1, 0.8249)
PRIMARIES = {  # X, Y, Z of red, green and blue
    "adobe": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
    "p3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
    "srgb": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)),
}


def rgb_profile(name: str, gamma: float) -> bytes:
    tags = {f"{letter}XYZ": point(*xyz) for letter, xyz in zip("rgb", PRIMARIES[name], strict=True)}
    return icc(b"RGB ", b"mntr", wtpt=WHITE, **tags, **{f"{letter}TRC": curve(gamma) for letter in "rgb"})


def in_srgb(colour: tuple[int, int, int], name: str, gamma: float) -> np.ndarray:
    """What a colour of a profile is in sRGB, by the formulas (IEC 61966-2-1)."""
    xyz = np.array(PRIMARIES[name]).T @ (np.array(colour) / 255) ** gamma
    light = np.clip(np.linalg.solve(np.array(PRIMARIES["srgb"]).T, xyz), 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_what_cannot_be_used_is_refused_with_its_reason():
    png = saved(Image.fromarray(draw(0)), "PNG")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20_000).to_bytes(4) + (20_000).to_bytes(4) + b"\x08\2\0\0\0"
    bomb = header + zlib.crc32(header[12:]).to_bytes(4) + png[33:]
    cases = {
        b"": "empty",
        b"GIF? no, text": "not an image",
        png[: len(png) // 2]: "truncated or damaged",
        bomb: "megapixels",
        saved(Image.new("RGB", (200, 63)), "PNG"): "smaller than 64 pixels",
        saved(flat(0, "F"), "TIFF"): "unknown range",
        b"\x1f\x8b\x08" + png: "gzip",
        b"\0\0\0\x18ftypheic" + bytes(100): "HEIC: convert",
    }
    for data, reason in cases.items():
        with pytest.raises(Unusable, match=reason):
            pixels(data)


def test_every_mode_becomes_rgb():
    """Grey, 16 bits, palette, alpha and CMYK pictures of one colour keep it; what is transparent is white."""
    grey = np.full((64, 64), 100, np.uint8)
    wide = Image.fromarray(np.full((64, 64), 100 * 257, np.uint16))
    for data in (
        saved(Image.fromarray(grey), "PNG"),
        saved(wide, "PNG"),
        saved(wide, "TIFF"),
        saved(Image.fromarray(grey).convert("P"), "GIF"),
        saved(Image.fromarray(grey).convert("LA"), "PNG"),
        saved(Image.fromarray(grey).convert("RGB").convert("CMYK"), "TIFF"),
        saved(Image.fromarray(grey).convert("RGB"), "WEBP", lossless=True),
        saved(Image.fromarray(grey).convert("RGB"), "BMP"),
        saved(Image.fromarray(grey).convert("RGB"), "TGA"),
        saved(Image.fromarray(grey), "TGA", compression="tga_rle"),
        saved(Image.fromarray(grey).convert("P"), "TGA"),
    ):
        assert np.array_equal(pixels(data), np.full(SHAPE, 100))
    assert (pixels(saved(flat((9, 9, 9, 0), "RGBA"), "PNG")) == 255).all()
    assert (pixels(saved(flat(1, "1"), "PNG")) == 255).all()


def test_the_largest_centre_part_is_taken_upright(tmp_path):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = draw(3)
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(wide), "PNG"))
    item, codec = Item(str(tmp_path / "a.png"), 0, -1, "a.png"), SimpleNamespace(shape=SHAPE)
    assert [array.tolist() for array in read(item, codec, Counter())] == [draw(3).tolist()]
    for tag, turned in ((2, np.fliplr), (3, np.rot90), (6, np.rot90)):
        exif, stored = Image.Exif(), turned(np.rot90(draw(3)) if tag == 3 else draw(3))
        exif[0x0112] = tag
        assert np.array_equal(pixels(saved(Image.fromarray(stored.copy()), "PNG", exif=exif)), draw(3))


@pytest.mark.parametrize("height, width", [(32, 64), (64, 32), (16, 64)])
def test_shapes_need_not_be_square(height, width):
    """Of twice the size, turned, with a frame that the cut leaves out: the picture, upright."""
    inside = np.asarray(Image.fromarray(draw(1)).resize((2 * width, 2 * height)))
    framed = np.zeros((2 * height, 2 * width + 40, 3), np.uint8)
    framed[:, 20:-20] = inside
    found = pixels(saved(Image.fromarray(np.rot90(framed).copy()), "PNG", exif=TURNED), (height, width, 3))
    expected = np.asarray(Image.fromarray(inside).resize((width, height), Image.Resampling.LANCZOS))
    assert np.abs(found[:, 4:-4].astype(int) - expected[:, 4:-4]).max() <= 1
    with pytest.raises(Unusable, match=f"smaller than {width}x{height} pixels"):
        pixels(saved(Image.new("RGB", (height, width)), "PNG"), (height, width, 3))


@pytest.mark.parametrize("name, gamma", [("adobe", 2.2), ("p3", 2.4), ("srgb", 1.0)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colour_profiles_are_converted_to_srgb(name, gamma, kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    for colour in ((200, 60, 60), (40, 180, 90), (128, 128, 128), (255, 255, 255)):
        notes = Counter()
        found = pixels(saved(flat(colour), kind, icc_profile=rgb_profile(name, gamma), **options), notes=notes)
        assert np.abs(found - in_srgb(colour, name, gamma)).max() <= 3 and notes == {CONVERTED: 1}


def test_profiles_of_grey_palette_transparent_and_cmyk_pictures_are_converted_too():
    grey = icc(b"GRAY", b"mntr", wtpt=WHITE, kTRC=curve(1.0))
    linear = rgb_profile("srgb", 1.0)
    wide = Image.fromarray(np.full((64, 64), 100 * 257, np.uint16))
    expected = in_srgb((100, 100, 100), "srgb", 1.0)
    for image, profile in (
        (flat(100, "L"), grey),
        (wide, grey),
        (flat(100, "L"), linear),
        (flat((100, 100, 100)).quantize(4), linear),
        (flat((100, 100, 100, 255), "RGBA"), linear),
        (flat((100, 255), "LA"), grey),
    ):
        assert np.abs(pixels(saved(image, "PNG", icc_profile=profile)) - expected).max() <= 2
    assert (pixels(saved(flat((100, 0), "LA"), "PNG", icc_profile=grey)) == 255).all()

    ramp = bytes(range(256))
    lightness = bytes(b for corner in range(16) for b in (0 if corner & 1 else 255, 128, 128))  # of the black alone
    table = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + number(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * ramp + lightness
    ink = icc(b"CMYK", b"prtr", wtpt=WHITE, A2B0=table + 3 * ramp)
    for kind in ("TIFF", "JPEG"):
        assert (pixels(saved(flat((255, 0, 0, 0), "CMYK"), kind, icc_profile=ink)) >= 253).all()
        assert (pixels(saved(flat((0, 0, 0, 255), "CMYK"), kind, icc_profile=ink)) <= 2).all()


def test_a_profile_of_srgb_changes_no_pixel():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8))
    for kind in ("PNG", "JPEG"):
        notes = Counter()
        assert np.array_equal(pixels(saved(photo, kind, icc_profile=SRGB), notes=notes), pixels(saved(photo, kind)))
        assert not notes


def test_a_broken_profile_is_ignored_and_counted():
    profile = rgb_profile("adobe", 2.2)
    for broken in (b"no profile at all", profile[:200], icc(b"CMYK", b"prtr", wtpt=WHITE), icc(b"GRAY", b"mntr")):
        notes = Counter()
        assert np.array_equal(
            pixels(saved(flat((200, 60, 60)), "PNG", icc_profile=broken), notes=notes)[0, 0], (200, 60, 60)
        )
        assert notes == {IGNORED: 1}


def odd_exif(kind: int, count: int, value: int) -> bytes:
    """Orientation 6 between two tags of some type, number and place."""
    tags = [(0x010E, kind, count, value), (0x0112, 3, 1, 6), (0x8769, kind, count, value), (0x9286, kind, count, value)]
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "tag", [(2, 4, 0), (2, 2**31, 8), (99, 1, 0), (5, 1, 2**31), (4, 1, 8), (7, 0, 0), (10, 9, 50)]
)
def test_an_odd_tag_beside_the_orientation_loses_neither(kind, tag):
    stored = Image.fromarray(np.rot90(draw(3)).copy())
    data = saved(stored, kind, exif=odd_exif(*tag), **({"lossless": True} if kind == "WEBP" else {"quality": 95}))
    assert np.abs(pixels(data).astype(int) - draw(3)).mean() < 5


def test_damage_beside_the_pixels_of_a_png_loses_nothing():
    png = saved(Image.fromarray(np.rot90(draw(3)).copy()), "PNG", exif=TURNED)
    at = 8 + 25
    wrong = chunk(b"tEXt", b"Comment\0hello")[:-1] + b"\0"
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 1))
    unknown = chunk(b"iCCP", b"icc\0\x09" + zlib.compress(SRGB))
    huge = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(20 << 20), 1))
    for extra, ignored in ((wrong, 0), (text, 0), (wrong + wrong + text, 0), (unknown, 1), (huge, 1)):
        for data in (png[:at] + extra + png[at:], png[:-12] + extra + png[-12:]):
            notes = Counter()
            assert np.array_equal(pixels(data, notes=notes), draw(3))
            assert notes[IGNORED] == ignored or data[at : at + len(extra)] != extra
    profile = zlib.compress(rgb_profile("adobe", 2.2) + np.random.default_rng(0).bytes(2 << 20))
    large = saved(flat((200, 60, 60)), "PNG")
    large = large[:at] + chunk(b"iCCP", b"icc\0\0" + profile) + large[at:]
    assert np.abs(pixels(large) - in_srgb((200, 60, 60), "adobe", 2.2)).max() <= 3
    assert np.array_equal(pixels(png[:-12]), draw(3))  # without its end


VARIANTS = [
    {},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
    {"restart_marker_rows": 20},
    {"progressive": True, "restart_marker_rows": 1},
    {"subsampling": 0, "quality": 95, "optimize": True},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_jpeg_may_lack_its_end_marker_but_no_part_of_the_picture(options):
    photo = Image.fromarray(draw(0)).resize((320, 320))
    data = saved(photo, "JPEG", exif=TURNED, **options)
    whole = pixels(data)
    for lost in (1, 2, 4):
        assert np.abs(pixels(data[:-lost]).astype(int) - whole).mean() < 0.1
    assert np.array_equal(pixels(data[:-2]), whole)
    for share in (0.04, 0.1, 0.25, 0.5, 0.9):
        with pytest.raises(Unusable, match="truncated or damaged"):
            pixels(data[: -int(share * len(data))])


def test_a_jpeg_whose_tags_cannot_be_parsed_is_used():
    stored = np.rot90(draw(3)).copy()
    data = saved(Image.fromarray(stored), "JPEG", quality=95, exif=TURNED)
    nonsense = {b"MPF\0" + b"II*\0" * 9: 0xE2, b"Exif\0\0" + b"\xff" * 40: 0xE1, b"Photoshop 3.0\0" + b"8BIM" * 9: 0xED}
    for body, marker in nonsense.items():
        segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body
        first = data.index(b"\xff\xdb")
        assert np.abs(pixels(data[:first] + segment + data[first:]).astype(int) - draw(3)).mean() < 5


def test_an_icon_is_not_taken_for_a_tga():
    icon = saved(Image.fromarray(draw(3)), "ICO", sizes=[(64, 64)])
    assert np.array_equal(pixels(icon), draw(3))
    for data in (icon[:80], icon[:22] + b"\0" * 20_000, b"\0\0\2\0" + icon[4:], b"\0\0\1\xba" + bytes(range(256)) * 99):
        with pytest.raises(Unusable):
            pixels(data)
