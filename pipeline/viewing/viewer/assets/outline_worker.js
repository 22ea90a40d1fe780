// Fetches, draws and looks up the polygons in a worker, so that no frame of the page waits for them.
//
// Messages in: {kind: "begin", base, facts}, {kind: "draw", id, view, ratio, on} (only the latest is drawn), {kind: "find",
// id, x, y, on}, {kind: "request", id, what, ...} (see Outlines.request). Out: {kind: "drawn", id, bitmap, ms, final},
// {kind: "found", id, found}, {kind: "answered", id, answer}, {kind: "loaded"}, {kind: "failed"}.

const CELLS = 64;
const MOST_POINTS = 3000; // in one path; messages are processed between paths
const MOST_ERROR_PX = 0.6;
const DOT_PX = 2; // smaller polygons become dots
const BLOB_PX = 7; // smaller polygons are filled, because their outlines would overlap
const CROWD = 30000; // with more polygons than this in view, CROWDED_BLOB_PX replaces BLOB_PX
const CROWDED_BLOB_PX = 16; // drawing outlines takes most of the time
const BUSY_MS = 15;
const CASING = "rgba(255, 255, 255, 0.75)";

let facts = null;
let base = "";
let details = []; // the polygons of each level of detail; null until they are loaded
const asked = new Set();
let latest = null; // the drawing that was requested last
let drawing = false;

self.onmessage = ({ data }) => {
  if (data.kind === "begin") {
    ({ facts, base } = data);
    details = facts.tolerances.map(() => null);
  } else if (data.kind === "draw") {
    latest = data;
    if (!drawing) drawLatest();
  } else if (data.kind === "find") {
    postMessage({ kind: "found", id: data.id, found: find(data) });
  } else if (data.kind === "request") {
    answer(data);
  }
};

// Lets pending messages be processed. A timer would wait longer.
const channel = new MessageChannel();
const pause = () => new Promise((done) => { channel.port1.onmessage = done; channel.port2.postMessage(null); });

async function drawLatest() {
  drawing = true;
  while (latest) {
    const wish = latest;
    const started = performance.now();
    const wanted = wantedDetail(wish.view.zoom);
    const detail = nearestDetail(wanted);
    if (detail === null) {
      if (latest === wish) latest = null; // the page asks again after "loaded"
      continue;
    }
    const { view, ratio } = wish;
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(view.width * ratio)), Math.max(1, Math.round(view.height * ratio)));
    const steps = drawSteps(canvas.getContext("2d"), view, ratio, details[detail], wish.on);
    let paused = performance.now();
    let done = false;
    while (!done && latest === wish) {
      done = steps.next().done;
      if (performance.now() - paused > BUSY_MS) {
        await pause();
        paused = performance.now();
      }
    }
    if (!done || latest !== wish) continue;
    latest = null;
    const bitmap = canvas.transferToImageBitmap();
    postMessage({ kind: "drawn", id: wish.id, bitmap, ms: performance.now() - started, final: detail === wanted }, [bitmap]);
  }
  drawing = false;
}

// Returns the coarsest level of detail that looks the same at this zoom, and starts to load it if necessary.
function wantedDetail(zoom) {
  const wanted = Math.max(0, facts.tolerances.findLastIndex((tolerance) => tolerance * zoom <= MOST_ERROR_PX));
  if (!asked.has(wanted)) {
    asked.add(wanted);
    load(wanted);
  }
  return wanted;
}

function nearestDetail(wanted) {
  const here = details.flatMap((polygons, d) => (polygons ? [d] : []));
  return here.length ? here.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a)) : null;
}

async function load(detail) {
  const response = await fetch(`${base}outlines/${detail}`).catch(() => null);
  if (!response?.ok) {
    postMessage({ kind: "failed" });
    return;
  }
  details[detail] = readPolygons(await response.arrayBuffer());
  for (const done of waiting.splice(0)) done();
  postMessage({ kind: "loaded" });
}

const waiting = []; // requests that came before the first polygons

async function answer(question) {
  const { id, what, zoom = 1 } = question;
  while (nearestDetail(wantedDetail(zoom)) === null) await new Promise((done) => { waiting.push(done); });
  const polygons = details[nearestDetail(wantedDetail(zoom))];
  const answers = {
    at: () => find(question),
    regions: () => question.indices.map((index) => describe(polygons, index)),
    next: () => next(polygons, question),
  };
  postMessage({ kind: "answered", id, answer: await answers[what]() });
}

