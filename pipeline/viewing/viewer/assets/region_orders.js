// Sorts the regions by area, uncertainty, probability or class, for the next region and for the rows of the table.

// What the regions are sorted by, the largest value first.
const VALUES = {
  area: (polygons) => polygons.area,
  class: (polygons) => Int32Array.from(polygons.label, (label) => -label),
  uncertainty: (_, uncertainty) => uncertainty,
  probability: (_, uncertainty) => uncertainty.map((value) => -value),
};
const orders = {}; // numbers of the polygons in each order

function ordered(by, polygons, uncertainty) {
  if (!orders[by]) {
    const values = VALUES[by](polygons, uncertainty);
    const { area } = polygons; // equal values: the larger region first
    orders[by] = Uint32Array.from(values, (_, index) => index).sort((a, b) => values[b] - values[a] || area[b] - area[a] || a - b);
  }
  return orders[by];
}

// Returns the number of the region that follows the region `after` in the order `by`, or of the first one if `after` is
// null. Only regions of classes that are `on` and that are not in `skip` count. Returns null if no other region counts,
// or if the order needs the uncertainty and it is not known.
export function nextRegion(polygons, uncertainty, { by, after, on, skip }) {
  if (by === "uncertainty" && !uncertainty) return null;
  const order = ordered(by, polygons, uncertainty);
  const skipped = new Set(skip);
  const start = after === null ? 0 : order.indexOf(after) + 1;
  for (let step = 0; step < order.length; step++) {
    const index = order[(start + step) % order.length];
    if (index !== after && on[polygons.label[index] - 1] && !skipped.has(index)) return index;
  }
  return null;
}

// Returns {rows, first, total}: `count` rows from the number `first`, or the page of them that holds the region `holding`.
// A row is {index, label, area_mm2, probability}. While the uncertainty is unknown, probabilities are null, and the order
// by probability is that by area.
export function regionRows(polygons, uncertainty, { by, upward, on, first, count, holding }) {
  const known = by === "probability" && !uncertainty ? "area" : by;
  const shown = ordered(known, polygons, uncertainty).filter((index) => on[polygons.label[index] - 1]);
  if (upward) shown.reverse();
  const pageOf = (place) => Math.max(0, Math.floor(place / count) * count);
  const place = holding === null ? -1 : shown.indexOf(holding);
  const start = place < 0 ? Math.min(first, pageOf(shown.length - 1)) : pageOf(place);
  const rows = Array.from(shown.subarray(start, start + count), (index) => ({
    index, label: polygons.label[index], area_mm2: polygons.area[index], probability: uncertainty && 1 - uncertainty[index],
  }));
  return { rows, first: start, total: shown.length };
}
