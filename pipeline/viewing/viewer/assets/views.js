// Computes with views, without OpenSeadragon.
//
// A view is {x, y, zoom, degrees, width, height}: the level-0 place at its center, CSS pixels per level-0 pixel, how far the
// slide is turned clockwise, and the size in CSS pixels. Screen positions are CSS pixels from its upper left corner.

// Turns a vector clockwise on the screen.
export function turned([x, y], degrees) {
  const [cos, sin] = [Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180)];
  return [x * cos - y * sin, x * sin + y * cos];
}

// Returns the level-0 place at a screen position.
export function placeOf(view, [left, top]) {
  const [x, y] = turned([left - view.width / 2, top - view.height / 2], -view.degrees);
  return [view.x + x / view.zoom, view.y + y / view.zoom];
}

// Returns the screen position of a level-0 place.
export function screenOf(view, [x, y]) {
  const [left, top] = turned([(x - view.x) * view.zoom, (y - view.y) * view.zoom], view.degrees);
  return [left + view.width / 2, top + view.height / 2];
}

// Returns the view without rotation that contains a turned view.
export function upright(view) {
  const [cos, sin] = turned([1, 0], view.degrees).map(Math.abs);
  return { ...view, degrees: 0, width: view.width * cos + view.height * sin, height: view.width * sin + view.height * cos };
}

// Returns the rotation between 0 and 360 degrees.
export function normal(degrees) { return ((degrees % 360) + 360) % 360; }