const orders = {}; // numbers of the polygons by "area" and by "uncertainty", the largest first

async function next(polygons, { by, after, on, skip }) {
  if (!orders[by]) {
    const values = by === "area" ? polygons.area : new Float32Array(await (await fetch(`${base}uncertainty`)).arrayBuffer());
    orders[by] = Uint32Array.from(values, (_, index) => index).sort((a, b) => values[b] - values[a] || a - b);
  }
  const order = orders[by];
  const skipped = new Set(skip);
  const start = after === null ? 0 : order.indexOf(after) + 1;
  for (let step = 0; step < order.length; step++) {
    const index = order[(start + step) % order.length];
    if (index !== after && on[polygons.label[index] - 1] && !skipped.has(index)) return index;
  }
  return null;
}

// Returns the smallest polygon that contains a place; null if there is none.
function find({ x, y, on, zoom }) {
  const detail = nearestDetail(wantedDetail(zoom));
  if (detail === null) return null;
  const polygons = details[detail];
  let best = null;
  for (const index of polygons.grid.at(x, y)) {
    if (!on[polygons.label[index] - 1] || !contains(polygons, index, x, y)) continue;
    if (best === null || polygons.area[index] < polygons.area[best]) best = index;
  }
  return best === null ? null : { ...describe(polygons, best), detail };
}

function describe(polygons, index) {
  const rings = [];
  for (let ring = polygons.firstRing[index]; ring < polygons.firstRing[index + 1]; ring++) {
    rings.push(polygons.xy.slice(2 * polygons.firstPoint[ring], 2 * polygons.firstPoint[ring + 1]));
  }
  const box = [...polygons.box.subarray(4 * index, 4 * index + 4)];
  return { index, label: polygons.label[index], area_mm2: polygons.area[index], box, rings };
}

// pipeline/viewing/viewer/outlines.py describes the byte layout.
function readPolygons(buffer) {
  const [count, rings, points] = new Uint32Array(buffer, 0, 4);
  let offset = 16;
  const take = (Kind, length) => {
    const array = new Kind(buffer, offset, length);
    offset += array.byteLength;
    return array;
  };
  const polygons = {
    count,
    area: take(Float64Array, count), label: take(Uint32Array, count),
    firstRing: take(Uint32Array, count + 1), firstPoint: take(Uint32Array, rings + 1),
    xy: take(Float32Array, 2 * points), box: new Float32Array(4 * count),
  };
  for (let index = 0; index < count; index++) {
    const shell = polygons.firstRing[index];
    const box = [Infinity, Infinity, -Infinity, -Infinity];
    for (let p = polygons.firstPoint[shell]; p < polygons.firstPoint[shell + 1]; p++) {
      const [x, y] = [polygons.xy[2 * p], polygons.xy[2 * p + 1]];
      if (x < box[0]) box[0] = x;
      if (y < box[1]) box[1] = y;
      if (x > box[2]) box[2] = x;
      if (y > box[3]) box[3] = y;
    }
    polygons.box.set(box, 4 * index);
  }
  polygons.size = Int8Array.from(polygons.area, (mm2) => Math.floor(Math.log10(mm2)));
  // Draw large polygons first. An island and the hole around it share a border, which must have the island's color.
  // Polygons of similar size are grouped by class.
  const { size, label } = polygons;
  polygons.order = new Uint32Array(count).map((_, index) => index).sort((a, b) => size[b] - size[a] || label[a] - label[b] || a - b);
  polygons.rank = new Uint32Array(count);
  polygons.order.forEach((index, rank) => { polygons.rank[index] = rank; });
  polygons.grid = new CellGrid(polygons, Math.max(facts.width, facts.height) / CELLS);
  return polygons;
}

class CellGrid {
  constructor(polygons, side) {
    this.polygons = polygons;
    this.side = side;
    this.cells = new Map();
    for (let index = 0; index < polygons.count; index++) {
      const [left, top, right, bottom] = this.range(...polygons.box.subarray(4 * index, 4 * index + 4));
      for (let row = top; row <= bottom; row++) {
        for (let column = left; column <= right; column++) {
          const cell = this.cells.get(row * 4096 + column);
          if (cell) cell.push(index);
          else this.cells.set(row * 4096 + column, [index]);
        }
      }
    }
  }

