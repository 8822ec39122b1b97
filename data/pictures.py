"""Image files to pixels: upright, RGB, the largest centre square."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.sources import Unusable

FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM TGA DIB ICO PCX PSD SGI".split()  # noqa: SIM905
# EPS is not among them, since Pillow starts a program for it


def read_square(data: bytes, size: int) -> np.ndarray:
    """The bytes of an image file to its largest centre square, (size, size, 3) uint8.  Errors: Unusable, with the
    reason."""
    if not data:
        raise Unusable("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked here, and the rest is about metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # read from the header: nothing is decoded yet
                    raise Unusable(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} megapixels")
                if min(image.size) < size:
                    raise Unusable(f"smaller than {size} pixels")
                image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at 1/2 to 1/8, never below this
                ImageOps.exif_transpose(image, in_place=True)
                image = to_rgb(image)
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except Image.DecompressionBombError:  # Pillow's own limit, twice ours, strikes while it opens
        raise Unusable(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None
    except Exception:  # a damaged file makes Pillow's plugins raise whatever they like
        raise Unusable("truncated or damaged") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(square)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB: 16 bits are scaled to 8, what is transparent is laid on white, as viewers show it."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise Unusable("pixels of unknown range (32 bits)")
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise Unusable(f"pixels of unknown range (mode {image.mode})")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
