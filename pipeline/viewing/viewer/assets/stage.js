// Shows the slide in OpenSeadragon and moves the view (see views.js).

import { dataUrl } from "./data.js";
import { normal, placeOf, turned } from "./views.js";

const OpenSeadragon = window.OpenSeadragon;
const UM_PER_PX_AT_1X = 10; // on the screen, so 40× is 0.25 µm per pixel
const MOST_ZOOM = 8; // screen pixels per slide pixel
const LEAST_SHARE = 0.1; // of the zoom that shows the whole slide, for addresses

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

export class Stage {
  // Fills `element` with the slide. Only the main stage has a navigator and can be reached with the Tab key.
  constructor(element, facts, main) {
    Object.assign(this, { element, facts });
    this.overviewShown = 0; // share of the overview that was read when its tiles were last requested
    this.osd = new OpenSeadragon({
      element,
      drawer: "canvas",
      tileSources: this.source(),
      tabIndex: main ? 0 : -1,
      showNavigationControl: false,
      showNavigator: main,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.16,
      navigatorAutoFade: false,
      navigatorBackground: "#ffffff",
      navigatorOpacity: 1,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { pinchRotate: false },
      gestureSettingsPen: { clickToZoom: false, dblClickToZoom: true },
      animationTime: window.matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.4,
      springStiffness: 10,
      zoomPerScroll: 1.3,
      maxZoomPixelRatio: MOST_ZOOM,
      minZoomImageRatio: 0.7,
      visibilityRatio: 0.3,
      preserveImageSizeOnResize: true,
      imageLoaderLimit: 6,
      timeout: 120000, // long enough for slow disks: OpenSeadragon does not request a tile again after a timeout
      maxImageCacheCount: 600,
      // Semitransparent tiles that overlap by a fraction of a pixel would show seams.
      subPixelRoundingForTransparency: { "*": OpenSeadragon.SUBPIXEL_ROUNDING_OCCURRENCES.ALWAYS },
    });
    this.osd.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
  }

  source() {
    const { width, height, slide } = this.facts;
    return pyramid(width, height, slide, (z, x, y) => {
      const made = slide.overview !== null && z >= slide.overview;
      return dataUrl(made ? `overview/${z}/${x}_${y}.jpg?read=${this.overviewShown}` : `slide/${z}/${x}_${y}.jpg`);
    });
  }

  // Requests the tiles of the overview again, of which this share has been read.
  showOverview(share) {
    this.overviewShown = share;
    // The tile addresses have changed, so replace the whole image.
    this.osd.addTiledImage({ tileSource: this.source(), index: 0, replace: true });
  }

  // Returns the view that is shown, or else the one at which a movement will end.
  view(shown = true) {
    const { viewport } = this.osd;
    const [bounds, size] = [viewport.getBoundsNoRotate(shown), viewport.getContainerSize()];
    const { width } = this.facts;
    return {
      x: (bounds.x + bounds.width / 2) * width, y: (bounds.y + bounds.height / 2) * width,
      zoom: size.x / (bounds.width * width), degrees: normal(viewport.getRotation(shown)), width: size.x, height: size.y,
    };
  }

  placeAt(left, top) { return placeOf(this.view(), [left, top]); }

  // Returns the screen position of an event of the pointer.
  positionOf(event) {
    const box = this.element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  goTo({ x, y, zoom, degrees }, immediately) {
    if (degrees !== undefined) this.turn(degrees, immediately);
    this.zoomTo(zoom, immediately);
    this.osd.viewport.panTo(new OpenSeadragon.Point(x / this.facts.width, y / this.facts.width), immediately);
  }

  // Moves at once to this view. If it shows nothing of the slide, or too little to see, moves to the closest view that does.
  goNear({ x, y, zoom, degrees }) {
    const { viewport } = this.osd;
    const { width, height } = this.facts;
    const screen = viewport.getContainerSize();
    const least = (LEAST_SHARE * viewport.getHomeZoom() * screen.x) / width;
    const near = { x: clamp(x, 0, width), y: clamp(y, 0, height), zoom: clamp(zoom, least, MOST_ZOOM), degrees: normal(degrees) };
    const inView = Math.hypot(x - near.x, y - near.y) * near.zoom < Math.hypot(screen.x, screen.y) / 2;
    this.goTo(inView ? { ...near, x, y } : near, true);
    viewport.panTo(viewport.getConstrainedBounds().getCenter(), true); // as after every movement with the mouse
  }

  zoomTo(zoom, immediately = false) {
    const { viewport } = this.osd;
    viewport.zoomTo((zoom * this.facts.width) / viewport.getContainerSize().x, null, immediately);
  }

  zoomBy(factor) {
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  // Returns the zoom at which the screen shows a magnification, or null if it is beyond the largest zoom.
  zoomOf(magnification) {
    const zoom = (this.facts.mpp * magnification) / UM_PER_PX_AT_1X / window.devicePixelRatio;
    return zoom <= MOST_ZOOM ? zoom : null;
  }

  moveBy(dx, dy, little) {
    const { viewport } = this.osd;
    const bounds = viewport.getBoundsNoRotate();
    const step = little ? 0.05 : 0.25;
    viewport.panBy(new OpenSeadragon.Point(...turned([dx * step * bounds.width, dy * step * bounds.height], -viewport.getRotation())));
    viewport.applyConstraints();
  }

  home() { this.osd.viewport.goHome(); }

  turn(degrees, immediately = false) { this.osd.viewport.setRotation(degrees, immediately); }

  turnBy(degrees) { this.turn(normal(this.osd.viewport.getRotation() + degrees)); }
}

// Returns the tile source of an image whose tiles have these addresses; level 0 is the finest.
export function pyramid(width, height, { tile, levels }, url) {
  return {
    width, height, tileWidth: tile, tileHeight: tile, tileOverlap: 0, minLevel: 0, maxLevel: levels - 1,
    getTileUrl: (level, x, y) => url(levels - 1 - level, x, y),
  };
}
