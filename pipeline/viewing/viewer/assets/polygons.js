// The polygons of one level of detail, and which of them lie at a place.

const CELLS = 64;

// Returns the polygons of a response; pipeline/viewing/viewer/outlines.py describes its bytes. `side` is the longer side of
// the slide.
export function readPolygons(buffer, side) {
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
  polygons.grid = new CellGrid(polygons, side / CELLS);
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

// Returns the number of the smallest polygon of these classes that contains a place, or null if there is none.
export function smallestAt(polygons, x, y, on) {
  let best = null;
  for (const index of polygons.grid.at(x, y)) {
    if (!on[polygons.label[index] - 1] || !contains(polygons, index, x, y)) continue;
    if (best === null || polygons.area[index] < polygons.area[best]) best = index;
  }
  return best;
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

// Returns what the page needs to know of one polygon.
export function describe(polygons, index) {
  const rings = [];
  for (let ring = polygons.firstRing[index]; ring < polygons.firstRing[index + 1]; ring++) {
    rings.push(polygons.xy.slice(2 * polygons.firstPoint[ring], 2 * polygons.firstPoint[ring + 1]));
  }
  const box = [...polygons.box.subarray(4 * index, 4 * index + 4)];
  return { index, label: polygons.label[index], area_mm2: polygons.area[index], box, rings };
}
