// The page. All text from files is set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const KEPT = 64; // slices that are kept of each plane
const state = { session: null, files: [], image: null, planes: [], rows: [], colours: new Map(), hidden: new Set(), active: 0, busy: false };

if (location.search) history.replaceState(null, "", "/"); // the token is a cookie from now on

// ---- what the server is asked -------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { "X-Session": state.session ?? "", ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The program does not answer: was it ended?");
  }
  if (!answer.ok) {
    const text = await answer.text();
    let said = text;
    try { said = JSON.parse(text).error; } catch { /* a sentence */ }
    throw new Error(said);
  }
  return answer;
}

function upload(files) { // fetch does not tell how far an upload is
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "image");
    request.setRequestHeader("X-Session", state.session);
    request.setRequestHeader("X-Files", encodeURIComponent(JSON.stringify(files.map((f) => [f.name, f.size]))));
    request.upload.onprogress = (event) => show_progress(event.loaded, event.total);
    request.onerror = () => reject(new Error("The upload was cut short: is the program still running?"));
    request.onload = () => {
      let said = {};
      try { said = JSON.parse(request.responseText); } catch { said.error = request.responseText; }
      request.status === 200 ? resolve(said) : reject(new Error(said.error));
    };
    request.send(new Blob(files, { type: "application/octet-stream" }));
  });
}

function connect() {
  const events = new EventSource("session");
  events.onmessage = async (event) => {
    const first = state.session === null;
    state.session = event.data;
    if (!first) {
      state.image = null; // it belonged to the session that ended
      say("The connection was lost for a moment: press Segment to go on.", true);
      enable();
    } else if (state.model.given) {
      if (await open_image(null)) await segment();
    } else {
      enable();
    }
  };
  events.onerror = () => {
    if (events.readyState === EventSource.CLOSED) say("The program does not answer: load the page again.", true);
  };
}

// ---- an image and its labels --------------------------------------------------------------------------------------

async function during(work) {
  state.busy = true;
  enable();
  say("");
  try {
    await work();
    return true;
  } catch (error) {
    say(error.message, true);
    return false;
  } finally {
    state.busy = false;
    show_progress(null);
    enable();
  }
}

function open_image(files) {
  return during(async () => {
    state.files = files;
    state.image = null;
    clear();
    const too_large = files?.find((file) => file.size > state.model.largest);
    if (too_large) {
      state.files = [];
      const [size, most] = [too_large.size, state.model.largest].map((bytes) => Math.round(bytes / 2 ** 20));
      throw new Error(`${too_large.name} has ${size} MB, ${most} are allowed: start the program with a larger --max-upload.`);
    }
    $("name").textContent = files ? files.map((file) => file.name).join(", ") : "";
    show_progress(0, 0);
    let image;
    try {
      image = files ? await upload(files) : await (await ask("image/given", { method: "POST" })).json();
    } catch (error) {
      state.files = [];
      throw error;
    }
    state.image = image;
    $("name").textContent = image.name;
    build_planes(image);
  });
}

async function segment() {
  if (!state.image && state.files !== null && !state.files.length) return;
  if (!state.image && !(await open_image(state.files))) return;
  await during(async () => {
    const image = state.image;
    try {
      show_progress(0, 0);
      const answer = await ask("segment", { method: "POST" });
      let rest = "";
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (rest + part.value).split("\n");
        rest = lines.pop();
        for (const line of lines.map((text) => JSON.parse(text))) {
          if (line.error) throw new Error(line.error);
          if (line.of) show_progress(line.done, line.of);
          if (line.labels) show_labels(line);
        }
      }
      if (!state.rows.length) throw new Error("The program ended before the labels were found.");
    } catch (error) {
      if (state.image === image) state.image = null; // the next try opens it again
      throw error;
    }
  });
}

function show_labels({ labels, start }) {
  state.rows = labels;
  state.hidden.clear();
  state.colours = new Map(labels.map((row) => [row.value, row.colour]));
  $("legend").replaceChildren(...labels.map(legend_row));
  state.planes.forEach((plane, axis) => {
    plane.kept.clear();
    plane.index = start[axis];
  });
  draw_all();
  say(labels.some((row) => row.count) ? "" : "The model found nothing in this image.");
}

function legend_row(row) {
  const item = document.createElement("li"), label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
  const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
  swatch.style.background = `rgb(${row.colour.join()})`;
  const name = Object.assign(document.createElement("span"), { className: "name", textContent: row.name });
  const amount = Object.assign(document.createElement("span"), { className: "amount", textContent: said(row) });
  amount.title = `${row.count} voxels`;
  box.onchange = () => {
    box.checked ? state.hidden.delete(row.value) : state.hidden.add(row.value);
    state.planes.forEach(paint);
  };
  label.append(box, swatch, name, " ", amount);
  item.append(label);
  return item;
}

function said({ amount, unit }) {
  const digits = Number.isInteger(amount) || amount >= 100 ? 0 : amount >= 1 ? 1 : 3;
  return `${amount.toFixed(digits).replace(/\B(?<!\.\d*)(?=(\d{3})+(?!\d))/g, ",")} ${unit}`;
}

