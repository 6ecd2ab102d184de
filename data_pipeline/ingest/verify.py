"""One image: decoded whole, and given back in the form in which it is stored."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

# Others would run programs (EPS) or decode what no classification data set holds.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_REPAIR_QUALITY = 95
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Options:
    """In which form images are stored; by default as they are in the source, byte for byte.

    Attributes:
        max_side: images whose longer side has more pixels are scaled down to it (bicubic, antialiased).
        quality: JPEG quality, 1 to 100, at which every image is encoded again (chroma 4:2:0). Without it only images
            that have to be (resized, turned, or no RGB or grey JPEG) are, at 95 and with full chroma.
        raw: store pixels (uint8 RGB) rather than JPEG.
        upright: turn images as their EXIF orientation says. Otherwise it is ignored, as by torchvision's ImageFolder,
            with which published scores were made.
    """

    max_side: int | None = None
    quality: int | None = None
    raw: bool = False
    upright: bool = False


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A verified image.

    Attributes:
        data: JPEG, or with `Options.raw` pixels [height, width, 3].
        histogram: of the pixels, [768]: 256 counts for each of red, green and blue; None where not asked for.
    """

    data: bytes
    height: int
    width: int
    histogram: list[int] | None


class Unfit(Exception):
    """An image that is left out: what is wrong in a word or two, the same for all such images, and in particular."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Within it Pillow refuses decompression bombs that it would only warn of, and says nothing of oddities."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def verify(data: bytes, options: Options, with_histogram: bool) -> StoredImage:
    """Decode an image whole and bring it into the form that `options` asks for; call it in `strict_decoding`.

    CMYK JPEGs, and PNGs and others under whatever name, become RGB JPEGs. Raises Unfit where it cannot be used.
    """
    if not data:
        raise Unfit("empty", "it has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            return _stored(image, data, options, with_histogram)
    except (Unfit, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Unfit("no image", f"its format is unknown; it begins with {data[:16]!r}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unfit("too large", f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # decoders fail in any way on bytes that are no image
        reason = re.sub(r"<\S+ object at 0x[0-9a-f]+>", "it", str(error)) or type(error).__name__
        raise Unfit("truncated" if "truncated" in reason.lower() else "damaged", reason) from None


def _stored(image: Image.Image, data: bytes, options: Options, with_histogram: bool) -> StoredImage:
    if image.mode[0] in "IF":  # converting would not scale, but clip
        raise Unfit("deep", f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
    pixels = image
    if options.upright and image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9):
        pixels = ImageOps.exif_transpose(pixels)
    if pixels.mode not in (("RGB",) if options.raw else ("RGB", "L")):
        pixels = pixels.convert("RGB")
    longer = max(pixels.size)
    if options.max_side is not None and longer > options.max_side:
        width, height = (max(1, round(side * options.max_side / longer)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    if options.raw:
        data = pixels.tobytes()
    elif options.quality is not None:
        data = _jpeg(pixels, options.quality, "4:2:0")
    elif pixels is not image or image.format != "JPEG":
        data = _jpeg(pixels, _REPAIR_QUALITY, "4:4:4")
    histogram = None
    if with_histogram:
        histogram = pixels.histogram() * (3 if pixels.mode == "L" else 1)
    return StoredImage(data, pixels.height, pixels.width, histogram)


def _jpeg(pixels: Image.Image, quality: int, subsampling: str) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=quality, subsampling=subsampling, comment=b"")
    return buffer.getvalue()
