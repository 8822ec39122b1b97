"""Image files to pixels: upright, sRGB, the largest centre part of the wanted shape.

The pixels decide: what is wrong in a file beside them (a tag, a checksum, a profile, the end marker) loses nothing.
"""

import io
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from data.sources import Item, Unusable, foreign, read_file

FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM DIB ICO PCX PSD SGI".split()  # noqa: SIM905
# EPS is not among them, since Pillow starts a program for it; TGA has no magic number and is tried last, see is_tga
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # bytes: colour profiles may be larger than Pillow's 1 MiB

TURN = {  # what makes a picture of this Exif orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
CONVERTED, IGNORED = "colour profile converted to sRGB", "broken colour profile ignored"
DAMAGED = "truncated or damaged"
TGA_KINDS = {  # (has a palette, kind of pixels, bits)
    *((1, kind, 8) for kind in (1, 9)),
    *((0, kind, bits) for kind in (2, 10) for bits in (16, 24, 32)),
    *((0, kind, bits) for kind in (3, 11) for bits in (1, 8, 16)),
}
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # of a JPEG, but for those that stand within a scan
END = b"\xff\xd9"


def read(item: Item, codec, notes: Counter) -> Iterator[np.ndarray]:
    """The one array of codec.shape, uint8, that a picture file gives.  Errors: Unusable, with the reason."""
    yield read_picture(read_file(item), codec.shape, notes)


def read_picture(data: bytes, shape: tuple[int, int, int], notes: Counter) -> np.ndarray:
    """The bytes of an image file to its largest centre part of a shape (H, W, 3), uint8; `notes` counts what was done
    to its colours.  Errors: Unusable, with the reason."""
    if not data:
        raise Unusable("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked here, and the rest is about metadata
            try:
                return cut(data, shape, notes)
            except (Unusable, Image.DecompressionBombError):
                raise
            except Exception:
                if data.startswith(b"\x89PNG"):
                    return cut_damaged_png(data, shape, notes)
                if data.startswith(b"\xff\xd8\xff"):
                    return cut_damaged_jpeg(data, shape, notes)
                raise
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable(foreign(data) or "not an image") from None
    except Image.DecompressionBombError:  # Pillow's own limit, twice ours, strikes while it opens
        raise Unusable(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None
    except Exception:  # a damaged file makes Pillow's plugins raise whatever they like
        raise Unusable(DAMAGED) from None


def cut(data: bytes, shape: tuple[int, int, int], notes: Counter) -> np.ndarray:
    """What read_picture does with a file in order.  Errors: whatever Pillow raises, and Unusable."""
    height, width, _ = shape
    with Image.open(io.BytesIO(data), formats=[*FORMATS, "TGA"] if is_tga(data) else FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # read from the header: nothing is decoded yet
            raise Unusable(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} megapixels")
        large_enough(image.size, (min(height, width),) * 2, shape)
        longest = 2 * max(height, width)
        image.draft(None, (longest, longest))  # a large JPEG is decoded at 1/2 to 1/8, never below this
        image.load()
        if (turn := TURN.get(orientation(image))) is not None:  # the first of them is 0
            image.im = image.im.transpose(turn)
            image._size = image.im.size
        large_enough(image.size, (width, height), shape)  # now that it is known which side is up
        picture, conversion = to_rgb(image, notes)
    wide = min(picture.width, picture.height * width // height)
    high = min(picture.height, picture.width * height // width)
    left, top = (picture.width - wide) // 2, (picture.height - high) // 2
    part = picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + wide, top + high))
    return np.asarray(part if conversion is None else conversion.apply(part))


def large_enough(size: tuple[int, int], least: tuple[int, int], shape: tuple[int, int, int]) -> None:
    if size[0] < least[0] or size[1] < least[1]:
        height, width, _ = shape
        raise Unusable(f"smaller than {width} pixels" if width == height else f"smaller than {width}x{height} pixels")


def orientation(image: Image.Image) -> int:
    """The Exif tag, of a picture that is loaded; 1 (upright) if it has none."""
    try:
        exif = image.getexif()
        if ORIENTATION in exif:
            return exif[ORIENTATION]
    except Exception:  # as with the pixels, whatever is damaged there
        pass
    return orientation_in(image.info.get("exif") or b"")


def orientation_in(exif: bytes) -> int:
    """The tag by itself, since Pillow stops reading at the first that is odd; 1 if there is none.  Exif 2.3, section
    4.6.2."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = "<" if tiff[:2] == b"II" else ">"
    if len(tiff) < 8 or (at := struct.unpack_from(order + "I", tiff, 4)[0]) + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, at)
    entries = tiff[at + 2 : at + 2 + 12 * count]
    values = struct.iter_unpack(order + "H6xH2x", entries[: len(entries) // 12 * 12])
    return next((value for tag, value in values if tag == ORIENTATION), 1)


def is_tga(data: bytes) -> bool:
    """Whether a header that has no magic number fits this format: kind and depth of the pixels, and their number."""
    if len(data) < 18 or (data[1], data[2], data[16]) not in TGA_KINDS:
        return False
    width, height = int.from_bytes(data[12:14], "little"), int.from_bytes(data[14:16], "little")
    bits = width * height * data[16]
    return bits > 0 and (data[2] & 8 > 0 or 18 + data[0] + bits // 8 <= len(data))  # 8: compressed


# --- colours --------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image, notes: Counter) -> tuple[Image.Image, ImageCms.ImageCmsTransform | None]:
    """Any mode of Pillow to RGB: 16 bits are scaled to 8, what is transparent is laid on white, as viewers show it.

    Where a colour profile says that these are not the colours of sRGB, its conversion comes along, and the picture
    remains in the mode that this takes: there is less to convert after resizing.
    """
    profile, mode = image.info.get("icc_profile", b""), image.mode
    if mode == "I" or mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise Unusable("pixels of unknown range (32 bits)")
        image = Image.fromarray((grey // 257).astype(np.uint8))
    elif mode in ("F", "LAB"):
        raise Unusable(f"pixels of unknown range (mode {mode})")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile != b"":
        source = mode if mode == "CMYK" else "L" if mode[0] in "1LI" and profile[16:20] == b"GRAY" else "RGB"
        try:
            if conversion := to_srgb(profile, source):
                notes[CONVERTED] += 1
                return image.convert(source), conversion
        except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
            notes[IGNORED] += 1
    return image if image.mode == "RGB" else image.convert("RGB"), None


@lru_cache(64)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of a profile, as pixels of a mode (L, RGB, CMYK), to sRGB; None if they are hardly others."""
    conversion = ImageCms.ImageCmsTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, mode, "RGB")
    if mode == "CMYK":
        return conversion
    steps = np.arange(0, 256, 17, np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
    image = Image.fromarray(colours).convert(mode)
    change = np.asarray(conversion.apply(image)).astype(int) - np.asarray(image.convert("RGB"))
    return None if np.abs(change).max() <= 2 else conversion  # the many profiles of sRGB itself are rounded otherwise


# --- files with damage beside their pixels --------------------------------------------------------------------------


def cut_damaged_png(data: bytes, shape: tuple[int, int, int], notes: Counter) -> np.ndarray:
    """Without the chunks that pixels do not need, and if this does not help without the colour profile."""
    needed = {b"tRNS", b"eXIf", b"iCCP"}
    try:
        return cut(only_chunks(data, needed), shape, notes)
    except (Unusable, Image.DecompressionBombError):
        raise
    except Exception:
        picture = cut(only_chunks(data, needed - {b"iCCP"}), shape, notes)
        notes[IGNORED] += b"iCCP" in data
        return picture


def only_chunks(data: bytes, needed: set[bytes]) -> bytes:
    """A PNG of its critical chunks, and of those others that are needed and whole.  PNG specification, section 5."""
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, checksum = data[at + 4 : at + 8], int.from_bytes(data[end - 4 : end])
        if kind[:1].isupper() or kind in needed and zlib.crc32(data[at + 4 : end - 4]) == checksum:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def cut_damaged_jpeg(data: bytes, shape: tuple[int, int, int], notes: Counter) -> np.ndarray:
    """Without the segments that pixels do not need.  If the end is missing, with one made up, and only if hardly a
    pixel depends on it: decoded once with nothing and once with noise there, the picture is the same."""
    head, lacking, ended = bare_jpeg(data)
    if ended:
        return cut(head, shape, notes)
    if lacking:
        raise Unusable(DAMAGED)
    picture = cut(head + END, shape, notes)
    other = cut(head + noise(head) + END, shape, Counter())
    if (picture != other).any(-1).mean() > 0.01:
        raise Unusable(DAMAGED)
    return picture


def noise(head: bytes) -> bytes:
    """What continues a cut JPEG over 4,096 blocks or more, above 1% of any that is not too large, with the restart
    markers that its decoder waits for (ITU T.81, section B.2.1)."""
    found = re.search(rb"\xff\xdd\x00\x04(..)", head, re.DOTALL)
    blocks = int.from_bytes(found[1]) if found else 0
    random = np.random.default_rng(0).integers(0, 255, (blocks or 4096) * 256, np.uint8).tobytes()  # no 255: no marker
    if not blocks:
        return random
    before = re.findall(rb"\xff[\xd0-\xd7]", head[head.rfind(b"\xff\xda") :])
    first = before[-1][1] + 1 if before else 0
    return b"".join(random + bytes([0xFF, 0xD0 + (first + i) % 8]) for i in range(4096 // blocks + 1))


def bare_jpeg(data: bytes) -> tuple[bytes, set[tuple[int, int]], bool]:
    """A JPEG up to its end marker without the segments that pixels do not need; what it lacks, as (component,
    coefficient), since each may come in a scan of its own (ITU T.81, sections B.2 and G.1.1); whether it has the end
    marker."""
    kept, lacking, at = [b"\xff\xd8"], set(), 2
    while found := MARKER.search(data, at):
        start, kind = found.start(), data[found.start() + 1]
        if kind == 0xD9:
            return b"".join(kept) + END, lacking, True
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        segment = data[start:end]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame
            lacking = {(component, k) for component in segment[10::3] for k in range(64)}
        elif kind == 0xDA:  # a scan
            first, last, bits = segment[-3:]
            if bits & 15 == 0:  # down to the last bit
                lacking -= {(component, k) for component in segment[5:-3:2] for k in range(first, last + 1)}
            following = MARKER.search(data, end)
            end = following.start() if following else len(data)
        elif kind == 0xE1 and segment[4:].startswith(b"Exif"):
            kept.append(orientation_alone(segment))
        if kind < 0xE0 or kind in (0xE0, 0xEE) or segment[4:].startswith(b"ICC_PROFILE"):  # JFIF, Adobe
            kept.append(data[start:end])
        at = end
    return b"".join(kept).rstrip(b"\xff"), lacking, False


def orientation_alone(segment: bytes) -> bytes:
    """An Exif segment with no other tag."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation_in(segment[4:])
    body = exif.tobytes()
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2) + body
