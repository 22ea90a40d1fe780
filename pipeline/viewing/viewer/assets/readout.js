// Formats lengths, areas and places as text.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0, signDisplay: "negative" }); // 0 instead of -0
const threeDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

// Returns the largest number of the form 1, 2 or 5 times a power of ten that is at most `length`.
export function nice(length) {
  const power = 10 ** Math.floor(Math.log10(length));
  const step = [5, 2, 1].find((s) => s * power <= length * (1 + 1e-9)) ?? 1;
  return step * power;
}

// Formats a length in micrometers with the unit that needs the fewest digits.
export function distance(um) {
  if (um >= 1000) return `${Number((um / 1000).toPrecision(3))} mm`;
  return um >= 1 ? `${Number(um.toPrecision(3))} µm` : `${Number((um * 1000).toPrecision(3))} nm`;
}

// Formats an area in square millimeters; below 0.000001 mm², which would be 0 in six decimals, in square micrometers.
export function area(mm2) {
  if (mm2 >= 0.01) return `${mm2.toFixed(mm2 >= 1 ? 2 : 3)} mm²`;
  if (mm2 > 0 && mm2 < 1e-6) return `${threeDigits.format(mm2 * 1e6)} µm²`;
  return `${Number(mm2.toPrecision(2)).toFixed(6).replace(/\.?0+$/, "")} mm²`;
}

// Formats an area in square micrometers with the unit that needs the fewest digits.
export function surface(um2) {
  return um2 >= 1e4 ? area(um2 / 1e6) : `${threeDigits.format(um2)} µm²`;
}

// Formats the magnification of a zoom; 10× stands for 1 µm per pixel of the screen, which can be smaller than a pixel of the page.
export function magnification(zoom, mpp) { return `${Number(((10 * zoom * window.devicePixelRatio) / mpp).toPrecision(2))}×`; }

// Formats a place in level-0 pixels and micrometers, and the magnification.
export function place([x, y], zoom, mpp) {
  return `x ${whole.format(x)}, y ${whole.format(y)} px  (${whole.format(x * mpp)}, ${whole.format(y * mpp)} µm)  ${magnification(zoom, mpp)}`;
}
