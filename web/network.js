// A packed network (.ebnas) in the browser: binary_cpu.c as WebAssembly, on memory laid out as in packed/kernel.py.

const OPS = ["binary", "float", "pool", "linear"];
const INTEGERS = [
  "op", "source", "target", "residual", "scratch",
  "channels_in", "channels_out", "groups", "kernel", "stride", "padding",
  "height_in", "width_in", "height_out", "width_out",
  "add", "average", "relu", "chunks", "terms", "slack",
]; // of `struct step`, 8 bytes each; then come its pointers, 4 bytes each
const POINTERS = ["term", "masks", "valid", "threshold", "bits", "weight", "scale", "bias", "slope"];
const STEP_BYTES = 8 * (INTEGERS.length + Math.ceil(POINTERS.length / 2));

const padded = (n) => Math.ceil(n / 64) * 64;
const modulo = (a, n) => ((a % n) + n) % n;
const product = (shape) => shape.reduce((a, b) => a * b, 1);

// ---------------------------------------------------------------------------------------------- the file

const SEAL = String.raw`{\"format\":\"ebnas packed network 2\",\"sha256\":\"`; // the checksum follows it

/** {network, tensors} of a file's bytes. Throws an Error whose message is a sentence for the page. */
function parseFile(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length > 8 ? view.getUint32(0, true) + 2 ** 32 * view.getUint32(4, true) : Infinity;
  const text = length < bytes.length ? new TextDecoder("latin1").decode(bytes.subarray(8, 8 + length)) : "";
  const seal = text.indexOf(SEAL);
  if (seal < 0) throw new Error("This is not a packed network: export.py writes those, as .ebnas files.");
  const start = 8 + seal + SEAL.length;
  const sealed = new Uint8Array(bytes.length - 64);
  sealed.set(bytes.subarray(0, start));
  sealed.set(bytes.subarray(start + 64), start);
  const digest = text.substr(seal + SEAL.length, 64);
  if (sha256(sealed) !== digest) throw new Error("This model file is damaged: its checksum does not fit. Copy it again.");

  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const network = JSON.parse(header.__metadata__.network);
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const content = bytes.slice(8 + length + from, 8 + length + to); // a copy, hence aligned
    const data = dtype === "U8" ? content : new Float32Array(content.buffer);
    tensors[name] = { shape, data };
  }
  const view3 = (v) => v && { buffer: v[0], first: v[1], channels: v[2] };
  network.steps = network.steps.map((step, i) => {
    const own = Object.entries(tensors).filter(([name]) => name.startsWith(`${i}.`));
    return {
      ...step,
      source: view3(step.source),
      target: view3(step.target),
      residual: view3(step.residual),
      tensors: Object.fromEntries(own.map(([name, tensor]) => [name.slice(`${i}.`.length), tensor])),
    };
  });
  return network;
}

/** SHA-256 in hexadecimal (FIPS 180-4). Browsers have it for pages from https alone. */
function sha256(bytes) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
  const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32) | 0;
  const k = primes.map((p) => fraction(Math.cbrt(p)));
  const hash = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
  const message = new Uint8Array(padded(bytes.length + 9));
  message.set(bytes);
  message[bytes.length] = 0x80;
  const view = new DataView(message.buffer);
  view.setUint32(message.length - 8, Math.floor(bytes.length / 2 ** 29));
  view.setUint32(message.length - 4, bytes.length << 3);
  const rotate = (x, n) => (x >>> n) | (x << (32 - n));
  const w = new Int32Array(64);
  for (let block = 0; block < message.length; block += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(block + 4 * i);
    for (let i = 16; i < 64; i++) {
      const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
      const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + k[i] + w[i]) | 0;
      const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => (hash[i] = (hash[i] + value) | 0));
  }
  return hash.map((x) => (x >>> 0).toString(16).padStart(8, "0")).join("");
}

// --------------------------------------------------------------------------------------------- the network

