"""Every kind of picture that Pillow reads from an image folder, against its values worked out by hand."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress, scan_folder  # beside this file
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.datasets.folder import default_loader

from dystress_plugin.experiment.data.scan import fault
from dystress_plugin.experiment.inspect import command as inspection
from dystress_plugin.experiment.io import pictures
from dystress_plugin.experiment.io.pictures import BadPicture, read

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
DEEP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(8, 32)
FALLING = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)


def gray(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, 2)


def scaled(values, white):
    """The nearest of 256 steps from 0 to white."""
    return gray(np.floor(255 * values.astype(np.float64) / white + 0.5))


def saved(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values, depth, colour):
    """A PNG from values of `depth` bits: (height, width), or with a last dimension of channels."""
    flat = values.reshape(len(values), -1).astype(np.uint16)
    bits = np.unpackbits(flat.astype(">u2").view(np.uint8).reshape(*flat.shape, 2), axis=2)[..., 16 - depth :]
    rows = np.packbits(bits.reshape(len(flat), -1), axis=1)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def tiff(content, shape, order="<", bits=16, channels=1, **tags):
    """A TIFF of one strip with the given bytes: uncompressed, grey and black is 0 unless a tag says otherwise."""
    entries = {256: shape[1], 257: shape[0], 258: bits, 259: 1, 262: 1, 273: 8, 277: channels, 278: shape[0]}
    entries |= {279: len(content), **{int(tag[1:]): value for tag, value in tags.items()}}
    table = b"".join(struct.pack(f"{order}HHIHxx", tag, 3, 1, value) for tag, value in sorted(entries.items()))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", 8 + len(content))
    return head + content + struct.pack(f"{order}H", len(entries)) + table + bytes(4)


def twelve_bits(values):
    pairs = values.reshape(-1, 2).astype(np.uint32)
    whole = pairs[:, 0] << 12 | pairs[:, 1]
    return b"".join(int(pair).to_bytes(3, "big") for pair in whole)


def lightness_to_srgb(lightness):
    """Grey of a CIE lightness from 0 to 1."""
    light = np.where(lightness > 0.08, ((100 * lightness + 16) / 116) ** 3, 100 * lightness / 903.3)
    return 255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)


def sample(mode):
    """RAMP, or in colour FALLING, with an alpha that goes from nothing to all if the mode has one."""
    picture = Image.fromarray(FALLING if "RGB" in mode else RAMP)
    if mode.endswith("A"):
        picture.putalpha(Image.fromarray(RAMP))
    return picture


def palette(**options):
    picture = Image.fromarray(RAMP).convert("P")
    picture.putpalette(np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)], 1).astype(np.uint8).tobytes())
    return saved(picture, options.pop("kind", "PNG"), **options)


COLOURS = np.stack([RAMP, RAMP[::-1, ::-1], np.full_like(RAMP, 7)], 2)
CMYK = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], np.zeros_like(RAMP)], 2)
LAB = np.stack([RAMP, np.zeros_like(RAMP), np.zeros_like(RAMP)], 2)
HALF = np.stack([RAMP // 2, np.full_like(RAMP, 128)], 2)  # multiplied by its alpha
PAGES = {"save_all": True, "append_images": [Image.fromarray(255 - FALLING)]}

# Eight bits and fewer: the file's bytes and the picture, which is also what torchvision makes of the file.
EIGHT = {
    "1.png": (png(RAMP >> 7, 1, 0), gray((RAMP >> 7) * 255)),
    "1.tif": (saved(Image.fromarray(RAMP > 127), "TIFF"), gray((RAMP > 127) * 255)),
    "1.bmp": (saved(Image.fromarray(RAMP > 127), "BMP"), gray((RAMP > 127) * 255)),
    "2bits.png": (png(RAMP >> 6, 2, 0), scaled(RAMP >> 6, 3)),
    "4bits.png": (png(RAMP >> 4, 4, 0), scaled(RAMP >> 4, 15)),
    "L.png": (png(RAMP, 8, 0), gray(RAMP)),
    "L.tif": (tiff(RAMP.tobytes(), RAMP.shape, bits=8), gray(RAMP)),
    "L_white_is_0.tif": (tiff(RAMP.tobytes(), RAMP.shape, bits=8, t262=0), gray(255 - RAMP)),
    "L.pgm": (saved(Image.fromarray(RAMP), "PPM"), gray(RAMP)),
    "LA.png": (saved(sample("LA"), "PNG"), gray(RAMP)),
    "LA.tif": (saved(sample("LA"), "TIFF"), gray(RAMP)),
    "P.png": (palette(), COLOURS),
    "P_transparent.png": (palette(transparency=3), COLOURS),
    "P_translucent.png": (palette(transparency=bytes(range(256))), COLOURS),
    "P.tif": (palette(kind="TIFF"), COLOURS),
    "P.bmp": (palette(kind="BMP"), COLOURS),
    "gif_by_content.png": (palette(kind="GIF"), COLOURS),
    "PA.tif": (saved(Image.fromarray(RAMP).convert("PA"), "TIFF"), gray(RAMP)),
    "RGB.png": (png(FALLING, 8, 2), FALLING),
    "RGB_transparent.png": (saved(sample("RGB"), "PNG", transparency=(0, 224, 31)), FALLING),
    "RGB.TIFF": (saved(sample("RGB"), "TIFF"), FALLING),
    "RGB.ppm": (saved(sample("RGB"), "PPM"), FALLING),
    "RGB.BMP": (saved(sample("RGB"), "BMP"), FALLING),
    "RGB.webp": (saved(sample("RGB"), "WEBP", lossless=True), FALLING),
    "RGBA.png": (saved(sample("RGBA"), "PNG"), FALLING),
    "RGBA.tif": (saved(sample("RGBA"), "TIFF"), FALLING),
    "RGBA.webp": (saved(sample("RGBA"), "WEBP", lossless=True, exact=True), FALLING),
    "CMYK.tif": (saved(Image.frombytes("CMYK", (32, 8), CMYK.tobytes()), "TIFF"), 255 - CMYK[..., :3]),
    "frames.png": (saved(sample("RGB"), "PNG", **PAGES), FALLING),
    "frames.tif": (saved(sample("RGB"), "TIFF", **PAGES), FALLING),
    "frames.webp": (saved(sample("RGB"), "WEBP", lossless=True, **PAGES), FALLING),
}
# The same, but that compression or another colour space leaves the values only near: how far off they may be.
NEAR = {
    "L.jpg": (saved(Image.fromarray(RAMP), "JPEG", quality=100), gray(RAMP), 2),
    "RGB.JPG": (saved(sample("RGB"), "JPEG", quality=100, subsampling=0), FALLING, 4),
    "CMYK.jpeg": (saved(Image.frombytes("CMYK", (32, 8), CMYK.tobytes()), "JPEG", quality=100), 255 - CMYK[..., :3], 3),
    "YCbCr.tif": (saved(sample("RGB").convert("YCbCr"), "TIFF"), FALLING, 3),
    "LAB.tif": (tiff(LAB.tobytes(), RAMP.shape, bits=8, channels=3, t262=8), gray(lightness_to_srgb(RAMP / 255)), 2),
    "La.tif": (tiff(HALF.tobytes(), RAMP.shape, bits=8, channels=2, t338=1), gray(np.minimum(255, 2 * (RAMP // 2))), 2),
}
# More bits: what torchvision makes white, and Pillow's own conversion cuts off.
SIXTEEN = {
    "16.png": (png(DEEP, 16, 0), scaled(DEEP, 65535)),
    "16_of_which_12_are_used.png": (png(DEEP >> 4, 16, 0), scaled(DEEP >> 4, 65535)),
    "16.tif": (tiff(DEEP.astype("<u2").tobytes(), DEEP.shape), scaled(DEEP, 65535)),
    "16_big_endian.tif": (tiff(DEEP.astype(">u2").tobytes(), DEEP.shape, ">"), scaled(DEEP, 65535)),
    "16_lzw.tif": (saved(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), scaled(DEEP, 65535)),
    "16_white_is_0.tif": (tiff(DEEP.astype("<u2").tobytes(), DEEP.shape, t262=0), scaled(65535 - DEEP, 65535)),
    "12.tif": (tiff(twelve_bits(DEEP >> 4), DEEP.shape, bits=12), scaled(DEEP >> 4, 4095)),
    "16.pgm": (b"P5 32 8 65535 " + DEEP.astype(">u2").tobytes(), scaled(DEEP, 65535)),
    "12.pgm": (b"P5 32 8 4095 " + (DEEP >> 4).astype(">u2").tobytes(), scaled(DEEP >> 4, 4095)),
    "16_jp2.png": (saved(Image.fromarray(DEEP), "JPEG2000"), scaled(DEEP, 65535)),
}
SIXTEEN_COLOURS = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], 2)
WITH_ALPHA = np.concatenate([SIXTEEN_COLOURS, DEEP[..., None]], 2)
# Of these Pillow reads the upper eight bits alone, as does torchvision.
UPPER = {
    "48.png": (png(SIXTEEN_COLOURS, 16, 2), SIXTEEN_COLOURS >> 8),
    "64.png": (png(WITH_ALPHA, 16, 6), SIXTEEN_COLOURS >> 8),
    "32.png": (png(WITH_ALPHA[..., 2:], 16, 4), gray(SIXTEEN_COLOURS[..., 2] >> 8)),
}
REFUSED = {
    "signed_16.tif": (tiff((DEEP - 32768).astype("<u2").tobytes(), DEEP.shape, t339=2), "mode I", -32768, 32767),
    "signed_8.tif": (tiff(RAMP.tobytes(), RAMP.shape, bits=8, t339=2), "mode L", 0, 255),
    "32.tif": (tiff(DEEP.astype("<u4").tobytes(), DEEP.shape, bits=32), "mode I", 0, 65535),
    "float.tif": (tiff((DEEP / 65535).astype("<f4").tobytes(), DEEP.shape, bits=32, t339=3), "mode F", 0, 1),
    "float.pgm": (b"Pf\n32 8\n-1.0\n" + (DEEP / 1e4).astype("<f4").tobytes(), "mode F", 0, 6.5535),
}
PICTURES = EIGHT | SIXTEEN | UPPER


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return str(folder / name)


def pixels(picture):
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_and_format_has_its_own_values_in_8_bits(name, tmp_path):
    content, expected = PICTURES[name]
    file = write(tmp_path, name, content)
    assert np.array_equal(pixels(read(file)), expected)
    assert fault(file) is None


@pytest.mark.parametrize("name", NEAR)
def test_lossy_formats_and_other_colour_spaces_have_nearly_their_values(name, tmp_path):
    content, expected, off = NEAR[name]
    file = write(tmp_path, name, content)
    assert np.abs(pixels(read(file)) - expected).max() <= off
    assert fault(file) is None


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", [*EIGHT, *UPPER])
def test_of_eight_bits_all_is_as_torchvision_has_it(name, tmp_path):
    file = write(tmp_path, name, PICTURES[name][0])
    assert np.array_equal(pixels(read(file)), pixels(default_loader(file)))


def test_a_deep_png_is_the_same_with_a_pillow_that_opens_it_as_32_bits(tmp_path, monkeypatch):
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    content, expected = PICTURES["16.png"]
    file = write(tmp_path, "16.png", content)
    with Image.open(file) as picture:
        assert picture.mode == "I"
    assert np.array_equal(pixels(read(file)), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_whose_black_and_white_nobody_knows_is_refused_by_name(name, tmp_path):
    content, mode, low, high = REFUSED[name]
    file = write(tmp_path, name, content)
    with pytest.raises(BadPicture) as error:
        read(file)
    told = f"its values ({mode}) go from {low:g} to {high:g}, and the file does not say which are black and white"
    assert str(error.value) == f"{file} cannot be read as an image: {told}: convert it to 8 or 16 bits"
    assert told in fault(file)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k in ("PNG", "TIFF") for m in ("1", "L", "P", "RGBA", "I;16")])
@pytest.mark.parametrize("number", UPRIGHT)
def test_a_picture_is_upright_as_its_exif_says(number, kind, mode, tmp_path):
    picture = Image.fromarray(DEEP) if mode == "I;16" else sample("RGBA").convert(mode)
    plain = write(tmp_path, "plain", saved(picture, kind))
    turned = write(tmp_path, "turned", saved(picture, kind, exif=orientation(number)))
    assert np.array_equal(pixels(read(turned)), UPRIGHT[number](pixels(read(plain))))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_photograph_is_upright(kind, tmp_path):
    turned = write(tmp_path, "turned", saved(sample("RGB"), kind, exif=orientation(6)))
    assert np.array_equal(pixels(read(turned)), np.rot90(pixels(default_loader(turned)), -1))


def test_a_picture_is_good_whatever_is_the_matter_with_its_metadata(tmp_path):
    plain = write(tmp_path, "plain.jpg", saved(sample("RGB"), "JPEG"))
    for exif in (b"Exif\0\0no exif at all", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        file = write(tmp_path, "odd.jpg", saved(sample("RGB"), "JPEG", exif=exif))
        assert np.array_equal(pixels(read(file)), pixels(read(plain)))
        assert fault(file) is None


def test_long_tail_writes_the_very_pixels_that_training_sees_and_no_metadata(tmp_path):
    known = PICTURES | {name: content[:2] for name, content in NEAR.items()}
    known["turned.jpg"] = (saved(sample("RGB"), "JPEG", exif=orientation(6)), None)
    known["turned.tif"] = (saved(Image.fromarray(DEEP), "TIFF", exif=orientation(7)), None)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    known["profile.png"] = (saved(sample("RGB"), "PNG", icc_profile=profile), None)
    for part in ("train", "val"):
        for name, (content, _) in known.items():
            for folder in ("a", "b"):
                write(tmp_path / "data" / part / folder, name, content)
    out = tmp_path / "out"
    assert dystress("long-tail", {"data": tmp_path / "data", "long_tail": 1, "out": out}) == 0
    originals = sorted((tmp_path / "data" / "train").glob("*/*"))
    copies = sorted((out / "train").glob("*/*"))
    assert len(copies) == len(originals) == 2 * len(known)
    for original, copy in zip(originals, copies, strict=True):
        with Image.open(copy) as picture:
            assert np.array_equal(pixels(picture), pixels(read(str(original))))
            assert picture.info == {}
            assert dict(picture.getexif()) == {}


def deep_folder(folder, generator, kind="deep", classes=2, per_class=8):
    """Class folders of pictures of 16 bits, or of what they should be in 8."""
    for label in range(classes):
        for number in range(per_class):
            values = generator.integers(0, 20000, (12, 12)).astype(np.uint16) + 20000 * label
            content = png(values, 16, 0) if kind == "deep" else saved(Image.fromarray(scaled(values, 65535)), "PNG")
            write(folder / f"class{label}", f"{number}.png", content)
    return folder


def test_sixteen_bits_are_trained_on_and_inspected_as_their_eight(tiny, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(inspection.figures, "draw", lambda *args: None)
    seen = {}
    for kind in ("deep", "flat"):
        data = deep_folder(tmp_path / kind, np.random.default_rng(0), kind)
        out = tmp_path / f"{kind}-run"
        assert dystress("pretrain", tiny | {"data": data, "out": out, "epochs": 1}) == 0
        assert dystress("inspect", {"checkpoint": out, "methods": "[]"}) == 0
        weights = torch.load(out / "backbone.pt", weights_only=True)
        similarities = json.loads((out / "inspect" / "inspect.json").read_text())["similarities"]
        seen[kind] = (weights, similarities, (out / "metrics.csv").read_text())
    assert seen["deep"][1:] == seen["flat"][1:]
    assert all(torch.equal(seen["deep"][0][name], value) for name, value in seen["flat"][0].items())


def test_what_has_no_known_range_stops_before_training_or_is_skipped(tiny, images, capsys, quick):
    for name, (content, *_) in REFUSED.items():
        write(images / "class0", name, content)
    assert dystress("pretrain", tiny) == 2
    said = capsys.readouterr().err
    assert f"{len(REFUSED)} of {24 + len(REFUSED)} files in {images} cannot be used" in said
    listed = json.loads(Path(tiny["out"], "images.json").read_text())
    assert set(listed["bad"]) == {f"class0/{name}" for name in REFUSED}
    assert "its values (mode F) go from 0 to 1" in listed["bad"]["class0/float.tif"]
    assert dystress("pretrain", tiny | {"epochs": 1, "on_bad_image": "skip"}) == 0
    assert dystress("evaluate", {"checkpoint": tiny["out"], "accelerator": "cpu"}) == 0


def test_other_commands_name_such_a_picture_in_one_line(tiny, images, tmp_path, capsys, quick):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    bad = write(images / "class1", "9.tif", REFUSED["float.tif"][0])
    capsys.readouterr()
    for command, settings in {
        "evaluate": {"checkpoint": tiny["out"], "accelerator": "cpu", "num_workers": 1},  # not with its traceback
        "inspect": {"checkpoint": tiny["out"], "images": 19},
        "long-tail": {"data": images, "long_tail": 1, "out": tmp_path / "tail"},
    }.items():
        assert dystress(command, settings) == 2
        *_, said = capsys.readouterr().err.splitlines()
        assert said.startswith(f"dystress: {bad} cannot be read as an image: its values (mode F) go from 0 to 1"), said
    assert not (tmp_path / "tail").exists()


def test_the_scan_and_the_reading_are_one(tmp_path):
    """What the scan calls good can be read, and what it calls bad cannot."""
    everything = {name: kind[0] for name, kind in (PICTURES | NEAR | REFUSED).items()}
    everything |= {"empty.png": b"", "letter.png": b"dear reader", "cut.png": PICTURES["16.png"][0][:-40]}
    for name, content in everything.items():
        write(tmp_path / "data" / "class", name, content)
    scan = scan_folder(str(tmp_path / "data"), tmp_path / "out", on_bad_image="skip", num_workers=0, progress=False)
    for name in everything:
        file = str(tmp_path / "data" / "class" / name)
        if f"class/{name}" in scan.bad:
            with pytest.raises(BadPicture, match="cannot be read as an image"):
                read(file)
        else:
            assert pictures.decode(file).mode == "RGB"
    assert set(scan.bad) == {f"class/{name}" for name in (*REFUSED, "empty.png", "letter.png", "cut.png")}