// ---- planes -------------------------------------------------------------------------------------------------------

function clear() {
  state.planes = [];
  state.rows = [];
  state.colours.clear();
  $("planes").replaceChildren();
  $("legend").replaceChildren();
}

function build_planes(image) {
  state.planes = image.planes.map((plane, axis) => build_plane(plane, axis, image));
  $("planes").className = image.planes.length === 1 ? "one" : "";
  $("planes").replaceChildren(...state.planes.map((plane) => plane.figure));
  $("greys").hidden = image.colours;
  $("keys").hidden = image.planes.length === 1;
  if (!image.colours) reset_window();
  activate(0);
  draw_all();
}

function build_plane(plane, axis, image) {
  const figure = Object.assign(document.createElement("figure"), { tabIndex: 0 });
  figure.dataset.plane = plane.name;
  const view = Object.assign(document.createElement("div"), { className: "view" });
  const [rows, columns] = plane.shape;
  const height = rows * plane.spacing[0], width = columns * plane.spacing[1];
  view.style.aspectRatio = `${width} / ${height}`;
  view.style.maxWidth = `calc(min(62vh, 720px) * ${width / height})`;
  const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  const lines = [document.createElement("i"), document.createElement("i")];
  const letters = ["left", "right", "top", "bottom"].map((side, i) =>
    Object.assign(document.createElement("b"), { className: side, textContent: plane.edges[i] }));
  view.append(canvas, ...lines, ...letters);
  const caption = document.createElement("figcaption"), text = document.createElement("span");
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: plane.slices - 1 });
  slider.setAttribute("aria-label", `${plane.name} slice`);
  caption.append(text, slider);
  figure.append(view, caption);
  caption.hidden = plane.slices === 1;
  const { low, step, colours } = image;
  const built = { ...plane, low, step, colours, axis, index: image.start[axis], figure, canvas, lines, slider, text, kept: new Map(), wanted: 0 };
  slider.oninput = () => { activate(axis); move(built, Number(slider.value)); };
  figure.onpointerdown = () => activate(axis);
  view.onclick = (event) => point(built, event);
  view.addEventListener("wheel", (event) => {
    if (plane.slices === 1) return;
    event.preventDefault();
    activate(axis);
    move(built, built.index + Math.sign(event.deltaY));
  }, { passive: false });
  return built;
}

function activate(axis) {
  state.active = axis;
  state.planes.forEach((plane) => plane.figure.classList.toggle("active", plane.axis === axis && state.planes.length > 1));
}

function move(plane, index) {
  plane.index = Math.min(Math.max(index, 0), plane.slices - 1);
  draw(plane);
  draw_lines();
}

// A click in one plane says where the two others cut. Rows run along the first of the other axes, columns along the second.
function point(plane, event) {
  if (state.planes.length < 3) return;
  const box = plane.canvas.getBoundingClientRect();
  const [rows, columns] = plane.shape;
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const [first, second] = state.planes.filter((other) => other !== plane);
  move(first, plane.axis === 0 ? row : rows - 1 - row);
  move(second, column);
}

function draw_lines() {
  if (state.planes.length < 3) return;
  for (const plane of state.planes) {
    const [first, second] = state.planes.filter((other) => other !== plane);
    const row = plane.axis === 0 ? first.index : plane.shape[0] - 1 - first.index;
    const [across, down] = plane.lines;
    Object.assign(across.style, { left: 0, right: 0, height: "1px", top: `${(100 * (row + 0.5)) / plane.shape[0]}%` });
    Object.assign(down.style, { top: 0, bottom: 0, width: "1px", left: `${(100 * (second.index + 0.5)) / plane.shape[1]}%` });
  }
}

function draw_all() {
  state.planes.forEach(draw);
  draw_lines();
}

async function draw(plane) {
  plane.slider.value = plane.index;
  plane.text.textContent = `${plane.name} ${plane.index + 1}/${plane.slices}`;
  const index = plane.index, image = state.image, ticket = ++plane.wanted;
  let cut = plane.kept.get(index);
  if (!cut) {
    if (!image) return; // it has to be opened again
    try {
      const bytes = await (await ask(`slice/${image.image}/${plane.axis}/${index}`)).arrayBuffer();
      cut = unpack(bytes, plane, image.colours);
    } catch (error) {
      if (state.image === image && ticket === plane.wanted) say(error.message, true);
      return;
    }
    plane.kept.set(index, cut);
    if (plane.kept.size > KEPT) plane.kept.delete(plane.kept.keys().next().value);
  }
  if (ticket !== plane.wanted) return; // another slice is wanted by now
  plane.cut = cut;
  paint(plane);
}

