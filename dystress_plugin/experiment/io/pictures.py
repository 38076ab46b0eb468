"""Files to pictures: upright, RGB, 8 bits a channel, and the same wherever a picture is read."""

from __future__ import annotations

import functools
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)

# Formats in which mode "I" is no more than 16 bits: Pillow brings every deep PGM to that range, and before its version
# 10.3 it gave PNGs of 16 bits this mode too.
SIXTEEN_BITS_IN_I = ("PPM", "PNG")

# Formats that Pillow tells from others, but reads with another program's help or not at all.
TOLD_ALONE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

WITHOUT_FRAMES = ("MPO", "PSD")  # what Pillow calls frames there are previews and layers

WHITE_IS_ZERO = 0  # of a TIFF's photometric interpretation

TURNED = (5, 6, 7, 8)  # by 90 degrees, as EXIF has it

SIGNED = 2  # of a TIFF's sample format


class BadPicture(ValueError):
    """A file that cannot be used as a picture; the text names it and says why in one line."""

    def __init__(self, message: str) -> None:
        # From a worker process a DataLoader raises the class anew with the whole traceback, which ends with our text.
        super().__init__(message.rpartition(f"{BadPicture.__name__}: ")[2].rstrip())


class _Refused(ValueError):
    """Why a file is refused that no decoder has a word against."""


@functools.cache
def endings() -> tuple[str, ...]:
    """The endings of names by which Pillow knows images, such as .jpg, in lower case."""
    found = Image.registered_extensions().items()
    return tuple(end for end, kind in found if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/"))


def is_picture(file: str) -> bool:
    """Whether a file is an image, by its name or, where that says nothing, by its content; maybe a damaged one."""
    name = os.path.basename(file).lower()
    named = name.endswith(endings())
    if named or name.startswith("."):  # hidden ones by name alone, as torchvision has it
        return named
    try:
        return _is_told(file, os.stat(file).st_mtime_ns)
    except OSError:
        return False


@functools.cache
def _is_told(file: str, _changed: int) -> bool:
    """Whether a file's content is an image's; remembered, as whoever lists files asks again."""
    try:
        with opened(file) as picture:
            return picture.format not in TOLD_ALONE
    except Exception:  # as in `read`
        return False


def has_frames(file: str) -> bool:
    """Whether an image has several frames, of which `decode` takes the first."""
    with opened(file) as picture:
        return bool(getattr(picture, "is_animated", False)) and picture.format not in WITHOUT_FRAMES


def size(file: str) -> tuple[int, int]:
    """Height and width that `decode` gives the picture in a file; its pixels are not read."""
    with opened(file) as picture:
        width, height = picture.size
        turned = False
        with suppress(Exception):  # as in `decode`
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in TURNED
    return (width, height) if turned else (height, width)


def read(file: str) -> Image.Image:
    """The picture in a file, as `decode` makes it.

    Raises:
        BadPicture: whatever is the matter with the file.
    """
    try:
        return decode(file)
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        raise BadPicture(f"{file} cannot be read as an image: {reason(error)}") from None


def decode(file: str) -> Image.Image:
    """The first frame of the picture in a file: upright as its EXIF says, RGB, 8 bits a channel, no metadata.

    8 bits and fewer   as torchvision's loader has it, `convert("RGB")`: alpha is dropped, an ICC profile not applied
    12, 16 bits grey   round(255 value / white), white = 2^bits - 1
    16 bits colour     their upper 8 bits, which is all that Pillow reads
    signed, 32 bits    refused: no format says which number is black and which is white

    White is the format's and never the brightest value of a picture, or two exposures of a scene would look the same.
    So 12 bits in a file of 16 stay dark, as in every program that does not stretch the contrast.
    """
    with opened(file) as picture:
        picture.load()
        with suppress(Exception):  # a picture is good whatever is the matter with its metadata
            ImageOps.exif_transpose(picture, in_place=True)
        converted = _eight_bits(picture).convert("RGB")
    converted.info.clear()  # a saved copy would go on claiming it, such as a profile for CMYK
    return converted


@contextmanager
def opened(file: str) -> Iterator[Image.Image]:
    """An image file that Pillow knows, not decoded yet; what is no regular file is not opened, as it may never end."""
    state = os.stat(file)
    if not stat.S_ISREG(state.st_mode):
        raise _Refused("no regular file, but a folder, pipe, socket or device")
    if not state.st_size:
        raise _Refused("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Not by its name, which Pillow would map into memory: so it scrambles TIFFs that are turned by 90 degrees.
        with open(file, "rb") as stream, Image.open(stream) as picture:
            yield picture


def reason(error: Exception) -> str:
    """What an error of `opened` or `decode` means, in one line without the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can read"
    if isinstance(error, BOMBS):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: a decompression bomb, as far as Pillow can tell"
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, FileNotFoundError) and os.path.islink(error.filename or ""):
        return "a link to what is not there"
    if isinstance(error, OSError) and error.errno is not None:  # the system's; a decoder's has no number
        return os.strerror(error.errno)
    return f"damaged: {' '.join(str(error).split()) or type(error).__name__}"


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The same picture in a mode of 8 bits a channel that converts to RGB."""
    if picture.mode == "La":  # multiplied by its alpha; Pillow converts it to LA alone
        return picture.convert("LA")
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in SIXTEEN_BITS_IN_I)
    if sixteen:
        white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1
        values = np.asarray(picture).astype(np.uint32)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:  # Pillow inverts those of 8 bits alone
            values = white - values
        return Image.fromarray(((255 * values + white // 2) // white).astype(np.uint8))
    if picture.mode in ("I", "F") or SIGNED in tags.get(SAMPLEFORMAT, ()):
        low, high = picture.getextrema()
        raise _Refused(
            f"its values (mode {picture.mode}) go from {low:g} to {high:g}, and the file does not say which are black "
            "and white: convert it to 8 or 16 bits"
        )
    return picture
