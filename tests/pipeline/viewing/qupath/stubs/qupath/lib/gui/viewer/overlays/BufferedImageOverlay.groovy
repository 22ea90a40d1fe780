package qupath.lib.gui.viewer.overlays

class BufferedImageOverlay {
    Map regions
    BufferedImageOverlay(viewer, Map regions) {
        assert viewer != null
        this.regions = regions
    }
}