  range(...box) { return box.map((value) => Math.min(4095, Math.max(0, Math.floor(value / this.side)))); }

  at(x, y) {
    const [column, row] = this.range(x, y);
    return this.cells.get(row * 4096 + column) ?? [];
  }

  // Returns the polygons whose bounding box meets a box, each once, in drawing order.
  within(left, top, right, bottom) {
    const { box, order, rank } = this.polygons;
    const meets = (i) => box[4 * i] <= right && box[4 * i + 2] >= left && box[4 * i + 1] <= bottom && box[4 * i + 3] >= top;
    const [c0, r0, c1, r1] = this.range(left, top, right, bottom);
    if ((c1 - c0 + 1) * (r1 - r0 + 1) > (CELLS * CELLS) / 8) return order.filter(meets);
    const found = new Set();
    for (let row = r0; row <= r1; row++) {
      for (let column = c0; column <= c1; column++) {
        for (const index of this.cells.get(row * 4096 + column) ?? []) if (meets(index)) found.add(index);
      }
    }
    return Uint32Array.from(found).sort((a, b) => rank[a] - rank[b]);
  }
}

function contains(polygons, index, x, y) {
  const { box, xy, firstPoint, firstRing } = polygons;
  if (x < box[4 * index] || y < box[4 * index + 1] || x > box[4 * index + 2] || y > box[4 * index + 3]) return false;
  let inside = false;
  for (let ring = firstRing[index]; ring < firstRing[index + 1]; ring++) {
    for (let p = firstPoint[ring] + 1; p < firstPoint[ring + 1]; p++) {
      const [ax, ay, bx, by] = xy.subarray(2 * p - 2, 2 * p + 2);
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
    }
  }
  return inside;
}

function addRing(path, { xy, firstPoint }, ring, { k, x, y }) {
  const first = firstPoint[ring];
  path.moveTo(xy[2 * first] * k + x, xy[2 * first + 1] * k + y);
  for (let p = first + 1; p < firstPoint[ring + 1] - 1; p++) path.lineTo(xy[2 * p] * k + x, xy[2 * p + 1] * k + y);
  path.closePath();
}

// Draws the polygons in view. Yields before every new path.
function* drawSteps(context, view, ratio, polygons, on) {
  context.lineJoin = "bevel";
  const k = view.zoom * ratio;
  const toScreen = { k, x: (view.width / 2) * ratio - view.x * k, y: (view.height / 2) * ratio - view.y * k };
  const [halfWidth, halfHeight] = [view.width / 2 / view.zoom, view.height / 2 / view.zoom];
  const seen = polygons.grid.within(view.x - halfWidth, view.y - halfHeight, view.x + halfWidth, view.y + halfHeight);
  const blobPx = seen.length > CROWD ? CROWDED_BLOB_PX : BLOB_PX;
  let [lines, blobs, points, label] = [new Path2D(), new Path2D(), 0, 0];
  const finish = () => {
    if (!points) return;
    const { color } = facts.classes[label - 1];
    for (const [style, width] of [[CASING, 3.6], [color, 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width * ratio;
      context.stroke(lines);
    }
    context.fill(blobs);
    [lines, blobs, points] = [new Path2D(), new Path2D(), 0];
  };
  for (const index of seen) {
    if (!on[polygons.label[index] - 1]) continue;
    if (polygons.label[index] !== label || points > MOST_POINTS) {
      finish();
      label = polygons.label[index];
      context.fillStyle = facts.classes[label - 1].color;
      yield;
    }
    const [left, top, right, bottom] = polygons.box.subarray(4 * index, 4 * index + 4);
    const size = Math.max(right - left, bottom - top) * view.zoom;
    const shell = polygons.firstRing[index];
    if (size < DOT_PX) {
      context.fillRect(left * k + toScreen.x, top * k + toScreen.y, DOT_PX * ratio, DOT_PX * ratio);
      points += 1;
    } else if (size < blobPx) {
      addRing(blobs, polygons, shell, toScreen);
      points += polygons.firstPoint[shell + 1] - polygons.firstPoint[shell];
    } else {
      for (let ring = shell; ring < polygons.firstRing[index + 1]; ring++) addRing(lines, polygons, ring, toScreen);
      points += polygons.firstPoint[polygons.firstRing[index + 1]] - polygons.firstPoint[shell];
    }
  }
  finish();
}
