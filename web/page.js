// The page: a board to draw on, pictures, the camera; probabilities live.

const $ = (id) => document.getElementById(id);
const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
const LONGEST = 200; // times its shorter side, of a picture; as in packed/picture.py
const SHOWN = 10; // classes

let network = null;
let strokes = [];
let pointer = null; // the one that draws
let stream = null; // the camera's

const board = $("canvas").getContext("2d");

async function use(bytes) {
  network = await PackedNetwork.load(bytes, bytesOf(KERNEL));
  const prompts = ["star", "heart", "ring"].filter((name) => network.classes.includes(name));
  $("title").textContent = prompts.length ? `Draw a ${prompts.join(", a ")}` : "A 1-bit network";
  $("invitation").textContent = prompts.length ? "Draw here" : "Drop a picture here, or draw";
  $("hint").textContent =
    "A closed line is filled, and a second one inside it cuts a hole. Or drop a picture, or another .ebnas file.";
  $("bytes").textContent = size(network.bytes);
  $("float").textContent = size(network.floatBytes);
  $("seen").width = $("seen").height = network.size;
  $("bars").replaceChildren(
    ...network.classes.slice(0, SHOWN).map(() => {
      const row = document.createElement("li");
      row.append(document.createElement("span"), document.createElement("span"), document.createElement("i"));
      return row;
    }),
  );
  clear();
}

const size = (bytes) => (bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

/** Show what the network says of its pixels. */
function classify(pixels) {
  const image = new ImageData(network.size, network.size);
  image.data.fill(255);
  for (let i = 0; i < pixels.length; i++) image.data[4 * Math.floor(i / 3) + (i % 3)] = pixels[i];
  $("seen").getContext("2d").putImageData(image, 0, 0);

  const logits = network.run(pixels);
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  show(powers.map((power) => power / sum));
  time(pixels);
}

/** Bars in the order of the classes, or of their probability where there are more than fit. */
function show(probabilities) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  const rows = order.length > SHOWN ? order.slice(0, SHOWN) : probabilities.map((_, i) => i);
  const percent = (i) => `${(100 * probabilities[i]).toFixed(1)} %`;
  rows.forEach((i, place) => {
    const row = $("bars").children[place];
    row.className = i === order[0] ? "first" : "";
    row.children[0].textContent = network.classes[i];
    row.children[1].textContent = percent(i);
    row.children[2].style.transform = `scaleX(${probabilities[i]})`;
  });
  const sure = document.createElement("small");
  sure.textContent = percent(order[0]);
  $("answer").replaceChildren(network.classes[order[0]], sure);
}

/** The mean time of an image over some milliseconds; a browser's clock is too coarse for one. */
function time(pixels) {
  const start = performance.now();
  let [runs, passed] = [0, 0];
  for (; passed < 8; runs++, passed = performance.now() - start) network.run(pixels);
  $("time").textContent = `${(passed / runs).toPrecision(2)} ms`;
}

function say(message) {
  $("message").textContent = message;
  $("message").hidden = !message;
}

/** Do something that may fail, and say so in a sentence. */
async function attempt(action) {
  say("");
  try {
    await action();
  } catch (error) {
    say(error.message);
  }
}

// ---------------------------------------------------------------------------------------------- drawing

function clear() {
  stopCamera();
  strokes = [];
  redraw();
  $("answer").textContent = "";
  $("time").textContent = "-";
  $("seen").getContext("2d").clearRect(0, 0, network.size, network.size);
  for (const row of $("bars").children) row.children[2].style.transform = "scaleX(0)";
  [...$("bars").children].forEach((row, i) => {
    row.className = "";
    row.children[0].textContent = network.classes.length > SHOWN ? "" : network.classes[i];
    row.children[1].textContent = "";
  });
}

function redraw() {
  const { width } = board.canvas;
  board.setTransform(1, 0, 0, 1, 0, 0);
  board.clearRect(0, 0, width, width);
  board.setTransform(width, 0, 0, width, 0, 0);
  board.lineWidth = 0.025;
  board.lineCap = board.lineJoin = "round";
  board.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--chalk");
  for (const stroke of strokes) trace(board, stroke);
  $("invitation").hidden = strokes.length > 0;
}