class PackedNetwork {
  /** From the bytes of an .ebnas file and of kernel.wasm. Rejects with a sentence. */
  static async load(bytes, kernel) {
    const network = parseFile(bytes);
    const channels = network.mean.length;
    if (channels !== 3) throw new Error(`This network is of images with ${channels} channels; pictures have 3.`);
    let instance;
    try {
      ({ instance } = await WebAssembly.instantiate(kernel));
    } catch {
      throw new Error("This browser is too old: it has no WebAssembly with SIMD.");
    }
    return new PackedNetwork(network, bytes.length, instance.exports);
  }

  constructor(network, bytes, kernel) {
    this.kernel = kernel;
    this.path = kernel.best_path();
    this.end = kernel.__heap_base.value;
    this.bytes = bytes;
    this.classes = network.classes;
    this.size = network.image_size;
    this.resize = network.resize;
    this.valueRange = network.value_range ?? null; // black and white of pictures of more than 8 bits
    this.mean = Float32Array.from(network.mean);
    this.std = Float32Array.from(network.std);
    this.floatBytes = 4 * floats(network.steps);
    this.lay(network);
  }

  /** Logits of one picture: RGB bytes, size * size * 3, as `centralSquare` gives them. */
  run(pixels) {
    const area = this.size ** 2;
    if (pixels.length !== 3 * area) throw new Error(`The network takes ${this.size} x ${this.size} pixels of RGB.`);
    const image = new Float32Array(this.kernel.memory.buffer, this.image, 3 * area);
    const { fround } = Math;
    for (let c = 0; c < 3; c++)
      for (let p = 0; p < area; p++) {
        const scaled = fround(fround(pixels[3 * p + c] / 255) - this.mean[c]);
        image[c * area + p] = fround(scaled / this.std[c]);
      }
    const [cSteps, one, channels] = [BigInt(this.steps), 1n, 3n];
    this.kernel.run_network(this.path, this.cSteps, cSteps, this.arena, this.image, one, channels, BigInt(area), this.logits);
    return new Float32Array(this.kernel.memory.buffer, this.logits, this.classes.length).slice();
  }

  /** Address of that many bytes of memory, at a multiple of 64. */
  allocate(bytes) {
    const address = padded(this.end);
    this.end = address + bytes;
    const { memory } = this.kernel;
    const missing = Math.ceil((this.end - memory.buffer.byteLength) / 65536);
    if (missing > 0) memory.grow(missing);
    return address;
  }

  /** Address of a copy of a typed array. */
  copy(array) {
    const address = this.allocate(array.byteLength);
    new array.constructor(this.kernel.memory.buffer, address, array.length).set(array);
    return address;
  }

