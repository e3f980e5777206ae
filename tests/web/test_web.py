"""The page, in a real browser: that it computes what packed/ does, and what a user sees and does."""

import dataclasses
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.packed_programs import SEVEN, data_entry, network, spread
from support.scripts import ROOT
from support.snippets import expected_logits, photograph, snippet

import web
from images.shapes import draw_shapes
from model import build_model
from networks.lowering import lower
from networks.registry import make_config
from packed import PackedNetwork, load, program_bytes
from packed.picture import central_square, read_rgb

SHAPES = ROOT / "models" / "shapes.ebnas"
CLANG = "14"  # the kernel was compiled with it
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --use-fake-device-for-media-stream "
    "--use-fake-ui-for-media-stream"
).split()
DESK, PHONE = {"width": 1100, "height": 760}, {"width": 390, "height": 844}


def test_the_kernel_is_what_its_source_gives(tmp_path):
    for tool in ("clang", "wasm-ld"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    version = subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout
    major = re.search(r"version (\d+)", version)[1]
    if major != CLANG:
        pytest.skip(f"clang {major} may give other bytes than clang {CLANG}")
    kernel = tmp_path / "kernel.wasm"
    subprocess.run(["make", "-s", "wasm", f"WASM={kernel}"], cwd=ROOT, check=True)
    assert kernel.read_bytes() == web.KERNEL.read_bytes(), "run `make wasm`, and commit its file"


def test_the_demo_is_the_page_of_the_shipped_network():
    demo = (ROOT / "docs" / "demo" / "index.html").read_bytes()
    command = "python export.py models/shapes.ebnas --web docs/demo"
    assert demo == web.page(SHAPES.read_bytes()), f"run `{command}`, and commit its file"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (executable := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip(f"no browser ({', '.join(names)}) is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """`visit(network's bytes, viewport)`: its page, from a file, without errors or requests."""
    tabs, faults = [], []

    def visit(content: bytes, viewport: dict = DESK):
        file = tmp_path / "index.html"
        file.write_bytes(web.page(content))
        tab = browser.new_page(viewport=viewport)
        tabs.append(tab)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: message.type != "error" or faults.append(message.text))
        tab.on("request", lambda request: request.url.startswith("file:") or faults.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("#bars li, #message:visible")
        return tab

    yield visit
    for tab in tabs:
        tab.close()
    assert not faults


def deep_network() -> bytes:
    """All operations, odd sizes, filters in numbers that no block size divides."""
    model = network(genotype=SEVEN, init_channels=6, groups=3, layers=4)
    return program_bytes(lower(model, data_entry(10, image_size=37)))


def row(arch: str) -> bytes:
    """Of another row of the tables: shuffles, or float convolutions of blocks."""
    model = spread(build_model(make_config(arch, init_channels=12, layers=3)))
    return program_bytes(lower(model, data_entry(10, image_size=36)))


@pytest.mark.parametrize("name", ["shapes", "deep", "BATS", "BNAS-A"])
def test_logits_are_those_of_packed_to_the_bit(name, visit, tmp_path):
    """Of plain C: AVX2 and AVX-512 round a product and a sum at once, which WebAssembly cannot."""
    content = {"shapes": SHAPES.read_bytes, "deep": deep_network}.get(name, lambda: row(name))()
    file = tmp_path / "network.ebnas"
    file.write_bytes(content)
    net = load(file, kernel="c")
    pictures = draw_shapes(100, net.image_size, seed=3)[0].transpose(0, 2, 3, 1)
    tab = visit(content)
    script = "(pictures) => pictures.map((pixels) => Array.from(network.run(Uint8Array.from(pixels))))"
    logits = np.float32(tab.evaluate(script, pictures.reshape(100, -1).tolist()))
    np.testing.assert_array_equal(logits, net(net.preprocess(pictures)))


def polygon(*corners: tuple[float, float]) -> list[tuple[float, float]]:
    return [*corners, corners[0]]


def around(n: int, *radii: float) -> list[tuple[float, float]]:
    """A closed line of n points about the centre, their radii taken from `radii` in turn."""
    angles = 2 * np.pi * np.arange(n) / n
    ends = [(radii[i % len(radii)], angle) for i, angle in enumerate(angles)]
    return polygon(*((0.5 + r * np.sin(a), 0.5 - r * np.cos(a)) for r, a in ends))


def heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 40)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(0.5 + 16 * np.sin(t) ** 3 / 40, 0.45 - y / 40, strict=True))


DRAWINGS = {
    "star": [around(10, 0.4, 0.17)],
    "heart": [heart()],
    "ring": [around(24, 0.4), around(24, 0.22)],
    "disc": [around(24, 0.3)],
    "frame": [
        polygon((0.1, 0.1), (0.9, 0.12), (0.9, 0.9), (0.1, 0.88)),
        polygon((0.28, 0.28), (0.72, 0.29), (0.72, 0.71), (0.28, 0.7)),
    ],
    "square": [polygon((0.2, 0.2), (0.8, 0.22), (0.79, 0.8), (0.2, 0.8))],
    "triangle": [polygon((0.5, 0.15), (0.85, 0.8), (0.15, 0.8))],
    "bar": [[(0.2, 0.5), (0.5, 0.47), (0.8, 0.45)]],
    "cross": [[(0.5, 0.2), (0.5, 0.8)], [(0.2, 0.5), (0.8, 0.5)]],
}


def draw(tab, strokes) -> str:
    """Draw with the mouse; the class that the page then names."""
    tab.click("#clear")
    box = tab.locator("#canvas").bounding_box()
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=2)
            if i == 0:
                tab.mouse.down()
        tab.mouse.up()
    tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return tab.inner_text("#answer").split("\n")[0]


def test_drawings_are_called_what_they_are(visit):
    tab = visit(SHAPES.read_bytes())
    assert tab.inner_text("h1") == "Draw a star, a heart, a ring"
    named = {name: draw(tab, strokes) for name, strokes in DRAWINGS.items()}
    assert named == {name: name for name in DRAWINGS}
    assert re.fullmatch(r"[\d.]+ ms", tab.inner_text("#time"))
    assert tab.inner_text("#bytes") == f"{SHAPES.stat().st_size / 1000:.0f} kB"
    tab.click("#clear")
    assert tab.inner_text("#answer") == ""


def test_a_picture_is_seen_as_infer_sees_it(visit, tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((91, 60))
    tab, net = visit(SHAPES.read_bytes()), load(SHAPES, kernel="c")
    for name, picture in (
        ("wide", smooth),
        ("tall", smooth.resize((20, 47))),
        ("small", smooth.resize((9, 9))),
    ):
        file = tmp_path / f"{name}.png"
        picture.save(file)
        tab.evaluate("document.getElementById('answer').textContent = ''")
        tab.set_input_files("#file", file)
        tab.wait_for_selector("#answer:not(:empty)")
        seen = "document.getElementById('seen').getContext('2d').getImageData(0, 0, 32, 32).data"
        pixels = np.array(tab.evaluate(f"Array.from({seen})"), np.uint8).reshape(32, 32, 4)[..., :3]
        expected = central_square(read_rgb(file), resize=32, size=32)
        assert np.abs(pixels.astype(int) - expected).max() <= 1
        assert tab.inner_text("#answer").split("\n")[0] == best_class(net, pixels)


def test_a_picture_of_16_bits_is_read_by_its_upper_8_or_refused(visit, tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    program = load(SHAPES, kernel="c").program
    twelve = program_bytes(dataclasses.replace(program, value_range=(0.0, 4095.0)))
    for content, highest, refused in (
        (SHAPES.read_bytes(), 1.0, False),
        (SHAPES.read_bytes(), 1 / 16, True),
        (twelve, 1.0, True),
    ):
        tab = visit(content)
        Image.fromarray((ramp * highest).astype(np.uint16)).save(tmp_path / "deep.png")
        tab.set_input_files("#file", tmp_path / "deep.png")
        tab.wait_for_selector("#message:text('16 bits a channel')" if refused else "#answer:not(:empty)")
        assert bool(tab.inner_text("#answer")) != refused


def test_the_snippet_for_a_page_of_your_own(visit, tmp_path):
    image = photograph(tmp_path)
    tab = visit(SHAPES.read_bytes())
    given = (
        "const bytes = bytesOf(NETWORK), kernel = bytesOf(KERNEL), file = new Blob([Uint8Array.from(photo)]);"
    )
    code = snippet("deploy.md", "centralSquare")
    photo = list((tmp_path / "photo.png").read_bytes())
    logits = tab.evaluate(f"async (photo) => {{ {given} {code} return Array.from(logits); }}", photo)
    assert np.argmax(logits) == expected_logits(image).argmax()
    refusal = (
        "() => { try { network.run(new Uint8Array(48 * 48 * 3)); } catch (error) { return error.message; } }"
    )
    assert tab.evaluate(refusal) == "The network takes 32 x 32 pixels of RGB."


def test_the_camera_is_classified_until_it_is_stopped(visit):
    tab = visit(SHAPES.read_bytes())
    tab.click("#camera")
    tab.wait_for_selector("#answer:not(:empty)")
    assert tab.get_attribute("#camera", "aria-pressed") == "true"
    tab.click("#camera")
    assert tab.evaluate("stream") is None and tab.inner_text("#answer") == ""


def best_class(net: PackedNetwork, pixels: np.ndarray) -> str:
    return net.classes[net(net.preprocess(pixels[None]))[0].argmax()]


def test_a_broken_file_is_answered_with_a_sentence(visit, tmp_path):
    content = SHAPES.read_bytes()
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    tab = visit(content)
    for bytes_, sentence in (
        (damaged, "This model file is damaged: its checksum does not fit. Copy it again."),
        (content[:1000], "This is not a packed network: export.py writes those, as .ebnas files."),
        (b"", "This is not a packed network: export.py writes those, as .ebnas files."),
    ):
        (tmp_path / "broken.ebnas").write_bytes(bytes_)
        tab.set_input_files("#file", tmp_path / "broken.ebnas")
        tab.wait_for_selector(f"#message:text-is('{sentence}')")
        assert draw(tab, DRAWINGS["star"]) == "star"  # by the network of before
    (tmp_path / "text.png").write_text("no picture")
    tab.set_input_files("#file", tmp_path / "text.png")
    tab.wait_for_selector("#message:text('text.png is not a picture')")
    assert visit(damaged).inner_text("#message").startswith("This model file is damaged")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything(visit, scheme):
    tab = visit(SHAPES.read_bytes(), PHONE)
    tab.emulate_media(color_scheme=scheme)
    assert draw(tab, DRAWINGS["star"]) == "star"
    parts = tab.locator("h1, #board, button, #seen, #answer, #bars li, #facts dd")
    for box in (part.bounding_box() for part in parts.all()):
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        assert box["y"] >= 0 and box["y"] + box["height"] <= PHONE["height"]
    assert parts.count() == 1 + 1 + 4 + 1 + 1 + 10 + 3
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
