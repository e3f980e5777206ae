"""Images of more than 8 bits a channel: who says what is white, and that training and use agree."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from support.scripts import TINY_STAGE

import infer
from images.loaders import imagenet_loaders
from images.sets import ImageSet, channel_statistics, load_set
from packed import load
from packed.exchange import metadata
from packed.picture import eight_bits, read_rgb
from run.checkpoint import load_checkpoint
from utils import InputError

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
GREY = np.floor(256 * RAMP).clip(0, 255).astype(np.uint8)  # what a ramp from black to white becomes


def ramp(highest: float, dtype: type) -> np.ndarray:
    return (RAMP * highest).astype(dtype)


def tiff(path, values: np.ndarray, **tags: float):
    numbers = {"bits": 258, "min": 280, "max": 281, "smin": 340, "smax": 341}
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info.tagtype[numbers[name]] = 12 if name.startswith("s") else 3  # double, or short
        info[numbers[name]] = value
    Image.fromarray(values).save(path, tiffinfo=info)
    return path


def png16(path, values: np.ndarray, bits: int | None = None, colour: int = 0):
    """A PNG of 16 bits, grey (colour 0) or RGB (2), with sBIT where `bits` is given."""
    channels = {0: 1, 2: 3}[colour]

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = np.repeat(values[:, :, None], channels, 2).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    if bits:
        parts.insert(1, chunk(b"sBIT", bytes([bits] * channels)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def assert_grey(pixels: np.ndarray, most: int = 1) -> None:
    """It is the ramp, to `most` levels."""
    assert pixels.shape == (8, 8, 3) and (pixels == pixels[:, :, :1]).all()
    assert np.abs(pixels[:, :, 0].astype(int) - GREY).max() <= most


def test_the_steps_are_even_and_those_of_bits_keep_the_upper_ones():
    every = np.arange(65536, dtype=np.uint16)
    assert (eight_bits(every, (0, 65535)) == every >> 8).all()
    assert (eight_bits(every[:4096], (0, 4095)) == every[:4096] >> 4).all()
    assert (eight_bits(every[:256], (0, 255)) == every[:256]).all()
    levels = np.arange(256)
    assert (eight_bits((levels / 255).astype(np.float32), (0, 1)) == levels).all()
    odd = np.array([np.nan, -np.inf, np.inf, -1, 2], np.float32)
    assert eight_bits(odd, (0, 1)).tolist() == [0, 0, 255, 0, 255]
    assert eight_bits(np.array([-1000, 3000], np.int32), (-1000, 3000)).tolist() == [0, 255]


def test_the_files_own_word_decides(tmp_path):
    twelve, floats = ramp(4095, np.uint16), ramp(1, np.float32)
    assert_grey(read_rgb(tiff(tmp_path / "a.tif", twelve, max=4095)))
    assert_grey(read_rgb(tiff(tmp_path / "b.tif", twelve, smin=0.0, smax=4095.0, max=65535)))
    assert_grey(read_rgb(tiff(tmp_path / "c.tif", floats, smin=0.0, smax=1.0)))
    assert_grey(read_rgb(tiff(tmp_path / "d.tif", floats * 5 - 2, smin=-2.0, smax=3.0)))
    assert_grey(read_rgb(tiff(tmp_path / "e.tif", ramp(70_000, np.int32), smax=70_000.0)))
    assert_grey(read_rgb(png16(tmp_path / "f.png", twelve, bits=12)))  # lower bits, against the standard
    assert_grey(read_rgb(png16(tmp_path / "g.png", twelve << 4, bits=12)))
    assert_grey(read_rgb(png16(tmp_path / "h.png", twelve << 4 | twelve >> 8, bits=12)))
    assert_grey(read_rgb(png16(tmp_path / "i.png", ramp(65535, np.uint16))))  # needs all 16
    (tmp_path / "j.pgm").write_bytes(b"P5 8 8 4095\n" + twelve.astype(">u2").tobytes())
    assert_grey(read_rgb(tmp_path / "j.pgm"))
    dark = twelve // 16 << 4  # of 12 bits, the lower 8 used
    assert read_rgb(png16(tmp_path / "k.png", dark, bits=12)).max() == 15


def test_bits_of_a_sample_below_16_decide(tmp_path):
    """Pillow reads a TIFF of 12 bits a sample, and writes none: two pixels in three bytes."""
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
        for a, b in ramp(4095, np.uint16).reshape(-1, 2).tolist()
    )
    tags = [
        (256, 3, 8),
        (257, 3, 8),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 8),
    ]
    tags.append((279, 4, len(packed)))
    directory = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", t, kind, 1, v) for t, kind, v in tags
    )
    start = 8 + len(packed)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", start) + packed + directory + b"\0" * 4)
    assert_grey(read_rgb(tmp_path / "a.tif"))


UNKNOWN = {
    "12 bits of 16": (
        lambda path: png16(path, ramp(4095, np.uint16)),
        r"mode I.*, values 0 to 4095",
        "0 4095",
    ),
    "8 bits of 16": (lambda path: tiff(path, ramp(255, np.uint16)), "mode I;16, values 0 to 255", "0 255"),
    "32 bits": (lambda path: tiff(path, ramp(70_000, np.int32)), "mode I, values 0 to 70000", "0 131071"),
    "floats": (lambda path: tiff(path, ramp(0.5, np.float32)), "mode F, values 0 to 0.5", "0 1"),
    "below 0": (lambda path: tiff(path, ramp(4000, np.int32) - 1000), "values -1000 to 3000", "-1000 3000"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_else_an_error_names_the_flag_which_is_then_obeyed(tmp_path, kind):
    write, words, guess = UNKNOWN[kind]
    path = write(tmp_path / ("a.png" if kind == "12 bits of 16" else "a.tif"))
    with pytest.raises(ValueError, match=rf"{words}, .* give --value_range LOW HIGH, perhaps {guess}$"):
        read_rgb(path)
    low, high = map(float, guess.split())
    assert read_rgb(path, value_range=(low, high)).max() > 120
    if kind in ("12 bits of 16", "8 bits of 16", "below 0"):
        assert_grey(read_rgb(path, value_range=(low, high)), most=2 if kind == "8 bits of 16" else 1)


def test_colours_of_16_bits_that_would_become_black_are_refused(tmp_path):
    assert_grey(read_rgb(png16(tmp_path / "a.png", ramp(65535, np.uint16), colour=2)))
    dark = png16(tmp_path / "b.png", ramp(4095, np.uint16), colour=2)
    with pytest.raises(ValueError, match="16 bits a colour, values to 4095 at most: convert it to 8 bits"):
        read_rgb(dark)
    assert read_rgb(dark, value_range=(0, 65535)).max() == 15
    with pytest.raises(ValueError, match="of which the upper 8 are read"):
        read_rgb(dark, value_range=(0, 4095))


def test_pictures_of_8_bits_do_not_feel_the_flag(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert_grey(read_rgb(tmp_path / "a.png", value_range=(0, 4095)), most=0)


@pytest.fixture
def twelve_bits(tmp_path):
    """A set of two classes, 16 x 16, 12 bits in 16, which do not say so."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                values = rng.integers(0, 2048, (16, 16)) + 2047 * label
                Image.fromarray(values.astype(np.uint16)).save(tmp_path / "set" / split / name / f"{i}.png")
    return tmp_path / "set"