  /** Put steps, constants, weights and the arena into memory: Plan of packed/kernel.py, for one image size. */
  lay({ buffers, steps }) {
    const sizes = buffers.map(([, level]) => Math.ceil(this.size / 2 ** level));
    const planes = sizes.map((size) => padded(size * size));
    const [offsets, scratch] = place(buffers, steps, planes);
    const address = (view) => offsets[view.buffer] + view.first * planes[view.buffer];
    const made = {}; // constants by what they are made of
    const constant = (make, ...arguments_) => {
      const copies = (arrays) => mapValues(arrays, (array) => this.copy(array));
      return (made[[make.name, ...arguments_]] ??= copies(make(...arguments_)));
    };

    let largest = 0;
    const cSteps = steps.flatMap((step) => {
      const cStep = { op: OPS.indexOf(step.op), source: address(step.source), channels_in: step.source.channels, scratch };
      cStep.height_in = cStep.width_in = sizes[step.source.buffer];
      const plane = planes[step.source.buffer];
      Object.assign(cStep, this.weights(step));
      let needs = padded(cStep.channels_in);
      if (step.op === "linear") {
        cStep.channels_out = step.tensors.bias.data.length;
      } else {
        const size = sizes[step.target.buffer];
        cStep.target = address(step.target);
        cStep.channels_out = step.target.channels;
        cStep.residual = step.residual ? address(step.residual) : -1;
        cStep.height_out = cStep.width_out = size;
        for (const name of ["groups", "kernel", "stride", "padding", "add"]) cStep[name] = Number(step[name] ?? 1);
        cStep.average = Number(Boolean(step.average));
        cStep.relu = Number(Boolean(step.relu));
        const channels = cStep.channels_in / cStep.groups;
        if (step.op === "pool") {
          Object.assign(cStep, constant(borders, step.kernel, step.padding, step.average, cStep.width_in));
          needs = 3 * plane + 4 * (padded(cStep.width_in) + 64);
        } else if (step.op === "float") {
          const width = size + Math.floor((step.kernel - 1) / step.stride);
          needs = padded(channels * step.stride ** 2 * width * width) + 128 + 4 * padded(size * width);
        } else {
          const ends = [-step.padding, (step.kernel - 1) * step.dilation - step.padding];
          const reach = Math.max(...ends.map((end) => Math.abs(Math.floor(end / step.stride))));
          cStep.slack = padded(reach * (size + 1)) + 64;
          cStep.terms = step.kernel ** 2 * Math.ceil(channels / 8);
          const { kernel, stride, dilation, padding } = step;
          Object.assign(cStep, constant(taps, kernel, stride, dilation, padding, channels, cStep.width_in));
          const bytes = Math.ceil(channels / 8) * stride ** 2 * planes[step.target.buffer] + cStep.slack;
          needs = (cStep.groups * bytes + cStep.slack + plane) / 4;
        }
      }
      largest = Math.max(largest, needs);
      return step.shuffle ? spread(cStep, step.shuffle, plane) : [cStep];
    });
    const result = (cSteps[cSteps.length - 1].target = scratch + padded(largest));
    this.arena = this.allocate(4 * (result + padded(this.classes.length) + 64));
    this.image = this.allocate(4 * 3 * this.size ** 2);
    this.logits = this.allocate(4 * this.classes.length);
    this.steps = cSteps.length;
    this.cSteps = this.allocate(STEP_BYTES * cSteps.length);
    const view = new DataView(this.kernel.memory.buffer, this.cSteps);
    cSteps.forEach((cStep, i) => {
      INTEGERS.forEach((name, j) => view.setBigInt64(STEP_BYTES * i + 8 * j, BigInt(cStep[name] ?? 0), true));
      const start = STEP_BYTES * i + 8 * INTEGERS.length;
      POINTERS.forEach((name, j) => view.setUint32(start + 4 * j, cStep[name] ?? 0, true));
    });
  }

  /** Addresses of a step's tensors in the form that the kernel wants: kernel_weights of packed/kernel.py. */
  weights({ op, groups, source, tensors }) {
    const data = mapValues(tensors, (tensor) => tensor.data);
    if (op === "binary") {
      const [filters, area, bytes] = tensors.bits.shape;
      const bits = this.allocate(4 * data.bits.length);
      const sizes = [groups, filters / groups, area * bytes].map(BigInt);
      this.kernel.encode_weights(this.path, this.copy(data.bits), ...sizes, bits);
      const [scale, bias, slope] = [0, 1, 2].map((i) => this.copy(data.affine.slice(i * filters, (i + 1) * filters)));
      return { threshold: this.copy(data.threshold), bits, scale, bias, slope };
    }
    if (op === "float") {
      const [filters, ...rest] = tensors.weight.shape;
      const [each, taps] = [filters / groups, product(rest)];
      const blocks = Math.ceil(each / 4);
      const weight = new Float32Array(groups * blocks * taps * 4);
      for (let f = 0; f < filters; f++) {
        const [g, i] = [Math.floor(f / each), f % each];
        const block = (g * blocks + Math.floor(i / 4)) * taps;
        for (let t = 0; t < taps; t++) weight[(block + t) * 4 + (i % 4)] = data.weight[f * taps + t];
      }
      return { weight: this.copy(weight), bias: this.copy(data.bias) };
    }
    if (op === "linear") {
      const [classes, inputs] = tensors.weight.shape;
      const weight = new Float32Array(classes * padded(inputs));
      for (let f = 0; f < classes; f++)
        weight.set(data.weight.subarray(f * inputs, (f + 1) * inputs), f * padded(source.channels));
      return { weight: this.copy(weight), bias: this.copy(data.bias) };
    }
    return {};
  }
}