let waiting = false;
function drawn() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    redraw();
    if (strokes.length) classify(drawnSquare(strokes, network.resize, network.size));
    else clear();
  });
}

function point(event) {
  const { left, top, width, height } = $("canvas").getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / height];
}

$("canvas").addEventListener("pointerdown", (event) => {
  if (!network || pointer !== null) return;
  pointer = event.pointerId;
  $("canvas").setPointerCapture(pointer);
  stopCamera();
  if (!strokes.length) redraw(); // away with a picture
  strokes.push([point(event)]);
  drawn();
});
$("canvas").addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const stroke = strokes[strokes.length - 1];
  for (const each of event.getCoalescedEvents?.() ?? [event]) stroke.push(point(each));
  drawn();
});
for (const name of ["pointerup", "pointercancel"])
  $("canvas").addEventListener(name, (event) => {
    if (event.pointerId === pointer) pointer = null;
  });
$("clear").addEventListener("click", () => network && attempt(clear));
$("undo").addEventListener("click", () => {
  if (!strokes.length) return;
  strokes.pop();
  drawn();
});

// ---------------------------------------------------------------------------------- pictures and the camera

async function take(file) {
  if (file.name.endsWith(".ebnas")) {
    await use(new Uint8Array(await file.arrayBuffer()));
    return;
  }
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read.`);
  }
  if (!network) return;
  clear();
  $("invitation").hidden = true;
  look(picture, picture.width, picture.height, (await isDeep(file)) && file.name);
}

/** Whether a file is a PNG of 16 bits a channel, of which a browser keeps the upper 8. */
async function isDeep(file) {
  const head = new Uint8Array(await file.slice(0, 25).arrayBuffer());
  return String.fromCharCode(...head.slice(1, 4)) === "PNG" && head[24] === 16;
}

/** Refuse the 8 bits that a browser has kept of 16 where infer.py would read others, or none. */
function checkDeep(name, { data }) {
  const [low, high] = network.valueRange ?? [0, 65535];
  const dark = !network.valueRange && data.every((value, i) => i % 4 === 3 || value < 128);
  if (dark || low !== 0 || high !== 65535)
    throw new Error(`${name} has 16 bits a channel, and browsers keep 8 of them: infer.py reads it as training did.`);
}

/** Classify a picture, or a frame of the camera, and show its central square on the board. `deep`: the name of
 * a file of 16 bits a channel. */
function look(picture, width, height, deep) {
  const shorter = Math.min(width, height);
  if (Math.max(width, height) > LONGEST * shorter) throw new Error("This picture is too long and narrow.");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // below transparent parts
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  if (deep) checkDeep(deep, pixels);
  const whole = board.canvas.width;
  board.setTransform(1, 0, 0, 1, 0, 0);
  board.drawImage(canvas, (width - shorter) / 2, (height - shorter) / 2, shorter, shorter, 0, 0, whole, whole);
  classify(centralSquare(pixels, network.resize, network.size));
}

async function startCamera() {
  if (!navigator.mediaDevices) throw new Error("This browser gives the camera to pages from https alone.");
  const wanted = { video: { facingMode: "environment", width: 640, height: 480 } };
  try {
    stream = await navigator.mediaDevices.getUserMedia(wanted);
  } catch (error) {
    throw new Error(`There is no camera, or it was not allowed (${error.name}).`);
  }
  $("camera").setAttribute("aria-pressed", "true");
  strokes = [];
  $("invitation").hidden = true;
  const video = $("video");
  video.srcObject = stream;
  await video.play();
  const frame = () => {
    if (!stream) return;
    look(video, video.videoWidth, video.videoHeight);
    setTimeout(() => requestAnimationFrame(frame), 50);
  };
  frame();
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  $("camera").setAttribute("aria-pressed", "false");
}

$("camera").addEventListener("click", () => {
  if (stream) clear();
  else if (network) attempt(startCamera);
});
$("picture").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (file) attempt(() => take(file));
});
for (const name of ["dragover", "dragleave", "drop"])
  addEventListener(name, (event) => {
    event.preventDefault();
    $("board").classList.toggle("over", name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) attempt(() => take(file));
  });

attempt(() => use(bytesOf(NETWORK)));