function unpack(bytes, plane, colours) {
  const size = plane.shape[0] * plane.shape[1], view = new DataView(bytes);
  const image = colours ? new Uint8Array(bytes, 0, 3 * size) : new Uint16Array(size);
  if (!colours) for (let i = 0; i < size; i++) image[i] = view.getUint16(2 * i, true);
  const start = (colours ? 3 : 2) * size;
  const labels = new Uint16Array(bytes.byteLength > start ? size : 0);
  for (let i = 0; i < labels.length; i++) labels[i] = view.getUint16(start + 2 * i, true);
  return { image, labels };
}

function paint(plane) {
  if (!plane.cut) return;
  const { image, labels } = plane.cut, { low, step, colours } = plane;
  const [rows, columns] = plane.shape, context = plane.canvas.getContext("2d");
  const picture = context.createImageData(columns, rows), pixels = picture.data;
  const level = Number($("level").value), width = Number($("width").value) || 1e-9;
  const scale = (255 * step) / width, shift = (255 * (low - level + width / 2)) / width;
  const opacity = Number($("opacity").value) / 100;
  for (let i = 0, p = 0; i < rows * columns; i++, p += 4) {
    for (let c = 0; c < 3; c++) pixels[p + c] = colours ? image[3 * i + c] : image[i] * scale + shift;
    pixels[p + 3] = 255;
    const label = labels[i];
    if (!label || state.hidden.has(label)) continue;
    const colour = state.colours.get(label);
    if (colour) for (let c = 0; c < 3; c++) pixels[p + c] += opacity * (colour[c] - pixels[p + c]);
  }
  context.putImageData(picture, 0, 0);
  plane.figure.dataset.drawn = Number(plane.figure.dataset.drawn ?? 0) + 1;
}

// ---- level, window, opacity ---------------------------------------------------------------------------------------

function reset_window() {
  const { window: [low, high], low: least, step } = state.image, most = least + 65535 * step;
  for (const id of ["level", "width"]) {
    $(id).min = id === "level" ? least : 0;
    $(id).max = id === "level" ? most : most - least;
  }
  set_look("level", (low + high) / 2);
  set_look("width", high - low);
}

function set_look(id, value) {
  $(id).value = value;
  $(`${id}-number`).value = Number(Number(value).toPrecision(5));
}

for (const id of ["level", "width"]) {
  $(id).oninput = () => { set_look(id, $(id).value); state.planes.forEach(paint); };
  $(`${id}-number`).onchange = () => {
    const value = $(`${id}-number`).valueAsNumber;
    if (Number.isFinite(value)) $(id).value = value;
    set_look(id, $(id).value);
    state.planes.forEach(paint);
  };
}
$("reset").onclick = () => { if (state.image) reset_window(); state.planes.forEach(paint); };
$("opacity").oninput = () => { $("opacity-value").textContent = `${$("opacity").value} %`; state.planes.forEach(paint); };
$("opacity-value").textContent = `${$("opacity").value} %`;

// ---- what the user does -------------------------------------------------------------------------------------------

function say(text, wrong = false) {
  $("message").textContent = text;
  $("message").className = wrong ? "error" : "";
}

function show_progress(done, of) {
  const bar = $("progress");
  bar.hidden = done === null;
  if (of) Object.assign(bar, { max: of, value: done });
  else bar.removeAttribute("value");
}

function enable() {
  const ready = state.session !== null && !state.busy;
  $("files").disabled = !ready;
  $("segment").disabled = !ready || (!state.image && state.files !== null && !state.files.length);
  $("download").disabled = !ready || !state.rows.length || !state.image;
  $("looks").disabled = !state.planes.length;
}

function choose(list) {
  const files = [...list].sort((a, b) => (a.name < b.name ? -1 : 1)); // the order of channels
  if (!files.length) return;
  if (state.session === null || state.busy) say("The program is busy: drop the image again when it is done.", true);
  else open_image(files);
}

$("files").onchange = () => { choose($("files").files); $("files").value = ""; };
$("segment").onclick = segment;
$("download").onclick = () => during(async () => {
  const answer = await ask("mask");
  const name = decodeURIComponent(answer.headers.get("content-disposition").split("''")[1]);
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(await answer.blob()), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files);
  });
}
document.addEventListener("keydown", (event) => {
  const plane = state.planes[state.active];
  if (!plane || event.target.matches("input[type=number], input[type=range]") || event.ctrlKey || event.altKey || event.metaKey) return;
  const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
  if (event.key in steps && plane.slices > 1) {
    event.preventDefault();
    move(plane, plane.index + steps[event.key]);
  } else if (["1", "2", "3"].includes(event.key) && state.planes[event.key - 1]) {
    activate(event.key - 1);
  }
});

// ---- start --------------------------------------------------------------------------------------------------------

try {
  state.model = await (await ask("model")).json();
  const { dataset, trainer, configuration, channels, ending } = state.model;
  $("dataset").textContent = document.title = dataset;
  $("model").textContent = `${trainer}, ${configuration}.`;
  const each = channels.length > 1 ? `a file of each: ${channels.join(", ")}` : channels[0];
  $("ask").textContent = `Drop an image here, or press to choose one (${each}; ${ending})`;
  enable();
  connect();
} catch (error) {
  say(error.message, true);
}