/** A copy's step as one for each of the parts that its channels are shuffled by: Plan._spread of packed/kernel.py. */
function spread(cStep, parts, plane) {
  const channels = cStep.channels_in / parts;
  return [...Array(parts).keys()].map((part) => ({
    ...cStep,
    channels_in: channels,
    channels_out: channels,
    source: cStep.source + part * channels * plane,
    target: cStep.target + part * plane,
    height_out: parts,
    width_out: plane,
  }));
}

const mapValues = (object, f) => Object.fromEntries(Object.entries(object).map(([key, value]) => [key, f(value)]));

/** How many floats the same network has with a float for each of its bits. */
function floats(steps) {
  let total = 0;
  for (const { op, source, groups, tensors } of steps)
    for (const [name, { shape, data }] of Object.entries(tensors))
      total += name === "bits" ? shape[0] * shape[1] * (source.channels / groups) : data.length;
  return total;
}

/** Offsets of the buffers in floats, two of which share memory if no step needs both; and the end of them. */
function place(buffers, steps, planes) {
  const first = new Map([[0, -1]]);
  const last = new Map([[0, 0]]);
  steps.forEach((step, i) => {
    for (const view of [step.source, step.residual, step.target].filter(Boolean)) {
      if (!first.has(view.buffer)) first.set(view.buffer, i);
      last.set(view.buffer, i);
    }
  });
  const offsets = buffers.map(() => 0);
  const placed = [];
  for (const [buffer, since] of [...first].sort((a, b) => a[1] - b[1])) {
    const size = buffers[buffer][0] * planes[buffer];
    let start = 0;
    for (const other of placed.sort((a, b) => a.start - b.start))
      if (last.get(other.buffer) >= since && start + size > other.start) start = Math.max(start, other.end);
    placed.push({ start, end: start + size, buffer });
    offsets[buffer] = start;
  }
  return [offsets, Math.max(...placed.map(({ end }) => end))];
}

/** The constants of a 1-bit convolution: _taps of packed/kernel.py, for square images. */
function taps(kernel, stride, dilation, padding, channels, size) {
  const width = Math.ceil(size / stride);
  const plane = padded(width * width);
  const term = [];
  const masks = new Uint8Array(kernel ** 2 * plane);
  const valid = new Int16Array(plane);
  const inside = (i) => i >= 0 && i < size;
  for (let tap = 0; tap < kernel ** 2; tap++) {
    const dy = Math.floor(tap / kernel) * dilation - padding;
    const dx = (tap % kernel) * dilation - padding;
    for (let y = 0; y < width; y++)
      for (let x = 0; x < width; x++)
        if (inside(y * stride + dy) && inside(x * stride + dx)) {
          masks[tap * plane + y * width + x] = 255;
          valid[y * width + x] += channels;
        }
    const phase = modulo(dy, stride) * stride + modulo(dx, stride);
    const shift = Math.floor(dy / stride) * width + Math.floor(dx / stride);
    for (let byte = 0; byte < Math.ceil(channels / 8); byte++)
      term.push((byte * stride ** 2 + phase) * plane + shift, tap * plane);
  }
  return { term: Int32Array.from(term), masks, valid };
}

/** The constants of a pool: _borders of packed/kernel.py, for square images. */
function borders(kernel, padding, average, size) {
  const plane = padded(size * size);
  const inside = (i, tap) => i + tap - padding >= 0 && i + tap - padding < size;
  const within = (i) => [...Array(kernel).keys()].filter((tap) => inside(i, tap)).length;
  const weight = new Float32Array(kernel * plane).fill(average ? 0 : -Infinity);
  const scale = new Float32Array(plane).fill(1);
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++) {
      const p = y * size + x;
      scale[p] = 1 / (within(y) * within(x));
      for (let tap = 0; tap < kernel; tap++)
        if (inside(x, tap)) weight[tap * plane + p] = average ? 1 : Infinity;
    }
  return { weight, scale };
}
