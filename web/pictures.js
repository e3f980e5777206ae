// From what a user gives to the network's pixels, RGB bytes: pictures as in training, drawings as shapes.

/** A picture's RGBA (ImageData, opaque) -> size * size * 3: its shorter side made `resize` pixels, bilinear, and
 * the centre cut out. What packed/picture.py does, to the rounding of a byte. */
function centralSquare({ data, width, height }, resize, size) {
  const longer = Math.floor((resize * Math.max(width, height)) / Math.min(width, height));
  const [w, h] = width >= height ? [longer, resize] : [resize, longer];
  const columns = windows(width, w).slice(middle(w - size), middle(w - size) + size);
  const rows = windows(height, h).slice(middle(h - size), middle(h - size) + size);
  const narrow = new Uint8ClampedArray(height * size * 3);
  for (let y = 0; y < height; y++)
    columns.forEach(({ start, weights }, x) => {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * data[4 * (y * width + start + i) + c];
        narrow[3 * (y * size + x) + c] = sum;
      }
    });
  const pixels = new Uint8ClampedArray(size * size * 3);
  rows.forEach(({ start, weights }, y) => {
    for (let i = 0; i < 3 * size; i++) {
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += weights[j] * narrow[3 * size * (start + j) + i];
      pixels[3 * size * y + i] = sum;
    }
  });
  return pixels;
}

/** Half of n, a half rounded to even as Python does. */
const middle = (n) => (n % 2 ? 2 * Math.round(n / 4) : n / 2);

/** What each of `to` pixels takes of `from` pixels in a row: Pillow's bilinear filter, widened where it shrinks. */
function windows(from, to) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(from, Math.trunc(centre + reach + 0.5));
    const weights = [];
    for (let x = start; x < end; x++) weights.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) / reach)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

const RASTER = 256; // pixels of the drawing that is filled
const PART = 0.62; // of the picture's side that a drawing takes, as the shapes of the training set do
const THIN = 0.04; // width of a line around a filled shape, and
const THICK = 0.43; // of lines that enclose nothing, both as a part of the drawing's longer side
const GROUND = [66, 72, 84];
const PAINT = [178, 168, 150];

/** Strokes, lists of points [x, y], -> size * size * 3: centred, of one size, painted lighter than its ground.
 *
 * What lines enclose is filled, and a line within a filled part cuts a hole; lines that enclose nothing are
 * painted thick. A stroke that ends near where it began is closed. */
function drawnSquare(strokes, resize, size) {
  const points = strokes.flat();
  const [left, top] = [0, 1].map((i) => Math.min(...points.map((point) => point[i])));
  const [right, bottom] = [0, 1].map((i) => Math.max(...points.map((point) => point[i])));
  const extent = Math.max(right - left, bottom - top, 1e-3);

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = RASTER;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (width) => {
    const scale = (RASTER * PART) / (extent * (1 + width));
    context.setTransform(scale, 0, 0, scale, (RASTER - (left + right) * scale) / 2, (RASTER - (top + bottom) * scale) / 2);
    context.lineWidth = width * extent;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of strokes) trace(context, closed(stroke));
    const { data } = context.getImageData(0, 0, RASTER, RASTER);
    return Uint8Array.from({ length: RASTER ** 2 }, (_, p) => Number(data[4 * p + 3] > 127));
  };
  let shape = filled(paint(THIN), RASTER);
  if (!shape) shape = paint(THICK);

  const image = new ImageData(RASTER, RASTER);
  for (let p = 0; p < shape.length; p++) image.data.set(shape[p] ? PAINT : GROUND, 4 * p);
  return centralSquare(image, size, size);
}

/** The stroke, with its first point once more at its end where that is near. */
function closed(stroke) {
  const spans = [0, 1].map((i) => Math.max(...stroke.map((p) => p[i])) - Math.min(...stroke.map((p) => p[i])));
  const [first, last] = [stroke[0], stroke[stroke.length - 1]];
  const gap = Math.hypot(first[0] - last[0], first[1] - last[1]);
  return gap < 0.25 * Math.min(...spans) ? [...stroke, first] : stroke;
}

function trace(context, stroke) {
  context.beginPath();
  context.moveTo(...stroke[0]);
  for (const point of stroke.length > 1 ? stroke : [...stroke, ...stroke]) context.lineTo(...point);
  context.stroke();
}

/** Lines (1 where there is ink) -> the shape that they outline, or null where they enclose nothing.
 *
 * From the border inwards, ground and lines take turns: the first ground is outside, what the first lines
 * enclose is inside, what lines in there enclose is outside again. */
function filled(ink, side) {
  const depth = new Int8Array(ink.length).fill(-1);
  const neighbours = (p) => {
    const x = p % side;
    return [x > 0 ? p - 1 : p, x < side - 1 ? p + 1 : p, p - side, p + side];
  };
  let front = [0]; // a corner, which no line reaches
  let level = 0;
  for (; front.length; level++) {
    const wanted = level % 2;
    const queue = front.filter((p) => depth[p] < 0 && ink[p] === wanted);
    front = [];
    for (const p of queue) depth[p] = level;
    while (queue.length)
      for (const q of neighbours(queue.pop())) {
        if (!(q in depth) || depth[q] >= 0) continue;
        if (ink[q] !== wanted) front.push(q);
        else {
          depth[q] = level;
          queue.push(q);
        }
      }
  }
  if (level <= 2 || !depth.includes(2)) return null;
  return depth.map((d) => Number(d % 4 === 1 || d % 4 === 2)); // a line and what it encloses, and so on
}