def test_what_training_read_is_kept_for_all_that_reads_later(
    scripts, twelve_bits, monkeypatch, without_pictures
):
    flags = ["--set", "folder", "--data", twelve_bits, "--image_size", 16, "--workers", 0, *TINY_STAGE]
    flags += ["--epochs", 1, "--binary", "--from_scratch"]
    error = scripts.run("train.py", *flags, code=2).stderr
    assert "cannot read 80 images: " in error and "--value_range LOW HIGH, perhaps 0 2047" in error
    assert "replace or remove" not in error
    flags += ["--value_range", 0, 4095]
    scripts.run("train.py", *flags)
    (run,) = scripts.runs("eval-*")
    kept = load_checkpoint(run)["data"]
    assert kept["value_range"] == [0, 4095] and 0.4 < kept["mean"][0] < 0.6
    scripts.run("evaluate.py", run, "--packed")
    scripts.run("export.py", run)
    net = load(run / "model.ebnas")
    assert net.program.value_range == (0, 4095) and metadata(net.program)["value_range"] == (0, 4095)
    path = twelve_bits / "test" / "light" / "0.png"
    seen = []
    monkeypatch.setattr(
        infer, "probabilities", lambda net, pictures: (seen.append(pictures), np.zeros((1, 2)))[1]
    )
    list(infer.classify(net, [path]))
    expected = load_set("folder", twelve_bits, train=False, image_size=16, value_range=(0, 4095)).images[6]
    assert (seen[0][0].transpose(2, 0, 1) == expected.numpy()).all() and expected.min() > 120
    scripts.run("train.py", "--resume", run, code=2)  # finished: and its flags are read without an error


def test_another_range_is_another_configuration(scripts, twelve_bits, without_pictures):
    flags = ["--set", "folder", "--data", twelve_bits, "--image_size", 16, "--workers", 0, *TINY_STAGE]
    scripts.run("train.py", *flags, "--epochs", 1, "--value_range", 0, 4095)
    line = scripts.run("train.py", *flags, "--value_range", 0, 8191, "--binary", code=2).stderr
    assert "no finished stage-1 run" in line
    line = scripts.run("train.py", *flags, "--value_range", 9, 9, code=2).stderr
    assert line == "error: --value_range 9 9: the second must be the larger\n"


def test_a_training_set_without_spread_is_refused(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (9, 8, 7)).save(tmp_path / split / name / "1.png")
    train_set = load_set("folder", tmp_path, train=True, image_size=16, workers=0)
    with pytest.raises(InputError, match=r"all 2 images to train on have the one colour \(9, 8, 7\)"):
        channel_statistics("folder", train_set)
    with pytest.raises(InputError, match=r"have the one colour \(9, 8, 7\)"):
        imagenet_loaders(tmp_path, 2, device="cpu", workers=0, seed=0, image_size=16)
    half = torch.cat(
        [train_set.images, train_set.images + torch.tensor([1, 0, 0], dtype=torch.uint8)[:, None, None]]
    )
    channel_statistics("folder", ImageSet(half, torch.zeros(4, dtype=torch.int64), ("a", "b")))
