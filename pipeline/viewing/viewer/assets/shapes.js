// Lengths and areas of drawn lines. Points are [x, y].

export const KINDS = {
  distance: { title: "Distance", needed: 2 },
  area: { title: "Area", needed: 3 },
};

// Returns the length of a line through the points.
export function lineLength(points) {
  return points.slice(1).reduce((sum, [x, y], p) => sum + Math.hypot(x - points[p][0], y - points[p][1]), 0);
}

// Returns the area inside the closed line through the points (the shoelace formula). The line must not cross itself.
export function enclosedArea(points) {
  const twice = points.reduce((sum, [x, y], p) => {
    const [nextX, nextY] = points[(p + 1) % points.length];
    return sum + x * nextY - nextX * y;
  }, 0);
  return Math.abs(twice) / 2;
}

// Returns whether the closed line through the points crosses itself.
export function crossesItself(points) {
  const sides = points.map((point, p) => [point, points[(p + 1) % points.length]]);
  return sides.some((one, p) => sides.some((other, q) => {
    const adjacent = q <= p + 1 || (p === 0 && q === sides.length - 1);
    return !adjacent && cross(...one, ...other);
  }));
}

function cross(a, b, c, d) {
  const side = ([px, py], [qx, qy], [x, y]) => Math.sign((qx - px) * (y - py) - (qy - py) * (x - px));
  return side(a, b, c) !== side(a, b, d) && side(c, d, a) !== side(c, d, b);
}
